"""Time inference of a merged adapter against the base model, and check that the merged model passes torch.export.

python scripts/bench_infer.py --model convnext --batch 64 --json results/benchmarks/NAME.json

Weights, adapter and data are random. The models take turns in rounds of random order; ratios are taken within a round.
"""

import argparse
import copy
import random
import statistics
from functools import partial
from typing import Any

import flora.launch.installed  # noqa: F401

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flora.bench.methods import Methods, asked_for
from flora.bench.networks import Network, add_options, unlabelled
from flora.bench.report import device_of, facts, main, options, positive, table, write
from flora.bench.timing import spread, summary, timed

SPREAD = "interquartile range over the rounds"


def bench_infer() -> None:
    """Parse the command line, measure, print a table, write the JSON file."""
    arguments = parsed()
    positive(r=arguments.r, kernel_rank=arguments.kernel_rank, rounds=arguments.rounds, steps=arguments.steps)
    device = device_of(arguments.device)
    methods, said = asked_for(arguments, device)
    torch.manual_seed(arguments.seed)
    models = made(methods, device)
    net = methods.network
    inputs = unlabelled(net.inputs(device))
    rounds = taken_in_turn(models, net, inputs, arguments.rounds, arguments.steps, arguments.seed)
    result = {
        **facts("infer", device),
        **said,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "spread": SPREAD,
        "rows": rows(rounds),
        "difference": difference(net.outputs(models["merged"], inputs), net.outputs(models["adapted"], inputs)),
    }
    if not arguments.no_export:
        result["export"] = exported(models, net, inputs)
    print(shown(result))
    write(arguments.json, result)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=20, help="each runs every model, in random order")
    parser.add_argument("--steps", type=int, default=5, help="forward passes of a model per round; the median counts")
    parser.add_argument("--no-export", action="store_true", help="leave torch.export out")
    return parser.parse_args()


def made(methods: Methods, device: torch.device) -> dict[str, nn.Module]:
    """The base model, one with FLoRA's adapter, and one with the adapter merged."""
    base = methods.network.build(device).to(device)
    adapted = methods.prepare("flora", copy.deepcopy(base)).model
    merged: Any = copy.deepcopy(adapted)
    models = {"base": base, "merged": merged.merge_and_unload(), "adapted": adapted}
    return {name: model.eval().requires_grad_(False) for name, model in models.items()}


@torch.no_grad()
def taken_in_turn(
    models: dict[str, nn.Module], net: Network, inputs: dict[str, Tensor], rounds: int, steps: int, seed: int
) -> dict[str, list[float]]:
    """Milliseconds of a forward pass, the median of ``steps``, by model and round; a first round is not counted."""
    order, device = random.Random(seed), next(iter(inputs.values())).device
    medians: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name in order.sample(list(models), len(models)):
            spent = timed(partial(net.outputs, models[name], inputs), steps, device)
            if number > 0:
                medians[name].append(statistics.median(spent))
    return medians


def rows(rounds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A JSON object per model: milliseconds, and the ratio to the base model of the same round."""
    listed = []
    for name, spent in rounds.items():
        ratios = [ours / base for ours, base in zip(spent, rounds["base"], strict=True)]
        listed.append(
            {
                "method": name,
                "ms": round(statistics.median(spent), 4),
                "ms_spread": round(spread(spent), 4),
                "ratio": round(statistics.median(ratios), 4),
                "ratio_spread": round(spread(ratios), 4),
            }
        )
    return listed


def difference(outputs: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    outputs, expected = outputs.detach().double(), expected.detach().double()
    return float((outputs - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def exported(models: dict[str, nn.Module], net: Network, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Whether torch.export takes the merged model and returns its outputs; where not, whether the base passes."""

    def export(model: nn.Module) -> float:
        positional = (inputs["images"],) if net.kind == "image" else ()
        keywords = {} if net.kind == "image" else inputs
        program = torch.export.export(model, positional, keywords).module()
        return max(
            difference(ours, expected)
            for ours, expected in zip(
                _tensors(program(*positional, **keywords)), _tensors(model(*positional, **keywords)), strict=True
            )
        )

    try:
        return {"passed": True, "difference": export(models["merged"])}
    except Exception as error:  # torch.export raises many kinds; the result says which
        report = {"passed": False, "error": summary(error)}
    try:
        export(models["base"])
    except Exception as error:
        return report | {"base_passed": False, "base_error": type(error).__name__}
    return report | {"base_passed": True}


def _tensors(outputs: Any) -> list[Tensor]:
    return [tensor for tensor in tree_leaves(outputs) if isinstance(tensor, Tensor)]


def shown(result: dict[str, Any]) -> str:
    """The result as a table for a terminal."""
    inputs = f"{result['size']} px" if result["size"] else f"{result['tokens']} tokens"
    lines = [["model", "ms", "spread", "ratio", "spread"]]
    for row in result["rows"]:
        numbers = [f"{row['ms']:.3f}", f"{row['ms_spread']:.3f}", f"{row['ratio']:.3f}", f"{row['ratio_spread']:.3f}"]
        lines.append([row["method"], *numbers])
    head = f"{result['model']}, batch {result['batch']}, {inputs}, {result['dtype']}; {result['device']}"
    ends = [f"medians; spread: {result['spread']}; ratio: to base, within a round"]
    ends.append(f"merged against adapted outputs: {result['difference']:.1e} of the largest")
    if export := result.get("export"):
        passed = f"passes, outputs equal to {export['difference']:.1e}" if export["passed"] else export["error"]
        ends.append(f"torch.export of the merged model: {passed}")
    return "\n".join([head, table(lines), *ends])


if __name__ == "__main__":
    main(bench_infer)
