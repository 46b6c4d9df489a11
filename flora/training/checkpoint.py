"""What a finished run left to be tested again: where it lies, what it says of itself, what identifies it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from flora.errors import ConfigError
from flora.files import write_json
from flora.results import Record


def saved_run(checkpoint: str | None) -> Path:
    """The adapter folder that `checkpoint=DIR` means: DIR itself or DIR/adapter."""
    if not checkpoint:
        raise ConfigError("mode=eval needs checkpoint=DIR, the folder of a finished run")
    for folder in (Path(checkpoint), Path(checkpoint) / "adapter"):
        if (folder / "adapter_model.safetensors").exists() or (folder / "model.safetensors").exists():
            return folder
    raise ConfigError(f"checkpoint={checkpoint}: no adapter_model.safetensors or model.safetensors there")


def save_facts(record: Record, num_classes: int, folder: Path) -> None:
    """Write what ``saved_facts`` reads, beside the weights in ``folder``."""
    keys = ("run_id", "task", "dataset", "model", "adapter", "metric", "value")
    write_json(folder / "run.json", {key: getattr(record, key) for key in keys} | {"num_classes": num_classes})


def saved_facts(checkpoint: Path) -> dict[str, Any]:
    """What the training run wrote beside its weights; empty for an adapter from elsewhere."""
    path = checkpoint / "run.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): delete it or save the adapter again") from error


def check_same_model(checkpoint: Path, model: str) -> None:
    """Refuse a checkpoint of another model by name, before its shapes fail to fit."""
    trained = saved_facts(checkpoint).get("model", model)
    if trained != model:
        raise ConfigError(f"checkpoint={checkpoint} was trained on model={trained}, not {model}: pass model={trained}")


def digest(folder: Path) -> str:
    """Sha256 over the saved weights: the identity of a checkpoint, wherever it lies."""
    weights = sorted(folder.glob("*model.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
