"""Compare train.py's throughput, data loading and augmentation included, with the bare step of the same model.

python scripts/bench_train.py --model convnext --batch 1024 --size 64 --dtype bf16 --json results/benchmarks/NAME.json

Trains on noise images in memory through the same task, dataset and trainer as train.py. The bare step is forward,
backward and AdamW on one fixed batch in a plain loop. Both take turns in random order; first steps are not counted.

torchrun --nproc-per-node 2 scripts/bench_train.py --model convnextv2_large --batch 128 --augment none --json NAME.json

measures training on two GPUs alone, at the same batch in all: its rate over that of the same command without torchrun
is the speed-up, and the losses must agree.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import flora.launch.installed  # noqa: F401

import torch

from flora.bench.loop import SPREAD, add_options, given, lines_of, row, train_seconds, trainer_settings
from flora.bench.methods import Methods, Ranks
from flora.bench.networks import IMAGE_CLASSES, network
from flora.bench.report import DTYPES, device_of, facts, main, options, positive, table, write
from flora.bench.timing import Step, timed
from flora.errors import ConfigError
from flora.launch import processes
from flora.tasks import ImageDataset, ImageTask, Splits
from flora.training import layout

METHODS = ("full", "lora", "flora", "flora_factored", "flora_merged")


class Noise(ImageTask):
    """Noise images with random labels, cropped and flipped as photographs are."""

    safe_augmentation = "crop_flip"

    def __init__(self, examples: int, batch: int, augment: str = "auto") -> None:
        super().__init__(name="noise", dataset="noise", epochs=1, augment=augment)
        self.sizes = (examples, batch, batch)

    def files(self, data_dir: Path | None) -> None:
        """None: they are drawn."""

    def load(self, *, image_size: int, data_dir: Path | None, interpolation: str = "bicubic") -> Splits:
        """See ImageTask.load."""

        def drawn(count: int) -> ImageDataset:
            images = torch.randint(256, (count, 3, image_size, image_size), dtype=torch.uint8)
            return ImageDataset(images, torch.randint(IMAGE_CLASSES, (count,)))

        train, validation, test = map(drawn, self.sizes)
        return Splits(train, validation, test, IMAGE_CLASSES, [str(c) for c in range(IMAGE_CLASSES)], {})


def bench_train() -> None:
    """Parse the command line, measure, print a table, write the JSON file."""
    arguments = parsed()
    positive(r=arguments.r, kernel_rank=arguments.kernel_rank, rounds=arguments.rounds, steps=arguments.steps)
    positive(batch=arguments.batch, warmup=arguments.warmup)
    names = arguments.methods.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise ConfigError(f"--methods: choose of {','.join(METHODS)}; got {unknown[0]!r}")
    processes.start(cpu=arguments.device == "cpu")
    device = device_of(arguments.device)
    dtype = arguments.dtype or ("bf16" if device.type == "cuda" else "fp32")
    try:
        net = network(arguments.model, arguments.batch, DTYPES[dtype], arguments.size)
        methods = Methods(net, Ranks(arguments.r, arguments.kernel_rank))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if net.kind != "image":
        raise ConfigError(f"--model {arguments.model}: reads text; choose an image model")
    settings = trainer_settings(arguments, device, dtype)
    torch.manual_seed(arguments.seed)
    task = Noise(7 * arguments.batch, arguments.batch, arguments.augment)
    splits = task.load_for(net.spec, None)
    order = random.Random(arguments.seed)
    rates: dict[tuple[str, str], list[float]] = {}
    losses: dict[str, float] = {}
    for number in range(arguments.rounds):
        turns = [(name, what) for name in names for what in ("train", "bare")[: 1 if processes.launched() else 2]]
        for name, what in order.sample(turns, len(turns)):
            if what == "train":
                seconds, losses[name] = train_seconds(task, net.spec, splits, methods.tuning(name), settings, arguments)
            else:
                seconds = bare_seconds(methods, name, device, arguments)
            rate = arguments.steps * arguments.batch / seconds
            rates.setdefault((name, what), []).append(rate)
            print(f"round {number + 1}: {name} {what} {rate:.1f} examples/s", file=sys.stderr, flush=True)
    result = {
        **facts("train", device),
        "model": arguments.model,
        "batch": net.batch,
        "size": net.spec.image_size,
        "dtype": dtype,
        "processes": processes.count(),
        "augment": arguments.augment,
        "r": arguments.r,
        "kernel_rank": arguments.kernel_rank,
        "trainer": given(arguments.trainer),
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "spread": SPREAD,
        "rows": [row(name, losses[name], rates[name, "train"], rates.get((name, "bare"))) for name in names],
    }
    print(shown(result))
    if processes.first():
        write(arguments.json, result)
    processes.finish()


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("--model", default="convnext", help="an image model: a preset or a name of timm")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--methods", default="flora", help=f"comma-separated, of {','.join(METHODS)}")
    add_options(parser)
    parser.add_argument("--augment", choices=("auto", "none"), default="auto", help="auto: crops and flips")
    return parser.parse_args()


def bare_seconds(methods: Methods, name: str, device: torch.device, arguments: argparse.Namespace) -> float:
    """Seconds of as many steps on one batch, without data, schedule or clipping."""
    torch.manual_seed(arguments.seed)
    prepared = methods.prepare(name, methods.network.build(device).to(device))
    if given(arguments.trainer).get("channels_last"):
        layout.channels_last(prepared.model)
    step = Step(methods.network, prepared, methods.network.inputs(device))
    trained = [p for p in prepared.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-4, fused=True)

    def run() -> None:
        step()
        optimizer.step()

    timed(run, arguments.warmup, device)
    return sum(timed(run, arguments.steps, device)) / 1000


def shown(result: dict[str, Any]) -> str:
    """The result as a table for a terminal."""
    head = f"{result['model']}, batch {result['batch']}, {result['size']} px, {result['dtype']}; {result['device']}"
    head += f", {result['processes']} processes" if result["processes"] > 1 else ""
    return f"{head}\n{table(lines_of(result['rows']))}\nexamples per second, medians; spread: {result['spread']}"


if __name__ == "__main__":
    main(bench_train)
