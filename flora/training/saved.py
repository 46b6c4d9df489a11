"""What a finished run has saved: where its adapter lies, what it says of itself, what identifies it."""

import hashlib
from pathlib import Path
from typing import Any

from flora.errors import ConfigError
from flora.files import read_object, saved_weights, write_json
from flora.results.record import Record


def adapter_folder(run: str | None) -> Path:
    """The adapter folder that `checkpoint=DIR` of mode=eval means: DIR itself or DIR/adapter."""
    if not run:
        raise ConfigError("mode=eval needs checkpoint=DIR, the folder of a finished run")
    if (weights := saved_weights(Path(run))) is None:
        raise ConfigError(f"checkpoint={run}: no adapter_model.safetensors or model.safetensors there")
    return weights.parent


def write_facts(record: Record, num_classes: int, folder: Path) -> None:
    """Write what ``facts`` reads, beside the weights in ``folder``."""
    keys = ("run_id", "task", "dataset", "model", "adapter", "metric", "value")
    write_json(folder / "run.json", {key: getattr(record, key) for key in keys} | {"num_classes": num_classes})


def facts(folder: Path) -> dict[str, Any]:
    """What the training run wrote beside its weights; empty for an adapter from elsewhere."""
    path = folder / "run.json"
    try:
        return read_object(path) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): delete it or save the adapter again") from error


def check_same_model(folder: Path, model: str) -> None:
    """Refuse an adapter of another model by name, before its shapes fail to fit."""
    trained = facts(folder).get("model", model)
    if trained != model:
        raise ConfigError(f"checkpoint={folder} was trained on model={trained}, not {model}: pass model={trained}")


def digest(folder: Path) -> str:
    """Sha256 over the saved weights: the identity of an adapter, wherever it lies."""
    weights = sorted(folder.glob("*model.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
