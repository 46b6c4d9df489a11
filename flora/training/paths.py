"""Where a run's data, output and records lie; known before anything heavy is imported."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from flora.errors import ConfigError
from flora.files import saved_weights

CHECKPOINTS = "checkpoints"  # their folder in a run's folder


@dataclass(frozen=True)
class Paths:
    """Where things live; relative paths start at the working directory.

    Attributes:
        data: dataset folders, ``DATASET/{train*,validation,test}.parquet``.
        output: adapters, checkpoints and logs, one folder per run id.
        results: records, one JSON file per run.
    """

    data: str
    output: str
    results: str

    def __post_init__(self) -> None:
        for key in ("data", "output", "results"):
            if not isinstance(getattr(self, key), str) or not getattr(self, key):
                raise ConfigError(f"paths.{key} must be a folder, got {getattr(self, key)!r}")

    def prepare(self, run: str) -> Path:
        """Make the run's output folder and the results folder; ConfigError when one cannot be written."""
        for key, folder in (("output", Path(self.output) / run), ("results", Path(self.results))):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".write-test-{os.getpid()}"
                probe.touch()
                probe.unlink()
            except OSError as error:
                reason = error.strerror or error
                raise ConfigError(
                    f"paths.{key}: cannot write to {folder} ({reason}); choose another folder with paths.{key}=DIR"
                ) from error
        return Path(self.output) / run


def saved_run(checkpoint: str | None) -> Path:
    """The adapter folder that `checkpoint=DIR` means: DIR itself or DIR/adapter."""
    if not checkpoint:
        raise ConfigError("mode=eval needs checkpoint=DIR, the folder of a finished run")
    if (weights := saved_weights(Path(checkpoint))) is None:
        raise ConfigError(f"checkpoint={checkpoint}: no adapter_model.safetensors or model.safetensors there")
    return weights.parent


def digest(folder: Path) -> str:
    """Sha256 over the saved weights: the identity of a checkpoint, wherever it lies."""
    weights = sorted(folder.glob("*model.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
