"""What a run watches while it trains: its time and memory, divergence."""

import contextlib
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from flora.errors import TrainingDiverged
from flora.training import internals
from flora.training.meters import BusyShare, PeakMemory


class StepMeter(TrainerCallback):
    """Training time without evaluation, peak memory and how busy the GPU was.

    Attributes:
        train_seconds, steps: of the whole fit.
        first_steps, first_seconds: of its first quarter, in which workers start and kernels are chosen; 0 before.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.train_seconds = 0.0
        self.steps = 0
        self.first_steps, self.first_seconds = 0, 0.0
        self.peak_memory_bytes = 0
        self._started: float | None = None
        self._on_gpu = on_gpu
        self._memory = PeakMemory(on_gpu)
        self._busy = BusyShare(on_gpu)

    @property
    def gpu_busy_share(self) -> float | None:
        """Share of the training time in which the GPU ran kernels; None where nobody says."""
        return self._busy.read()

    def close(self) -> None:
        """Stop measuring, however training ended."""
        self._busy.stop()

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock and reset the peak."""
        self._memory.reset()
        self._start()

    def on_step_end(self, args, state, control, **kwargs):
        """Read the clock where the first quarter of the steps ends."""
        if state.global_step == max(1, state.max_steps // 4):
            self.first_steps, self.first_seconds = state.global_step, self.train_seconds + self._running()

    def rate(self, batch: int) -> float | None:
        """Examples a second after the first quarter of the steps; None where there are no others."""
        seconds = self.train_seconds - self.first_seconds
        counted = self.steps - self.first_steps
        return counted * batch / seconds if self.first_steps and counted and seconds else None

    def on_train_end(self, args, state, control, **kwargs):
        """Stop the clock and read the peak."""
        self._stop()
        self.steps = state.global_step
        self.peak_memory_bytes = max(self.peak_memory_bytes, self._memory.read())

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; while it is paused or has stopped."""
        peak = max(self.peak_memory_bytes, self._memory.read())
        numbers = {"train_seconds": self.train_seconds, "steps": self.steps, "peak_memory_bytes": peak}
        first = {"first_steps": self.first_steps, "first_seconds": self.first_seconds}
        return numbers | first | {"busy": self._busy.samples}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.train_seconds, self.steps = saved["train_seconds"], saved["steps"]
        self.peak_memory_bytes, self._busy.samples = saved["peak_memory_bytes"], list(saved["busy"])
        self.first_steps, self.first_seconds = saved.get("first_steps", 0), saved.get("first_seconds", 0.0)

    @contextlib.contextmanager
    def pause(self):
        """Keep what happens inside out of the training time."""
        running = self._started is not None
        self._stop()
        try:
            yield
        finally:
            if running:
                self._start()

    def _start(self) -> None:
        self._started = time.perf_counter()
        self._busy.start()

    def _stop(self) -> None:
        self._busy.stop()
        self.train_seconds += self._running()
        self._started = None

    def _running(self) -> float:
        """Seconds since the clock was started, the device's work included; 0 where it stands."""
        if self._started is None:
            return 0.0
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - self._started


class TellEpoch(TrainerCallback):
    """Tells data that is augmented as it is read which epoch of which seed begins."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Before the first batch of an epoch, and of the rest of one."""
        internals.draw_as_anew(train_dataloader)
        if hasattr(train_dataloader.dataset, "begin_epoch"):
            train_dataloader.dataset.begin_epoch(args.seed, int(state.epoch))


class StopOnDivergence(TrainerCallback):
    """Raises TrainingDiverged at the first logged number that is not finite, at the latest at the end.

    So does a training loss above ``LIMIT``: no classifier comes back from there.
    """

    NAMES = {"loss": "training loss", "grad_norm": "norm of the gradients", "train_loss": "mean training loss"}
    LOSSES = ("loss", "train_loss")
    LIMIT = 1e6

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Check what is logged."""
        if (key := self.wrong(logs or {})) is not None:
            name = self.NAMES.get(key) or key.replace("eval_", "validation ")
            raise TrainingDiverged(f"the {name} was {logs[key]} at step {state.global_step}: lower trainer.lr")

    @classmethod
    def wrong(cls, logs: Mapping[str, Any]) -> str | None:
        """The first of the logged numbers that training cannot go on from, None if there is none."""
        for key, value in logs.items():
            if key.startswith("test_") or not isinstance(value, int | float):
                continue  # what a test comes to is looked at where it ends
            if not math.isfinite(value) or (key in cls.LOSSES and value > cls.LIMIT):
                return key
        return None


class ClosingLoss(TrainerCallback):
    """Tells a trainer the mean loss over the last tenth of a fit's steps, however often the loss is logged.

    Args:
        trainer: keeps the sum of the losses before (``loss_before_closing``), and what comes out (``closing_loss``).
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        """Read the sum of the losses where the last tenth begins, and where it ends."""
        steps = max(state.max_steps // 10, 1)
        if state.global_step == state.max_steps - steps:
            self.trainer.loss_before_closing = self.trainer.total_loss()
        if state.global_step == state.max_steps:
            self.trainer.closing_loss = (self.trainer.total_loss() - self.trainer.loss_before_closing) / steps
