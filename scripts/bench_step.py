"""Time forward and backward of the frozen model, full fine-tuning, LoRA and FLoRA, in one process.

python scripts/bench_step.py --model convnextv2_large --batch 32 --dtype bf16 --r 16 --json results/benchmarks/NAME.json

Weights and data are random; there is no optimiser. The methods take turns in rounds of random order, on a GPU each
alone on the device. Where the host is busy, `--stay --rounds 40 --steps 3` disturbs all of them alike.
"""

import argparse
import statistics
import sys
from typing import Any

import flora.launch.installed  # noqa: F401

from flora.bench.methods import METHODS, asked_for
from flora.bench.networks import add_options
from flora.bench.report import device_of, facts, main, options, positive, table, write
from flora.bench.timing import SPREAD, Measured, TimingSettings, measure, spread
from flora.errors import ConfigError
from flora.results.markdown import formatted
from flora.results.record import device_name


def bench_step() -> None:
    """Parse the command line, measure, print a table, write the JSON file."""
    arguments = parsed()
    names = [name for name in arguments.methods.split(",") if name]
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names or len(set(names)) < len(names):
        raise ConfigError(f"--methods must name each method once, of {','.join(METHODS)}; got {arguments.methods!r}")
    positive(r=arguments.r, kernel_rank=arguments.kernel_rank, rounds=arguments.rounds, steps=arguments.steps)
    device = device_of(arguments.device)
    if arguments.capture and device.type != "cuda":
        raise ConfigError("--capture: only a GPU replays CUDA graphs; leave it out")
    settings = TimingSettings(
        arguments.rounds, arguments.steps, arguments.warmup, arguments.capture, arguments.stay, arguments.seed
    )
    methods, said = asked_for(arguments, device, arguments.match, arguments.layers)
    where = device_name(device.type == "cpu")
    say(f"{said['model']}, batch {said['batch']}, {said['dtype']}, on {where}: {', '.join(names)}")
    say(f"of each {settings.warmup} steps of warm-up, then {settings.rounds} rounds of {settings.steps}; a line each")
    if device.type == "cpu":
        say("on a CPU a step of a large network takes minutes: --batch, --size, --rounds and --steps make it shorter")
    measured = measure(methods, names, settings, device, say)
    result = {
        **facts("step", device),
        **said,
        "captured": arguments.capture,
        "layers": arguments.layers,
        "match": arguments.match,
        "stay": arguments.stay,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "spread": SPREAD,
        "rows": rows(measured),
    }
    print(shown(result))
    write(arguments.json, result)


def say(line: str) -> None:
    """A line on stderr, at once; stdout is for the table."""
    print(line, file=sys.stderr, flush=True)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    add_options(parser)
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
    parser.add_argument(
        "--stay", action="store_true", help="all models stay on the GPU, so turns can be short and many"
    )
    parser.add_argument("--rounds", type=int, default=3, help="each runs every method once, in random order")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per round")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps before them")
    return parser.parse_args()


def rows(results: dict[str, Measured]) -> list[dict[str, Any]]:
    """A JSON object per method; ``ratio`` is to the floor, null where that was not measured."""
    medians = {name: statistics.median(m.milliseconds) for name, m in results.items() if m.milliseconds}
    listed = []
    for name, measured in results.items():
        ran = measured.error is None
        row = {
            "method": name,
            "ms": round(medians[name], 4) if ran else None,
            "ms_spread": round(spread(measured.milliseconds), 4) if ran else None,
            "ms_rounds": [round(statistics.median(steps), 4) for steps in measured.rounds],
            "ratio": round(medians[name] / medians["floor"], 4) if ran and "floor" in medians else None,
            "peak_bytes": measured.peak_bytes if ran else None,
            "layers": measured.layers,
            "trainable_params": measured.trainable_params,
        }
        listed.append(row if ran else row | {"error": measured.error})
    return listed


def shown(result: dict[str, Any]) -> str:
    """The result as a table for a terminal."""
    inputs = f"{result['size']} px" if result["size"] else f"{result['tokens']} tokens"
    settings = [inputs, result["dtype"], f"layers {result['layers']}", f"r {result['r']} k {result['kernel_rank']}"]
    settings += [name for name in ("match", "captured", "channels_last") if result[name]]
    lines = [["method", "ms", "spread", "ratio", "peak GB", "layers", "trainable", ""]]
    for row in result["rows"]:
        peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 1e9
        cells = [(row["ms"], ".2f"), (row["ms_spread"], ".2f"), (row["ratio"], ".3f"), (peak, ".2f")]
        cells += [(row["layers"], "d"), (row["trainable_params"], ",d")]
        lines.append([row["method"], *(formatted(value, spec) for value, spec in cells), row.get("error", "")])
    head = f"{result['model']}, batch {result['batch']}, {', '.join(settings)}; {result['device']}"
    return f"{head}\n{table(lines)}\nmedians; spread: {result['spread']}; ratio: to floor"


if __name__ == "__main__":
    main(bench_step)
