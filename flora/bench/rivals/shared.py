"""What a rival is told, how it is timed, and what it leaves: the same for all."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Job:
    """A training run, as train.py is told of it too.

    Attributes:
        kind: ``image`` (classes of images), ``classify`` (classes of texts) or ``write`` (a language model).
        data: folder of the splits: folders of classes, parquet of ``sentence`` and ``label``, JSON lines of ``text``.
        network: folder of the network with its weights as transformers reads it, with its tokenizer.
        output: folder for checkpoints and the adapter.
        batch, eval_batch, epochs: of training and evaluation.
        lr, weight_decay, warmup, schedule, max_grad_norm: of AdamW; ``warmup`` is a share of all steps.
        r, alpha: of LoRA.
        targets: modules that LoRA adapts; None: every linear layer and convolution but the head, without depthwise
            and grouped convolutions, which it cannot adapt at a low rank.
        head: the module that trains in full.
        workers: processes that load data.
        dtype: ``bf16`` (autocast) or ``fp32``.
        device: ``cuda`` or ``cpu``.
        timm_name, weights, weights_classes: of an image network in timm, and of how many classes its weights are.
        size, mean, std: how images enter it.
        max_length: tokens of a text.
        answers: words at the end of a text of which one is right.
    """

    kind: str
    data: str
    network: str
    output: str
    batch: int
    eval_batch: int
    epochs: int
    lr: float
    weight_decay: float
    warmup: float
    schedule: str
    max_grad_norm: float
    r: int
    alpha: int
    targets: list[str] | None
    head: str
    workers: int
    dtype: str
    device: str
    seed: int
    timm_name: str = ""
    weights: str = ""
    weights_classes: int = 0
    size: int = 0
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    max_length: int = 0
    answers: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1))

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return self.device == "cuda"


def job() -> Job:
    """The job in the file that the command line names."""
    return Job(**json.loads(Path(sys.argv[1]).read_text()))


def first_steps(steps: int) -> int:
    """How many steps are not counted: a quarter, in which workers start and kernels are chosen; as StepMeter has it."""
    return max(1, steps // 4)


class Clock:
    """Seconds between the end of the first steps and the end of the last, without what is done aside."""

    def __init__(self, steps: int, on_gpu: bool) -> None:
        self.steps, self.on_gpu = steps, on_gpu
        self.seconds = 0.0
        self._started: float | None = None

    def step(self, number: int) -> None:
        """Tell of the end of a step, counted from 1."""
        if number in (first_steps(self.steps), self.steps):
            now = self._now()
            if number == self.steps and self._started is not None:
                self.seconds += now - self._started
            self._started = now if number < self.steps else None

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Evaluate or save inside."""
        running, self._started = self._started, None
        if running is not None:
            self.seconds += self._now() - running
        try:
            yield
        finally:
            if running is not None:
                self._started = self._now()

    def rate(self, batch: int) -> float:
        """Examples a second over the steps that count."""
        return (self.steps - first_steps(self.steps)) * batch / self.seconds

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


def lora_targets(model: nn.Module, head: str) -> list[str]:
    """Names of all linear layers and convolutions outside the head that are neither depthwise nor grouped."""
    kinds = (nn.Linear, nn.Conv2d)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    return [name for name, module in layers if getattr(module, "groups", 1) == 1 and not name.endswith(head)]


def adapted_params(model: nn.Module) -> int:
    """How many parameters train outside the head."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if p.requires_grad and "modules_to_save" not in name)


def leave(job: Job, clock: Clock, peak: int | None, model: nn.Module, metric: str, value: float) -> None:
    """Write what came out to ``result.json`` in the output folder."""
    said: dict[str, Any] = {"examples_per_second": round(clock.rate(job.batch), 1), "peak_bytes": peak}
    said |= {"trainable_params": adapted_params(model), "metric": metric, "value": value}
    Path(job.output, "result.json").write_text(json.dumps(said, indent=1))


def peak_bytes(job: Job) -> int | None:
    """The GPU allocator's peak so far; None on a CPU, where who started the process asks the system."""
    return torch.cuda.max_memory_allocated() if job.on_gpu else None
