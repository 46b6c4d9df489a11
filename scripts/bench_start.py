"""Time FLoRA's start from gradients and the memory that it needs, beside training steps of LoRA and FLoRA.

python scripts/bench_start.py --model convnextv2_large --batches 8 --json results/benchmarks/NAME.json

Weights and data are random. Each row has the device to itself: warmed up on one batch, then as many batches for the
start as steps (forward and backward, no optimiser) for the others. The start's seconds are those of its passes and of
the eigenvectors of all modes.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import flora.launch.installed

import torch
from torch import nn

import flora
from flora.bench.methods import Methods, asked_for
from flora.bench.networks import add_options, add_training_options
from flora.bench.report import device_of, facts, main, options, positive, table, write
from flora.bench.timing import Step
from flora.results.markdown import formatted

ROWS = ("lora", "flora", "full", "start")


def bench_start() -> None:
    """Parse the command line, measure, print a table, write the JSON file."""
    arguments = parsed()
    positive(r=arguments.r, kernel_rank=arguments.kernel_rank, batches=arguments.batches)
    device = device_of(arguments.device)
    methods, said = asked_for(arguments, device)
    torch.manual_seed(arguments.seed)
    base = methods.network.build(device)
    rows = []
    for name in [name for name in ROWS if name != "full" or not arguments.no_full]:
        rows.append({"method": name, **measured(name, methods, base, arguments, device)})
        print(rows[-1], flush=True)
    result = {
        **facts("start", device),
        **said,
        "batches": arguments.batches,
        "rows": rows,
    }
    print(shown(result))
    write(arguments.json, result)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    add_options(parser)
    parser.add_argument("--batches", type=int, default=8, help="of the start, and steps beside it")
    add_training_options(parser)
    parser.add_argument("--no-full", action="store_true", help="leave full fine-tuning out, which may not fit")
    return parser.parse_args()


def measured(
    name: str, methods: Methods, base: nn.Module, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Seconds and peak bytes of one row, or the reason why it could not run; ``kept`` is the start's alone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        if name == "start":
            return _start(methods, base, arguments, device)
        return _steps(name, methods, base, arguments, device)
    except torch.OutOfMemoryError:
        return {"seconds": None, "peak_bytes": None, "error": "out of memory"}


def _steps(
    name: str, methods: Methods, base: nn.Module, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    torch.manual_seed(arguments.seed)
    prepared = methods.prepare(name, methods.network.copied(base, device))
    step = Step(methods.network, prepared, methods.network.inputs(device))

    def run() -> None:
        for _ in range(arguments.batches):
            step()

    step()
    return _cost(run, device)


def _start(methods: Methods, base: nn.Module, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(arguments.seed)
    tuning = methods.tuning("flora")
    tuning.options |= {"init": "zero_output", "init_weights": True}  # type: ignore[union-attr]
    model = tuning.apply(methods.network.copied(base, device), methods.head).model
    net = methods.network
    batches = [net.inputs(device) for _ in range(arguments.batches)]
    found: dict[str, dict[int, float]] = {}
    flora.init_from_gradients(model, batches[:1], net.loss)
    cost = _cost(lambda: found.update(flora.init_from_gradients(model, batches, net.loss)), device)
    shares = [share for by_mode in found.values() for share in by_mode.values()]
    return cost | {"weights": len(found), "kept": round(statistics.fmean(shares), 4)}


def _cost(run: Callable[[], None], device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    run()
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = round(time.perf_counter() - started, 3)
    return {"seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None}


def shown(result: dict[str, Any]) -> str:
    """The result as a table for a terminal."""
    lines = [["", "seconds", "peak GB", "share kept", ""]]
    for row in result["rows"]:
        peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 1e9
        cells = [(row["seconds"], ".2f"), (peak, ".2f"), (row.get("kept"), ".3f")]
        lines.append([row["method"], *(formatted(value, spec) for value, spec in cells), row.get("error", "")])
    return f"{result['model']}, {result['batches']} batches of {result['batch']}; {result['device']}\n{table(lines)}"


if __name__ == "__main__":
    main(bench_start)
