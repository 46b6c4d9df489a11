"""Time inference with live adapters, FLoRA's beside LoRA's, and with a merged one; check that all can be exported.

python scripts/bench_infer.py --model resnet50 --batch 1 --json results/benchmarks/NAME.json

Weights, adapters and data are random. The models take turns in rounds of random order, in torch.inference_mode; ratios
are taken within a round. A GPU's passes are queued back to back.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import flora.launch.installed  # noqa: F401

import torch
from torch import Tensor, nn

from flora.bench.inference import MODELS, Models, measured
from flora.bench.methods import asked_for
from flora.bench.networks import add_options
from flora.bench.report import Measuring, chosen, device_of, facts, main, options, positive, table, write
from flora.bench.timing import summary
from flora.models import programs
from flora.results.markdown import formatted

SPREAD = "interquartile range over the rounds"
EXPORTED = ("base", "merged", "flora_alone", "lora")


def bench_infer() -> None:
    """Parse the command line, measure, print a table, write the JSON file."""
    arguments = parsed()
    counts = ("r", "kernel_rank", "rounds", "steps", "adapters")
    positive(**{name: getattr(arguments, name) for name in counts})
    names = chosen("--methods", arguments.methods, MODELS)
    device = device_of(arguments.device)
    methods, said = asked_for(arguments, device)
    models = Models(methods, names, device, arguments.adapters, arguments.seed)
    measuring = Measuring()
    rows = measured(models, arguments.rounds, arguments.steps, arguments.seed, device, measuring)
    if "merged" in names:
        expected = models.logits("merged")
        for row in rows:
            ours = row["method"].startswith("flora") and "error" not in row
            row["difference"] = difference(models.logits(row["method"]), expected) if ours else None
    result = {
        **facts("infer", device),
        **said,
        "adapters": arguments.adapters,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "spread": SPREAD,
        **measuring.facts(),
        "rows": rows,
    }
    if not (arguments.no_export or measuring.stopped):
        result["programs"] = exported(models, int(getattr(methods.network.spec, "max_length", 0)) or None)
    print(shown(result))
    write(arguments.json, result)
    measuring.end()


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    add_options(parser)
    told = "\n".join(f"{name}: {what};" for name, what in MODELS.items())
    parser.add_argument("--methods", default=",".join(MODELS), help=f"comma-separated. {told}")
    parser.add_argument("--adapters", type=int, default=1, help="live ones, which take turns from pass to pass")
    parser.add_argument("--rounds", type=int, default=20, help="each runs every model, in random order")
    parser.add_argument("--steps", type=int, default=5, help="forward passes of a model per round; the median counts")
    parser.add_argument("--no-export", action="store_true", help="leave torch.export and ONNX out")
    return parser.parse_args()


def difference(outputs: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    outputs, expected = outputs.detach().cpu().double(), expected.detach().cpu().double()
    return float((outputs - expected).abs().max() / expected.abs().max())


def exported(models: Models, longest: int | None) -> list[dict[str, Any]]:
    """By model and kind of program, how far its logits on a CPU in fp32 are from the eager ones, or why there are none.

    The program is made from two examples, and given three.
    """
    net, inputs = models.network, {name: value[:1].cpu() for name, value in models.inputs.items()}
    inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    example, given = ({name: torch.cat(n * [value]) for name, value in inputs.items()} for n in (2, 3))
    rows = []
    for name in [name for name in EXPORTED if name in models.by_name]:
        model = models.by_name[name].cpu().float()
        for ending, kind in programs.ENDS.items():
            row: dict[str, Any] = {"method": name, "to": kind, "difference": None}
            try:
                with tempfile.TemporaryDirectory() as folder:
                    place = Path(folder) / f"model{ending}"
                    made = programs.program(model, example, None if net.kind == "image" else longest)
                    programs.save(made, place, list(example))
                    row["difference"] = difference(programs.run(place, given), eager(model, given))
            except Exception as error:  # exporters raise many kinds; the result says which
                row["error"] = summary(error)
            rows.append(row)
    return rows


@torch.no_grad()
def eager(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The logits without a program."""
    return model(given["images"]) if "images" in given else model(**given).logits


def shown(result: dict[str, Any]) -> str:
    """The result as a table for a terminal."""
    inputs = f"{result['size']} px" if result["size"] else f"{result['tokens']} tokens"
    keys = ("ms", "ms_spread", "ratio", "ratio_spread", "lora_ratio", "lora_ratio_spread")
    lines = [["model", "ms", "spread", "x base", "spread", "x LoRA", "spread", "kept MB", "differs by", ""]]
    for row in result["rows"]:
        kept = None if row["kept_bytes"] is None else row["kept_bytes"] / 1e6
        numbers = [*(formatted(row[key], ".3f") for key in keys), formatted(kept, ".1f")]
        lines.append([row["method"], *numbers, formatted(row.get("difference"), ".1e"), row.get("error", "")])
    cast = ", weights cast" if result["cast"] else ""
    live = f", {result['adapters']} adapters in turn" if result["adapters"] > 1 else ""
    head = f"{result['model']}, batch {result['batch']}, {inputs}, {result['dtype']}{cast}{live}; {result['device']}"
    ends = [f"medians; spread: {result['spread']}; ratios: within a round; differs by: from merged, of the largest"]
    for row in result.get("programs", ()):
        ended = row.get("error") or f"logits on a CPU equal to {row['difference']:.1e}"
        ends.append(f"{row['to']} of {row['method']}: {ended}")
    return "\n".join([head, table(lines), *ends])


if __name__ == "__main__":
    main(bench_infer)
