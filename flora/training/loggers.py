"""Experiment loggers. W&B writes offline by default; ``wandb sync`` uploads such a run later."""

import os
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

from flora.errors import ConfigError


class Wandb:
    """Weights & Biases, one run per job.

    Args:
        project: W&B project.
        mode: ``offline``, ``online`` or ``disabled``; the environment's WANDB_MODE wins.
        tags: extra tags; task, dataset, model and adapter are added.
    """

    report_to = "wandb"

    def __init__(self, project: str = "flora", mode: str = "offline", tags: list[str] | None = None) -> None:
        if mode not in ("online", "offline", "disabled"):
            raise ConfigError(f"logger.mode must be online, offline or disabled, got {mode!r}")
        self.project = project
        self.mode = mode
        self.tags = tags or []

    @contextmanager
    def run(self, name: str, run_id: str, group: str, tags: list[str], config: dict[str, Any], folder: Path):
        """Open a run around a job and always finish it, so that the next job of a sweep gets its own."""
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        run = wandb.init(
            project=self.project,
            name=name,
            id=run_id,
            group=group,
            tags=[*self.tags, *tags],
            config=config,
            dir=str(folder),
            mode=cast(Literal["online", "offline", "disabled"], os.environ.get("WANDB_MODE", self.mode)),
            resume="allow",
        )
        try:
            yield run.summary
        finally:
            wandb.finish()


class NoLogger:
    """Logs nowhere; the record still holds the history."""

    report_to = "none"

    def run(self, name: str, run_id: str, group: str, tags: list[str], config: dict[str, Any], folder: Path):
        """A context that does nothing; yields a dict in place of W&B's summary."""
        context: AbstractContextManager[dict[str, Any]] = nullcontext({})
        return context
