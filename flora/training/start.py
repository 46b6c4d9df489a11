"""The start from gradients: what a run looks at on its training data before it trains.

A fresh head is trained alone for a few steps, the gradients of a few batches go through it, and the head is put back.
Random numbers are its own: training proper draws what it draws in a run without.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader

from flora.adapters.gradients import UnusableGradient, init_from_gradients
from flora.errors import ConfigError, TrainingDiverged
from flora.launch import processes
from flora.methods.allocation import gradient_spectra
from flora.methods.gradient import GradientSettings
from flora.methods.heads import in_head
from flora.methods.ladders import Ladder
from flora.tasks.base import Batch
from flora.training.groups import parameter_groups
from flora.training.meters import PeakMemory
from flora.training.resume import load_weights, rng_state, set_rng_state, weights
from flora.training.settings import FOLLOW_METRICS

if TYPE_CHECKING:
    from flora.training.run import Run


class Start:
    """What one fit looks at before it trains.

    With several processes each trains the head on the same batches, and the first one's counts; the batches of the
    gradients are dealt out. So memory must suffice for a whole micro-batch in each.

    Args:
        run: of the fit.
        train: its training split.
        lr: the head's rate, where ``trainer.head_lr`` is null.
        kept: what was found for another fit on this split at this rate, perhaps by an earlier process; filled. Tensors
            in it are on the CPU: it is part of the run's checkpoints.

    Raises:
        ConfigError: there is no example, or the model is to be in shards. From the methods: gradients cannot be used.
        TrainingDiverged: from the methods: the head took the rate of the fit, and came to nothing at it.
    """

    def __init__(self, run: Run, train: Any, lr: float, kept: dict[str, Any]) -> None:
        if run.settings.distributed == "fsdp":
            raise ConfigError(
                "adapter: gradients are looked at on a whole model: take trainer=ddp, or another init and allocation"
            )
        if not len(train):
            raise ConfigError("adapter: init=gradient and allocation=gradient need training data: choose other ones")
        gradient = getattr(run.method, "gradient", None)
        assert isinstance(gradient, GradientSettings)
        self.run, self.train, self.gradient, self.kept = run, train, gradient, kept
        self.settings = replace(run.settings, head_lr=run.settings.head_lr or lr)
        self.forward = run.task.forward(run.model)
        self.micro_batch = self.settings.batch_size // self.settings.gradient_accumulation
        self.count = gradient.batches * self.settings.gradient_accumulation

    def for_ranks(self, base: nn.Module) -> dict[str, Any]:
        """Train the head of the base model and put it back; returns what ``Method.apply`` takes beside the model."""
        if "head" not in self.kept:
            if self.gradient.head_steps and self._head_of(base):
                with self._apart(f"the head alone for {self.gradient.head_steps} steps"), self._placed(base):
                    self.kept["head"] = self._trained_head(base)
            else:
                self.kept["head"] = _copies(self._head_of(base))
        return {"spectra": self._spectra} if getattr(self.run.method, "allocates_by_gradients", False) else {}

    def begin(self, model: nn.Module) -> dict[str, Any]:
        """Give the adapted model, which is where it trains, its start; returns what it took, for the record."""
        if not getattr(self.run.method, "starts_from_gradients", False):
            if not self.gradient.put_back:
                _fill(self._head_of(model), self.kept["head"])
        elif "weights" in self.kept:
            load_weights(model, self.kept["weights"])
        else:
            with self._apart("factors from the gradients of {examples:,} examples; they keep {kept:.0%} on average"):
                self._give(model)
            self.kept["weights"] = weights(model)
        return dict(self.kept["report"])

    def _spectra(self, base: nn.Module, ladders: Sequence[Ladder]) -> list[list[Tensor]]:
        if "spectra" not in self.kept:
            with self._apart("ranks from the gradients of {examples:,} examples"), self._placed(base):
                head = self._head_of(base)
                fresh = _copies(head)
                _fill(head, self.kept["head"])
                with self._checkpointing(base), self._usable():
                    found = gradient_spectra(ladders, base, self._batches(base, once=True), self._loss)
                self.kept["spectra"] = processes.once(lambda: found)
                _fill(head, fresh)
        return self.kept["spectra"]

    def _give(self, model: nn.Module) -> None:
        head = self._head_of(model)
        fresh = _copies(head)
        _fill(head, self.kept["head"])
        try:
            with self._checkpointing(model), self._usable():
                kept = init_from_gradients(model, self._batches(model, once=True), self._loss)
        except ValueError as error:
            raise ConfigError(f"adapter.init=gradient: {error}") from error
        shares = [share for by_mode in kept.values() for share in by_mode.values()]
        self.kept["report"]["kept"] = round(sum(shares) / len(shares), 4) if shares else 1.0
        if self.gradient.put_back:
            _fill(head, fresh)

    def _trained_head(self, base: nn.Module) -> list[Tensor]:
        """Copies of the head's parameters after its steps; the base model is left as it was."""
        settings, head = self.settings, self._head_of(base)
        fresh = _copies(head)
        trained = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
        modes = [(module, module.training) for module in base.modules()]
        base.eval().requires_grad_(False)
        for parameter in head:
            parameter.requires_grad_(True)
        groups = parameter_groups(base.named_parameters(), self.run.model.classifier, {}, settings)
        optimizer, steps = torch.optim.AdamW(groups), self.gradient.head_steps
        warmup = math.ceil(settings.warmup_ratio * steps) if settings.warmup_steps is None else settings.warmup_steps
        kind = "constant" if settings.schedule in FOLLOW_METRICS else settings.schedule  # there is none here
        schedule = transformers.get_scheduler(kind, optimizer, min(warmup, steps), steps)
        batches = self._batches(base)
        for _ in range(steps):
            for batch in itertools.islice(batches, settings.gradient_accumulation):
                (self._loss(base, batch) / settings.gradient_accumulation).backward()
            if settings.max_grad_norm:
                nn.utils.clip_grad_norm_(head, settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        for parameter, was in trained:
            parameter.requires_grad_(was)
        for module, training in modes:
            module.training = training
        if processes.count() > 1:
            for parameter in head:
                distributed.broadcast(parameter.data, 0)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in head):
            why = f"the head alone diverges at a rate of {settings.head_lr:g}: lower it"
            raise (TrainingDiverged if self.run.settings.head_lr is None else ConfigError)(f"adapter.gradient: {why}")
        found = [tensor.cpu() for tensor in _copies(head)]
        _fill(head, fresh)
        return found

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        """Unusable gradients are laid to the head: one at zero, or one that was trained at the rate of the fit."""
        try:
            yield
        except UnusableGradient as error:
            if (head := self.kept["head"]) and not any(p.any() for p in head if p.ndim > 1):
                raise ValueError(
                    "the head is at zero, and no gradient passes it: raise adapter.gradient.head_steps"
                ) from error
            if self.run.settings.head_lr is None and self.gradient.head_steps and self.run.model.classifier:
                raise TrainingDiverged(f"{error}, or lower the rate of the head alone") from error
            raise

    def _head_of(self, model: nn.Module) -> list[nn.Parameter]:
        """Parameters of the head; of an adapted model those of the copy that trains. The order is that of the base."""
        adapted = isinstance(model, peft.PeftModel)
        named = [(n, p) for n, p in model.named_parameters() if in_head(n, self.run.model.classifier)]
        return [p for _, p in named if p.requires_grad or not adapted]

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The task's loss of a batch, as training has it; autocast only to bf16, as nothing scales the loss."""
        kind = next(iter(batch.values())).device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.settings.dtype == "bf16"):
            outputs, targets = self.forward(model, batch, True)
        return self.run.task.loss(_in_full(outputs), targets, self.settings.label_smoothing)

    def _batches(self, model: nn.Module, once: bool = False) -> Iterator[Batch]:
        """Micro-batches on the model's device, epoch after epoch; once: this process's part of those of the start."""
        device = next(model.parameters()).device
        order = torch.Generator().manual_seed(self.run.seed)
        for epoch in itertools.count():
            indices = torch.randperm(len(self.train), generator=order).tolist()
            cut = [indices[i : i + self.micro_batch] for i in range(0, len(indices), self.micro_batch)]
            if once:
                cut = cut[: self.count][processes.index() :: processes.count()]
            if hasattr(self.train, "begin_epoch"):
                self.train.begin_epoch(self.run.seed, epoch)
            loader: Any = DataLoader(
                self.train, batch_sampler=cut, collate_fn=_as_is, num_workers=self.settings.num_workers
            )
            for batch in loader:
                yield {name: tensor.to(device) for name, tensor in batch.items()}
            if once:
                return

    @contextlib.contextmanager
    def _placed(self, base: nn.Module) -> Iterator[None]:
        """The base model on the device, and back on the CPU, where methods are applied."""
        if self.settings.on_gpu:
            base.to(torch.device("cuda", torch.cuda.current_device()))
        try:
            yield
        finally:
            base.to("cpu")

    @contextlib.contextmanager
    def _checkpointing(self, model: Any) -> Iterator[None]:
        """Activations computed again where training does that too."""
        if not (self.settings.gradient_checkpointing and hasattr(model, "gradient_checkpointing_enable")):
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)  # for a new name
            model.gradient_checkpointing_enable({"use_reentrant": False})
            try:
                yield
            finally:
                model.gradient_checkpointing_disable()

    @contextlib.contextmanager
    def _apart(self, what: str) -> Iterator[None]:
        """Inside, random numbers are the start's own; what it takes is noted and said."""
        on_gpu, report = self.settings.on_gpu, self.kept.setdefault("report", {"seconds": 0.0, "peak_memory_bytes": 0})
        memory, began, state = PeakMemory(on_gpu), time.perf_counter(), rng_state(on_gpu)
        memory.reset()
        (transformers.enable_full_determinism if self.settings.deterministic else transformers.set_seed)(self.run.seed)
        try:
            yield
        finally:
            set_rng_state(state, on_gpu)
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # captured steps have a pool of their own
        seconds = time.perf_counter() - began
        report["seconds"] = round(report["seconds"] + seconds, 3)
        report["peak_memory_bytes"] = max(report["peak_memory_bytes"], memory.read())
        examples = min(self.gradient.batches * self.settings.batch_size, len(self.train))
        said = what.format(examples=examples, kept=report.get("kept", 0.0))
        print(f"start: {said} ({seconds:.1f} s)", file=sys.stderr)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _fill(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def _in_full(outputs: Any) -> Any:
    """Outputs in float32 at the least."""
    if isinstance(outputs, Tensor):
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if isinstance(outputs, dict):
        return {name: _in_full(value) for name, value in outputs.items()}
    return tuple(_in_full(value) for value in outputs)


def _as_is(batch: Any) -> Any:
    return batch  # datasets gather whole batches
