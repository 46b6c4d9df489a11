"""AdaLoRA as a run needs it: PEFT's method, its schedule as shares of the run, its penalty and its rank allocation."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from flora.methods import alpha
from flora.methods.allocation import Spectra
from flora.methods.base import Adapted, effective_ranks
from flora.methods.peft import Peft


class AdaLora(Peft):
    """AdaLoRA (arXiv 2303.10512) from PEFT; ranks are taken from layers that need them least while it trains.

    Args:
        r: average rank per layer at the end.
        initial_r: rank of every layer at the start; 1.5 r, rounded up, by default.
        warmup, final: shares of the steps before the first and after the last reallocation.
        orth_reg_weight: weight of the penalty that keeps the factors orthonormal.
        options: as for ``Peft``; the rest goes to ``peft.AdaLoraConfig``. In ``lora_alpha=2r``, r is the average rank
            at the end; PEFT divides alpha by the rank at the start.
    """

    def __init__(
        self,
        name: str,
        r: int,
        initial_r: int | None = None,
        warmup: float = 0.1,
        final: float = 0.3,
        orth_reg_weight: float = 0.5,
        **options: Any,
    ) -> None:
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"adapter.r must be a positive integer, got {r!r}")
        if warmup < 0 or final < 0 or warmup + final >= 1:
            raise ValueError(f"adapter.warmup and adapter.final must leave steps between them, got {warmup}, {final}")
        initial = -(-3 * r // 2) if initial_r is None else initial_r
        if initial < r:
            raise ValueError(f"adapter.initial_r must be at least adapter.r, got {initial_r} and {r}")
        # PEFT wants a length before the run has one; the callback sets the real schedule.
        schedule = {"target_r": r, "init_r": initial, "orth_reg_weight": orth_reg_weight, "total_step": 1}
        options = schedule | alpha.resolved({"r": r, **options})
        del options["r"]
        super().__init__(name, "peft.AdaLoraConfig", **options)
        self.warmup, self.final = warmup, final

    def apply(self, model: nn.Module, head: Sequence[str], spectra: Spectra | None = None) -> Adapted:
        """Wrap ``model`` as ``Peft`` does; the trainer gets the penalty and the reallocation with it."""
        adapted = super().apply(model, head, spectra)
        adapted.callbacks.append(_Allocate(self.warmup, self.final, adapted))
        adapted.penalty = penalty
        return adapted


def penalty(model: nn.Module) -> Tensor:
    """The weighted mean over all factors P of ``||P^T P - I||``, to be added to the loss."""
    tuner = cast(Any, model).base_model
    norms = []
    for name, parameter in tuner.model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            gram = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
            norms.append(torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
    return tuner.peft_config[tuner.trainable_adapter_name].orth_reg_weight * torch.stack(norms).mean()


class _Allocate(TrainerCallback):
    def __init__(self, warmup: float, final: float, adapted: Adapted) -> None:
        self.warmup, self.final, self.adapted = warmup, final, adapted
        self.tuner = cast(Any, adapted.model).base_model
        self.config: Any = self.tuner.peft_config[self.tuner.trainable_adapter_name]
        self.pattern: dict[str, list[bool]] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Set the schedule from the length of the run."""
        self.config.tinit = int(self.warmup * state.max_steps)
        self.config.tfinal = int(self.final * state.max_steps)
        self.config.total_step = state.max_steps

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the averages by which ranks are taken away, and those that are left."""
        allocator = self.tuner.rankallocator
        return {
            "sensitivity": allocator.exp_avg_ipt,
            "uncertainty": allocator.exp_avg_unc,
            "pattern": self.pattern,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """From a checkpoint."""
        allocator, device = self.tuner.rankallocator, next(self.tuner.parameters()).device
        allocator.exp_avg_ipt, allocator.exp_avg_unc = (
            {name: tensor.to(device) for name, tensor in saved[key].items()} for key in ("sensitivity", "uncertainty")
        )
        allocator.ipt = dict(allocator.exp_avg_ipt)  # written anew at the next step; that it is there is what counts
        self.pattern = saved["pattern"]

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Reallocate; the gradients of the step are still there."""
        # A pattern in the config would make PEFT prune what it saves, and a pruned checkpoint of an earlier epoch does
        # not fit the model any more. Ranks that are taken away are zeros either way.
        self.config.rank_pattern = self.pattern
        if state.max_steps - self.config.tfinal == 1:  # PEFT takes ranks away at once, by averages that it lacks
            self.tuner.rankallocator.update_ipt(self.tuner.model)
        self.tuner.update_and_allocate(state.global_step + 1)
        self.pattern, self.config.rank_pattern = self.config.rank_pattern, None

    def on_train_end(self, args, state, control, **kwargs):
        """Record the ranks that are left."""
        self.adapted.ranks.update(effective_ranks(cast(Any, self.adapted.model)))
