"""A fit's state between two steps: taken for a checkpoint, and put back so that the next step is as it would have been.

transformers counts epochs and steps and skips the batches that were seen; what it would pickle is kept here.
"""

import dataclasses
import json
import random
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from flora.errors import CheckpointError, ConfigError, TrainingDiverged
from flora.launch import preemption, processes
from flora.training.callbacks import StopOnDivergence
from flora.training.progress import Fit, Progress
from flora.training.settings import LOSS
from flora.training.sharding import like, local, reshard, whole


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies, on the CPU, of what training changes: trained parameters and the buffers of the state dict.

    Of a model in shards they are whole; all processes must ask.
    """
    return {name: whole(tensor.detach()).to("cpu", copy=True) for name, tensor in _changing(model).items()}


def load_weights(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Put back what ``weights`` gave; ConfigError where the model is another."""
    try:
        with torch.no_grad():
            for name, tensor in _changing(model).items():
                tensor.copy_(like(saved[name], tensor))
    except (KeyError, RuntimeError) as error:
        raise ConfigError(f"the checkpoint is of another model ({error}): trainer.resume=false starts over") from error


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict, whole where parameters are in shards; all processes must ask."""
    state = optimizer.state_dict()
    gathered = {i: {name: whole(value) for name, value in own.items()} for i, own in state["state"].items()}
    return state | {"state": gathered}


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Put back what ``optimizer_state`` gave."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {i: {name: like(value, parameters[i]) for name, value in own.items()} for i, own in saved["state"].items()}
    optimizer.load_state_dict(saved | {"state": state})


def _changing(model: nn.Module) -> dict[str, Tensor]:
    reshard(model)
    kept = model.state_dict().keys()
    trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def rng_state(cuda: bool) -> dict[str, Any]:
    """The state of every random number generator that training draws from."""
    numpy = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": numpy | {"state": numpy["state"] | {"key": torch.from_numpy(numpy["state"]["key"].astype(np.int64))}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if cuda else None,
    }


def set_rng_state(saved: dict[str, Any], cuda: bool) -> None:
    """Put back what ``rng_state`` gave; a GPU that has taken over from a CPU keeps its seed."""
    random.setstate(saved["python"])
    state = saved["numpy"]["state"]
    np.random.set_state(saved["numpy"] | {"state": state | {"key": state["key"].numpy().astype(np.uint32)}})
    torch.set_rng_state(saved["torch"])
    if cuda and saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"])


def worth(metric: str, value: float | None) -> float:
    """What to choose the greatest of: a metric's value, or the loss with its sign turned; None is worth least."""
    if value is None:
        return -float("inf")
    return -value if metric == LOSS else value


class KeepBest(TrainerCallback):
    """Keeps the weights of the best evaluation on validation in memory, and puts them back when training ends.

    Args:
        model: whose weights; while it is evaluated it may hold averages of them.
        metric: the higher the better, or the loss.
    """

    def __init__(self, model: nn.Module, metric: str) -> None:
        self.model, self.metric = model, f"eval_{metric}"
        self.value, self.best = -float("inf"), dict[str, Tensor]()
        self.step = 0

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Take the weights of a new best."""
        value = worth(self.metric.removeprefix("eval_"), (metrics or {}).get(self.metric))
        if value > self.value:
            self.value, self.best, self.step = value, weights(self.model), state.global_step

    def on_train_end(self, args, state, control, **kwargs):
        """Put the best weights back, and say so."""
        if self.best:
            load_weights(self.model, self.best)
            if self.step < state.global_step and processes.first():
                name = self.metric.removeprefix("eval_")
                best = abs(self.value) if name == LOSS else self.value
                what = f"where validation {name} was first best, {best:.4g}; protocol.select=last keeps the last"
                print(f"kept the weights of step {self.step} of {state.global_step}, {what}", file=sys.stderr)
        self.best = {}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"value": float(self.value), "best": self.best, "step": self.step}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.value, self.best, self.step = saved["value"], saved["best"], saved.get("step", 0)


class Keeper(TrainerCallback):
    """Writes a checkpoint where one is due or a signal asks for it, and goes on from one; the last callback of a fit.

    It writes before a step or before an epoch, never after: what follows a step (its log, its evaluation) is then done.
    Callbacks with ``state_dict`` and ``load_state_dict`` are part of the state.

    Args:
        trainer: of the fit.
        progress: of the run.
        label: names the fit.
    """

    def __init__(self, trainer: Any, progress: Progress, label: str) -> None:
        self.trainer, self.progress, self.label = trainer, progress, label
        self.saved: dict[str, Any] | None = None
        self._order: Tensor | None = None  # the sampler's state when the epoch began
        self._epoch_began = 0

    def train(self) -> None:
        """Train the trainer's model from the start, or from the checkpoint of an earlier process."""
        checkpoint = self.progress.resumable(self.label)
        if checkpoint is None:
            self.trainer.train()
            return
        path, self.saved = checkpoint
        self.progress.unfinished = None
        print(f"{self.label}: going on from checkpoint {path}", file=sys.stderr)
        self.trainer.go_on(path, self.saved)

    def on_train_begin(self, args, state, control, **kwargs):
        """Put back what the other callbacks and transformers have just reset."""
        if self.saved is None:
            return
        if state.global_step != (step := self.saved.get("step", state.global_step)):
            raise CheckpointError(
                f"the checkpoint of step {step} changed while it was read (it says step {state.global_step} now): "
                "start the run again to go on"
            )
        for callback, saved in zip(self._stateful(), self.saved["callbacks"], strict=True):
            callback.load_state_dict(saved)
        trainer = self.trainer
        trainer.restore_loss_sums(self.saved["loss"])
        trainer.seconds_before, trainer.resumed_at = self.saved["seconds"], [*self.saved["resumed"], state.global_step]
        self.saved = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Between two epochs."""
        self._order, self._epoch_began = self.trainer.order_state, state.global_step
        self._maybe_write(state)

    def on_step_begin(self, args, state, control, **kwargs):
        """Between two steps of an epoch."""
        if state.global_step > self._epoch_began:
            self._maybe_write(state)

    def _maybe_write(self, state: Any) -> None:
        new = state.global_step > (self.trainer.resumed_at or [0])[-1]
        stop, due = processes.anywhere(preemption.wanted(), processes.first() and self.progress.due(state.global_step))
        if new and (stop or due):
            with self.trainer.meter.pause():
                self._check_finite(state)
                self.progress.write(self._state(state.global_step), facts(state))
        preemption.check(stop)

    def _check_finite(self, state: Any) -> None:
        finite = [torch.isfinite(local(p)).all() for p in [self.trainer.running_loss, *self.trainer.trained]]
        if any(processes.anywhere(*(not bool(flag) for flag in finite))):
            raise TrainingDiverged(f"the loss or a weight was not finite at step {state.global_step}: lower trainer.lr")

    def _state(self, step: int) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "label": self.label,
            "step": step,
            "weights": weights(trainer.model),
            "optimizer": optimizer_state(trainer.optimizer),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": trainer.scaler_state,
            "rng": processes.collected(rng_state(trainer.on_gpu)),
            "order": self._order,
            "callbacks": [callback.state_dict() for callback in self._stateful()],
            "loss": trainer.loss_sums(),
            "seconds": trainer.seconds,
            "resumed": trainer.resumed_at,
        }

    def _stateful(self) -> list[Any]:
        return [c for c in self.trainer.callback_handler.callbacks if hasattr(c, "load_state_dict")]


def facts(state: Any) -> str:
    """transformers' state as it writes it."""
    return json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True) + "\n"


def finished(trainer: Any, keep_weights: bool) -> Fit:
    """What a run remembers of a fit that is done."""
    take = (lambda: weights(trainer.model)) if keep_weights else None
    meters = trainer.meter.state_dict() | {"execution": trainer.execution, "closing_loss": trainer.closing_loss}
    return Fit(json.loads(facts(trainer.state)), meters, take)


def lost(trainer: Any, reason: str) -> Fit:
    """What a run remembers of a fit that diverged; its history is what was logged before."""
    state = json.loads(facts(trainer.state))
    sound = [row for row in state["log_history"] if StopOnDivergence.wrong(row) is None]
    return Fit(state | {"log_history": sound}, {}, None, reason)
