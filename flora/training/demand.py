"""What a run is going to take at the least: its parameters with their optimiser, its batches, its processes."""

import contextlib
import re
import sys
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from flora import memory
from flora.errors import ConfigError
from flora.launch import processes
from flora.methods.budget import OutOfReach
from flora.methods.heads import trained
from flora.models.spec import TakesImages
from flora.training.run import Run

_NUMBER = 4  # bytes of a parameter, and of each of its gradient and of AdamW's two averages
_SMALL = 1024  # parameters of a layer below which nobody minds an adapter that is larger
_PROCESS = 200 << 20  # bytes of a process that loads data: Python and torch alone


def check(run: Run) -> None:
    """Refuse a run that cannot fit into memory; nothing is allocated for that. Warn of sizes that cannot be meant.

    Raises:
        ConfigError: parameters, batches or processes take more than the machine has, or no ranks come to the budget.
    """
    settings, splits = run.settings, run.splits
    if settings.batch_size > (count := len(splits.train)) > 0:
        _warn(f"trainer.batch_size={settings.batch_size} is more than the {count} examples that there are")
    workers = settings.num_workers * _PROCESS
    memory.check(workers, f"trainer.num_workers={settings.num_workers}", "lower it")
    if isinstance(run.model, TakesImages):
        side = run.model.image_size
        pixel = 3 * (1 if settings.on_gpu else 1 + _NUMBER)  # bytes as they are stored, and as the network takes them
        most = len(splits.test) if settings.max_eval_examples is None else settings.max_eval_examples
        for key, size in (
            ("batch_size", min(settings.batch_size // settings.gradient_accumulation, len(splits.train))),
            ("eval_batch_size", min(settings.eval_batch_size, len(splits.test), most)),
        ):
            what = f"a batch of {size} images of {side} x {side} pixels"
            memory.check(size * pixel * side**2, what, f"lower model.image_size or trainer.{key}")
    _check_parameters(run)


def _check_parameters(run: Run) -> None:
    with _overflows(f"the network {run.model.name}", "model's sizes"):
        network = run.model.skeleton(run.splits.num_classes or None)
    count = sum(p.numel() for p in network.parameters())
    memory.check(count * _NUMBER, f"the network {run.model.name} of {count:,} parameters", "choose a smaller model")
    with _overflows(f"the adapter {run.method.name}", "adapter's ranks"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                adapted = run.method.apply(network, run.model.classifier)
        except OutOfReach as error:  # known before a start trains a head
            raise ConfigError(f"adapter: {error}") from error
        except (ValueError, TypeError, NotImplementedError, re.error):
            return  # it reads the weights, or refuses them: seen when there are some
    if large := _larger_than_their_layers(adapted.model):
        _warn(
            f"{run.method.name}: in {len(large)} layers (first {large[0]}) the adapter has more parameters than the "
            "weight: lower its ranks, or train these layers with adapter=full"
        )
    outside, inside = trained(adapted.model, run.model.classifier)
    count = sum(p.numel() for p in adapted.model.parameters())
    beside = 0 if run.settings.on_gpu else 3 * (outside + inside)  # on a GPU, which says itself what it lacks
    memory.check((count + beside) * _NUMBER, f"{outside:,} parameters to train", "lower the adapter's ranks or sizes")


def _larger_than_their_layers(model: nn.Module) -> list[str]:
    """Names of PEFT's layers whose adapter has more parameters than their weights."""
    large = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module  # its other base, nn.Module, is each method's own
            base = {id(p): p.numel() for p in layer.get_base_layer().parameters()}
            own = sum(p.numel() for p in layer.parameters() if p.requires_grad and id(p) not in base)
            if own > sum(base.values()) >= _SMALL:
                large.append(name.removeprefix("base_model.model."))
    return large


def _warn(text: str) -> None:
    if processes.first():
        print(f"warning: {text}", file=sys.stderr)


@contextlib.contextmanager
def _overflows(what: str, which: str) -> Any:
    try:
        yield
    except (RuntimeError, OverflowError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise ConfigError(f"{what} would take more memory than can be counted: lower the {which}") from error
