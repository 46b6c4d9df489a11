"""What `debug=overfit` and `debug=profile` watch while a run trains."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import TrainerCallback

from flora.errors import ConfigError

_WAIT, _WARMUP, _ACTIVE = 2, 1, 5  # steps before and under the profiler


class Overfit(TrainerCallback):
    """Says at the end whether the loss on the one batch fell to less than half."""

    def on_train_end(self, args, state, control, **kwargs):
        """Compare the first and the last loss."""
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if not losses:
            return
        fell = losses[-1] < losses[0] / 2
        said = "it fell" if fell else "it did not fall to half: look at trainer.lr, the labels and what is trained"
        print(
            f"overfit: loss {losses[0]:.4f} to {losses[-1]:.4f} in {state.global_step} steps: {said}", file=sys.stderr
        )


class Profile(TrainerCallback):
    """A few steps under torch's profiler: a table on stderr and ``trace.json`` for a browser's tracing page.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "trace.json"
        self._profile: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Start."""
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        steps = schedule(wait=_WAIT, warmup=_WARMUP, active=_ACTIVE, repeat=1)
        self._profile = profile(activities=activities, schedule=steps, on_trace_ready=self._tell)
        self._profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        """Count a step."""
        self._profile.step()

    def on_train_end(self, args, state, control, **kwargs):
        """Stop; a run that is too short for the steps that are watched says so."""
        if state.global_step < _WAIT + _WARMUP + _ACTIVE:
            print(
                f"profile: {_WAIT + _WARMUP + _ACTIVE} steps are needed, this run had {state.global_step}",
                file=sys.stderr,
            )
        self._profile.stop()

    def _tell(self, watched: Any) -> None:
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        print(watched.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=60), file=sys.stderr)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        watched.export_chrome_trace(str(self.path))
        print(f"profile: {self.path} (open it in chrome://tracing or ui.perfetto.dev)", file=sys.stderr)


def watching(what: str | None, folder: Path) -> list[TrainerCallback]:
    """The callbacks of a preset: ``overfit``, ``profile`` or None; ConfigError for any other."""
    if what not in (None, "overfit", "profile"):
        raise ConfigError(f"debug.watch must be overfit, profile or null, got {what!r}")
    return [] if what is None else [Overfit() if what == "overfit" else Profile(folder)]
