"""How far a method has moved the weights, along training: norm of the change and feature amplification (Figure 4)."""

import copy
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerCallback

from flora.errors import ConfigError
from flora.methods.heads import in_head

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class DeltaNorms(TrainerCallback):
    """Logs, as means over the layers that have moved, ``delta_norm`` = |dW| and ``amplification`` = |dW| / |U^T W V|.

    Norms are Frobenius norms; U and V are the ``rank`` first left and right singular vectors of dW, as in the LoRA
    paper. A convolution counts as the matrix [out, in k...]. What this costs is kept out of the training time.

    Args:
        trainer: whose model is looked at, and whose log takes the numbers.
        head: names of the classifier modules, which do not count.
        every_n_steps: optimiser steps between two looks.
        rank: see above.
    """

    def __init__(self, trainer: Any, head: Sequence[str], every_n_steps: int, rank: int) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("rank", rank)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"analysis.{name} must be a whole number from 1, got {value!r}")
        self.trainer, self.head, self.every_n_steps, self.rank = trainer, head, every_n_steps, rank
        self.start: dict[str, Tensor] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Remember the weights of a network that is trained itself."""
        self.start = {n: w.detach().clone() for n, w in _own(self.trainer.model, self.head)}
        if not self.start and not any(_adapted(self.trainer.model)):
            raise ConfigError("analysis.every_n_steps: this method changes no weight of a layer")

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"start": self.start}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.start = {name: tensor.to(self.start[name].device) for name, tensor in saved["start"].items()}

    def on_step_end(self, args, state, control, **kwargs):
        """Look at the weights every so many steps."""
        if state.global_step % self.every_n_steps == 0:
            with self.trainer.meter.pause(), torch.no_grad():
                self.trainer.log(self.measure())

    def measure(self) -> dict[str, float]:
        """The two numbers now."""
        measured = [norm_and_amplification(w, d, self.rank) for w, d in self._changes() if d.any()]
        if not measured:
            return {"delta_norm": 0.0}
        norms, factors = zip(*measured, strict=True)
        return {"delta_norm": statistics.fmean(norms), "amplification": statistics.fmean(factors)}

    def _changes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Weight before, and its change, per layer."""
        for name, weight in _own(self.trainer.model, self.head):
            yield self.start[name], weight - self.start[name]
        for layer in _adapted(self.trainer.model):
            before = layer.get_base_layer().weight
            # A half-precision weight would swallow a small change.
            merged = copy.deepcopy(layer).to(torch.promote_types(before.dtype, torch.float32))
            merged.merge(adapter_names=list(layer.active_adapters))
            yield before, merged.get_base_layer().weight - before


def norm_and_amplification(weight: Tensor, delta: Tensor, rank: int) -> tuple[float, float]:
    """|delta| and |delta| / |U^T weight V| of one layer, U and V the ``rank`` first singular vectors of delta."""
    weight, delta = weight.flatten(1).float(), delta.flatten(1).float()
    u, _, vh = torch.linalg.svd(delta, full_matrices=False)
    norm = delta.norm().item()
    seen = (u[:, :rank].T @ weight @ vh[:rank].T).norm().item()
    return norm, norm / max(seen, 1e-12)


def _own(model: nn.Module, head: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Trained weights of plain layers outside the head; none where an adapter is trained."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return
    for name, module in model.named_modules():
        if isinstance(module, _KINDS) and module.weight.requires_grad and not in_head(name, head):
            yield name, module.weight


def _adapted(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), _KINDS):
            yield module
