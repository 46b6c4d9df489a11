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
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback

from flora.bench.methods import Methods, Ranks
from flora.bench.networks import IMAGE_CLASSES, network
from flora.bench.report import DTYPES, device_of, facts, main, options, positive, table, write
from flora.bench.timing import Step, spread, timed
from flora.errors import ConfigError
from flora.launch import processes
from flora.methods.base import Adapted, Method
from flora.results.markdown import formatted
from flora.tasks import ImageDataset, ImageTask, Splits
from flora.training import Protocol, Run, TrainerSettings

METHODS = ("full", "lora", "flora", "flora_factored", "flora_merged")
SPREAD = "interquartile range over the rounds"


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


class StepClock(TrainerCallback):
    """Seconds between the end of step ``first`` and the end of step ``last``, the device's work included."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.seconds = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        """Read the clock at the two steps."""
        if state.global_step in (self.first, self.last):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.seconds


class Clocked:
    """A fine-tuning method whose training a clock watches."""

    def __init__(self, method: Method, clock: StepClock) -> None:
        self.method, self.clock = method, clock
        self.name = method.name

    def apply(self, model: torch.nn.Module, head: list[str]) -> Adapted:
        """Apply the method, then hand the clock to the trainer."""
        adapted = self.method.apply(model, head)
        adapted.callbacks.append(self.clock)
        return adapted


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
                seconds, losses[name] = train_seconds(task, splits, methods, name, settings, arguments)
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
    parser.add_argument("--trainer", action="append", default=[], metavar="KEY=VALUE", help="a setting, as trainer.KEY")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="counted per round")
    parser.add_argument("--warmup", type=int, default=16, help="steps before them; an epoch is 8")
    parser.add_argument("--augment", choices=("auto", "none"), default="auto", help="auto: crops and flips")
    return parser.parse_args()


def given(settings: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` as a mapping, the values read as YAML."""
    pairs = [setting.partition("=") for setting in settings]
    if wrong := [setting for setting, (_, sign, _) in zip(settings, pairs, strict=True) if not sign]:
        raise ConfigError(f"--trainer takes KEY=VALUE, got {wrong[0]!r}")
    return {key: yaml.safe_load(value) for key, _, value in pairs}


def trainer_settings(arguments: argparse.Namespace, device: torch.device, dtype: str) -> TrainerSettings:
    """Settings of the runs; ConfigError for one that the trainer does not have."""
    settings: dict[str, Any] = {"epochs": 1, "lr": 1e-3, "batch_size": arguments.batch, "dtype": dtype}
    settings |= {"eval_batch_size": arguments.batch, "max_steps": arguments.warmup + arguments.steps}
    settings |= {"device": "auto" if device.type == "cuda" else "cpu"} | given(arguments.trainer)
    try:
        return TrainerSettings(**settings)
    except TypeError as error:
        raise ConfigError(f"--trainer: {error}") from error


def train_seconds(
    task: Noise, splits: Splits, methods: Methods, name: str, settings: TrainerSettings, arguments: argparse.Namespace
) -> tuple[float, float]:
    """Seconds that the counted steps of a run take, as train.py runs them, and the mean training loss of all."""
    clock = StepClock(arguments.warmup, arguments.warmup + arguments.steps)
    method = Clocked(methods.tuning(name), clock)
    protocol = Protocol("noise", "last", "train+validation")
    with tempfile.TemporaryDirectory() as folder:
        spec = methods.network.spec
        done = Run(task, spec, method, settings, protocol, splits, arguments.seed, Path(folder)).train()
    (loss,) = (entry["train_loss"] for entry in done.trainer.state.log_history if "train_loss" in entry)
    return clock.seconds, loss


def bare_seconds(methods: Methods, name: str, device: torch.device, arguments: argparse.Namespace) -> float:
    """Seconds of as many steps on one batch, without data, schedule or clipping."""
    torch.manual_seed(arguments.seed)
    prepared = methods.prepare(name, methods.network.build(device).to(device))
    step = Step(methods.network, prepared, methods.network.inputs(device))
    trained = [p for p in prepared.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-4, fused=True)

    def run() -> None:
        step()
        optimizer.step()

    timed(run, arguments.warmup, device)
    return sum(timed(run, arguments.steps, device)) / 1000


def row(name: str, loss: float, train: list[float], bare: list[float] | None) -> dict[str, Any]:
    """A method's loss, rates in examples per second, and the share of the bare step's that training reaches."""
    listed = {"method": name, "loss": loss, "train": round(statistics.median(train), 1)}
    listed["train_spread"] = round(spread(train), 1)
    if bare is None:
        return listed | {"bare": None, "bare_spread": None, "share": None}
    return listed | {
        "bare": round(statistics.median(bare), 1),
        "bare_spread": round(spread(bare), 1),
        "share": round(statistics.median(train) / statistics.median(bare), 4),
    }


def shown(result: dict[str, Any]) -> str:
    """The result as a table for a terminal."""
    lines = [["method", "train.py", "spread", "bare step", "spread", "share"]]
    for row in result["rows"]:
        rates = [formatted(row[key], ",.1f") for key in ("train", "train_spread", "bare", "bare_spread")]
        lines.append([row["method"], *rates, formatted(row["share"], ".3f")])
    head = f"{result['model']}, batch {result['batch']}, {result['size']} px, {result['dtype']}; {result['device']}"
    head += f", {result['processes']} processes" if result["processes"] > 1 else ""
    return f"{head}\n{table(lines)}\nexamples per second, medians; spread: {result['spread']}"


if __name__ == "__main__":
    main(bench_train)
