"""Time forward and backward of the frozen model, full fine-tuning, LoRA and FLoRA, in one process.

python scripts/bench_step.py --model convnextv2_large --batch 32 --dtype bf16 --r 16 --json results/benchmarks/NAME.json

Weights and data are random; there is no optimiser. The methods take turns in rounds of random order, on a GPU each
alone on the device. Where the host is busy, `--stay --rounds 40 --steps 3` disturbs all of them alike. `--runs 5`
measures five times over, each on new weights and data, and keeps all five. With `--compile MODE` every method runs
through torch.compile, once compiled; `--stay` compiles each once or twice only.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import flora.launch.installed  # noqa: F401

from flora.bench.methods import METHODS, asked_for
from flora.bench.networks import add_options, add_training_options
from flora.bench.report import Measuring, chosen, device_of, facts, main, options, positive, table, write
from flora.bench.timing import MODES, SPREAD, Measured, TimingSettings, measure, spread
from flora.errors import ConfigError
from flora.results.benchmarks import beside_each_other
from flora.results.markdown import formatted
from flora.results.record import device_name


def bench_step() -> None:
    """Parse the command line, measure, print a table, write the JSON file."""
    arguments = parsed()
    names = chosen("--methods", arguments.methods, METHODS)
    counts = ("r", "kernel_rank", "rounds", "steps", "runs")
    positive(**{name: getattr(arguments, name) for name in counts})
    device = device_of(arguments.device)
    if arguments.capture and device.type != "cuda":
        raise ConfigError("--capture: only a GPU replays CUDA graphs; leave it out")
    if arguments.capture and arguments.compile:
        raise ConfigError("--capture, --compile: name one; --compile reduce-overhead replays CUDA graphs by itself")
    settings = TimingSettings(
        arguments.rounds,
        arguments.steps,
        arguments.warmup,
        arguments.capture,
        arguments.stay,
        arguments.seed,
        arguments.compile,
    )
    methods, said = asked_for(arguments, device, arguments.match, arguments.layers)
    where = device_name(device.type == "cpu")
    say(f"{said['model']}, batch {said['batch']}, {said['dtype']}, on {where}: {', '.join(names)}")
    say(f"of each {settings.warmup} steps of warm-up, then {settings.rounds} rounds of {settings.steps}; a line each")
    if device.type == "cpu":
        say("on a CPU a step of a large network takes minutes: --batch, --size, --rounds and --steps make it shorter")
    runs: list[dict[str, Measured]] = []
    measuring = Measuring()
    for number in range(arguments.runs):
        if arguments.runs > 1:
            say(f"run {number + 1} of {arguments.runs}")
        again = [name for name in names if all(run[name].error is None for run in runs)]
        runs.append(measure(methods, again, replace(settings, seed=arguments.seed + number), device, say, measuring))
        if measuring.stopped:
            if number and any(measured.error == Measuring.UNMEASURED for measured in runs[-1].values()):
                runs.pop()  # those before are whole
            break
    result = {
        **facts("step", device),
        **said,
        "captured": arguments.capture,
        "compiled": arguments.compile,
        "layers": arguments.layers,
        "match": arguments.match,
        "stay": arguments.stay,
        "runs": arguments.runs,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "spread": SPREAD,
        **measuring.facts(),
        "rows": rows(runs),
    }
    print(shown(result))
    write(arguments.json, result)
    measuring.end()


def say(line: str) -> None:
    """A line on stderr, at once; stdout is for the table."""
    print(line, file=sys.stderr, flush=True)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    add_options(parser)
    add_training_options(parser)
    told = "\n".join(f"{name}: {what};" for name, what in METHODS.items())
    parser.add_argument("--methods", default="floor,floor_cast,full,lora,flora", help=f"comma-separated. {told}")
    parser.add_argument(
        "--layers",
        choices=("all", "common"),
        default="all",
        help="all that the model's config adapts (LoRA leaves depthwise ones out), or those that LoRA can adapt",
    )
    parser.add_argument("--match", action="store_true", help="FLoRA trains as many parameters as LoRA of rank r")
    parser.add_argument("--capture", action="store_true", help="replay forward and backward as one CUDA graph")
    parser.add_argument("--compile", choices=MODES, help="run the forward pass through torch.compile in this mode")
    parser.add_argument(
        "--stay", action="store_true", help="all models stay on the GPU, so turns can be short and many"
    )
    parser.add_argument("--runs", type=int, default=1, help="measurements, each from the start")
    parser.add_argument("--rounds", type=int, default=3, help="each runs every method once, in random order")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per round")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps before them")
    return parser.parse_args()


def rows(runs: Sequence[dict[str, Measured]]) -> list[dict[str, Any]]:
    """A JSON object per method, over the steps of all runs; ``ratio`` is to the floor, null where that did not run."""
    medians = [{name: statistics.median(m.milliseconds) for name, m in run.items() if m.error is None} for run in runs]
    listed = []
    for name in runs[0]:
        of_runs = [run[name] for run in runs if name in run]
        spent = [ms for measured in of_runs for ms in measured.milliseconds]
        error = next((measured.error for measured in of_runs if measured.error is not None), None)
        ratios = [run[name] / run["floor"] for run in medians if name in run and "floor" in run]
        peaks = [measured.peak_bytes for measured in of_runs if measured.peak_bytes is not None]
        row = {
            "method": name,
            "ms": round(statistics.median(spent), 4) if error is None else None,
            "ms_spread": round(spread(spent), 4) if error is None else None,
            "ms_rounds": [round(statistics.median(steps), 4) for measured in of_runs for steps in measured.rounds],
            "ratio": round(statistics.median(ratios), 4) if error is None and ratios else None,
            "peak_bytes": max(peaks) if error is None and peaks else None,
            "layers": of_runs[0].layers,
            "trainable_params": of_runs[0].trainable_params,
        }
        if of_runs[0].compile_seconds is not None:
            row |= {"compile_seconds": round(of_runs[0].compile_seconds, 2)}
            row |= {"graphs": of_runs[0].graphs, "graph_breaks": of_runs[0].graph_breaks}
        if len(runs) > 1:
            row["ms_runs"] = [round(run[name], 4) for run in medians if name in run]
        listed.append(row if error is None else row | {"error": error})
    return listed


def shown(result: dict[str, Any]) -> str:
    """The result as a table for a terminal."""
    inputs = f"{result['size']} px" if result["size"] else f"{result['tokens']} tokens"
    settings = [inputs, result["dtype"], f"layers {result['layers']}", f"r {result['r']} k {result['kernel_rank']}"]
    settings += [name for name in ("match", "captured", "channels_last", "cast") if result[name]]
    settings += [name for name in ("gradient_checkpointing",) if result[name]] + [result["quantize"] or ""]
    settings += [f"torch.compile {result['compiled']}"] if result["compiled"] else []
    settings = [setting for setting in settings if setting]
    more = ["compile s", "graphs", "breaks"] if result["compiled"] else []
    lines = [["method", "ms", "spread", "ratio", "peak GB", "layers", "trainable", *more, ""]]
    for row in result["rows"]:
        peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 1e9
        cells = [(row["ms"], ".2f"), (row["ms_spread"], ".2f"), (row["ratio"], ".3f"), (peak, ".2f")]
        cells += [(row["layers"], "d"), (row["trainable_params"], ",d")]
        if more:
            cells += [(row.get("compile_seconds"), ".1f"), (row.get("graphs"), "d"), (row.get("graph_breaks"), "d")]
        lines.append([row["method"], *(formatted(value, spec) for value, spec in cells), row.get("error", "")])
    head = f"{result['model']}, batch {result['batch']}, {', '.join(settings)}; {result['device']}"
    ends = [f"medians; spread: {result['spread']}; ratio: to floor", *beside_each_other(result["rows"])]
    return "\n".join([head, table(lines), *ends])


if __name__ == "__main__":
    main(bench_step)
