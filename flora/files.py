"""Files that are whole or not there, where a run's weights lie, and where the checkout is."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flora.errors import CheckpointError
from flora.launch import preemption
from flora.secrets import without_secrets

ROOT = Path(__file__).resolve().parents[1]  # of the checkout: configs/, experiments/ and results/ lie there
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors")


def cache_dir() -> Path:
    """The folder of what was downloaded or computed once: ``FLORA_CACHE``, by default ``~/.cache/flora``."""
    return Path(os.environ.get("FLORA_CACHE") or Path.home() / ".cache" / "flora").expanduser()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON (NaN refused, no secrets) to a temporary neighbour, sync it to disk, then rename it into place."""
    text = json.dumps(without_secrets(content), indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ValueError: it holds something else.
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a file")
    try:
        content = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("too deeply nested") from error
    if not isinstance(content, dict):
        raise ValueError(f"a JSON object was expected, not {type(content).__name__}")
    return content


def saved_weights(run: Path) -> Path | None:
    """The file of weights in a finished run's folder, or in one of its adapter alone; None if there is none."""
    places = (folder / name for folder in (run, run / "adapter") for name in _WEIGHTS)
    return next((path for path in places if path.is_file()), None)


def unlike(names: Collection[str], expected: Collection[str]) -> str | None:
    """How the names of saved tensors differ from those expected, for a message; None where they do not."""
    missing, added = sorted({*expected} - {*names}), sorted({*names} - {*expected})
    if not (missing or added):
        return None
    which, of = ("lacks", missing) if missing else ("has", added)
    return f"{which} {len(of)} tensors{'' if missing else ' too many'} ({of[0]}{', ...' if len(of) > 1 else ''})"


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary neighbour to fill, which takes the place of ``path`` when all is written.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        with preemption.held():  # between the two there is neither the old nor the new
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be written ({reason}): make room and start the run again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
