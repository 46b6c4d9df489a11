"""What a finished run has saved: where its adapter lies, what it says of itself, what identifies it."""

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from flora.config import recorded_cell
from flora.errors import ConfigError
from flora.files import read_object, saved_weights, unlike, write_json
from flora.results.record import Record


def adapter_folder(run: str | None, mode: str = "eval") -> Path:
    """The adapter folder that `checkpoint=DIR` means: DIR itself or DIR/adapter; ``mode`` is for the message."""
    if not run:
        raise ConfigError(f"mode={mode} needs checkpoint=DIR, the folder of a finished run")
    if (weights := saved_weights(Path(run))) is None:
        raise ConfigError(f"checkpoint={run}: no adapter_model.safetensors or model.safetensors there")
    return weights.parent


def write_facts(record: Record, folder: Path, **more: Any) -> None:
    """Write what ``facts`` reads, beside the weights in ``folder``.

    Args:
        record: of the run.
        folder: of the weights.
        **more: what else is needed to build the network again and to name what it says, its config first.
    """
    keys = ("run_id", "task", "dataset", "model", "adapter", "metric", "value")
    said = {key: getattr(record, key) for key in keys} | more | {"cell_id": recorded_cell(record.config)}
    write_json(folder / "run.json", said | {"tensors": _tensors(folder)})


def written(names: Sequence[str]) -> list[str]:
    """Names of classes as a file can hold them: what is no character becomes a question mark."""
    return [str(name).encode(errors="replace").decode() for name in names]


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


def check_method(folder: Path, method: Any) -> None:
    """Refuse weights that are no adapter of PEFT's where neither run.json nor the command says what they are of.

    Of a full fine-tune only the head may be left, which alone is what a linear probe saves.
    """
    known = (folder / "adapter_config.json").exists() or "adapter" in facts(folder)
    if not known and hasattr(method, "config_class"):
        raise ConfigError(
            f"checkpoint={folder} has no run.json that says how it was trained: copy the whole folder again, or say it "
            "with adapter=full or adapter=linear_probe"
        )


def digest(folder: Path) -> str:
    """Sha256 over what identifies saved weights, wherever they lie.

    Those are the weights, their config, and the model and method that ``facts`` names.
    """
    said = facts(folder)
    whole = hashlib.sha256(json.dumps([said.get("model"), said.get("adapter")]).encode())
    for path in [*sorted(folder.glob("*model.safetensors")), folder / "adapter_config.json"]:
        if path.is_file():
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256")
            whole.update(path.name.encode() + b"\0" + content.digest())
    return whole.hexdigest()


def check_whole(folder: Path, names: Collection[str], method: str | None = None) -> None:
    """Refuse saved weights of which some have been taken away, or to which some were added, since a run saved them.

    Args:
        folder: of the weights.
        names: of all tensors of the model, which a full fine-tune saves.
        method: that trained them, where run.json does not say.

    Raises:
        ConfigError: tensors are missing or unexpected.
    """
    said = facts(folder)
    expected = said.get("tensors") or (names if said.get("adapter", method) == "full" else None)
    if said.get("tensors") and not (isinstance(expected, list) and all(isinstance(name, str) for name in expected)):
        raise ConfigError(f"checkpoint={folder}: run.json lists no names of tensors: copy the whole folder again")
    if expected is not None and (wrong := unlike(_tensors(folder), expected)):
        raise ConfigError(f"checkpoint={folder} {wrong}: copy the whole folder again, or train again")


def _tensors(folder: Path) -> list[str]:
    weights = saved_weights(folder)
    assert weights is not None
    with safe_open(weights, framework="numpy") as file:
        return list(file.keys())
