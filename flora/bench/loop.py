"""Training through the real trainer under a clock: what bench_train.py and bench_dense.py share."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback

from flora.bench.timing import spread
from flora.errors import ConfigError
from flora.methods.base import Adapted, Method
from flora.models.spec import ModelSpec
from flora.results.markdown import formatted
from flora.tasks import Splits
from flora.tasks.base import Task
from flora.training import Protocol, Run, TrainerSettings

SPREAD = "interquartile range over the rounds"


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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how long training is timed and how it is set."""
    parser.add_argument("--trainer", action="append", default=[], metavar="KEY=VALUE", help="a setting, as trainer.KEY")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="counted per round")
    parser.add_argument("--warmup", type=int, default=16, help="steps before them")


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
    settings |= {"cuda_graph": False}  # as in the bare step that it is compared with
    settings |= {"device": "auto" if device.type == "cuda" else "cpu"} | given(arguments.trainer)
    try:
        return TrainerSettings(**settings)
    except TypeError as error:
        raise ConfigError(f"--trainer: {error}") from error


def train_seconds(
    task: Task[Any],
    spec: ModelSpec,
    splits: Splits,
    method: Method,
    settings: TrainerSettings,
    arguments: argparse.Namespace,
) -> tuple[float, float]:
    """Seconds that the counted steps of a run take, as train.py runs them, and the mean training loss of all."""
    clock = StepClock(arguments.warmup, arguments.warmup + arguments.steps)
    clocked: Any = Clocked(method, clock)
    protocol = Protocol("noise", "last", "train+validation")
    with tempfile.TemporaryDirectory() as folder:
        done = Run(task, spec, clocked, settings, protocol, splits, arguments.seed, Path(folder)).train()
    (loss,) = (entry["train_loss"] for entry in done.trainer.state.log_history if "train_loss" in entry)
    return clock.seconds, loss


def row(name: str, loss: float | None, train: Sequence[float] | None, bare: Sequence[float] | None) -> dict[str, Any]:
    """A method's loss, rates in examples per second, and the share of the bare step's that training reaches.

    None is what was not measured.
    """
    listed: dict[str, Any] = {"method": name, "loss": loss}
    for what, rates in (("train", train), ("bare", bare)):
        listed[what] = round(statistics.median(rates), 1) if rates else None
        listed[f"{what}_spread"] = round(spread(rates), 1) if rates else None
    share = round(statistics.median(train) / statistics.median(bare), 4) if train and bare else None
    return listed | {"share": share}


def lines_of(rows: list[dict[str, Any]]) -> list[list[str]]:
    """What ``row`` gave as the lines of a table for a terminal."""
    lines = [["method", "train.py", "spread", "bare step", "spread", "share"]]
    for one in rows:
        rates = [formatted(one[key], ",.1f") for key in ("train", "train_spread", "bare", "bare_spread")]
        lines.append([one["method"], *rates, formatted(one["share"], ".3f")])
    return lines
