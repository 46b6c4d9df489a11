"""The files of commonsense datasets: parquet, LLM-Adapters' JSON, and its training mix of all eight."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from flora.errors import DataError, WeightsError, first_line
from flora.models.weights import reach_hub, sha256_of
from flora.tasks import manifest
from flora.tasks.commonsense.questions import DatasetInfo, Question, Row, adapters_row, with_passage
from flora.tasks.text.rows import read_table, row_of

MIX = "commonsense_170k.json"


def read_folder(
    folder: Path, info: DatasetInfo, split: str, passage: bool = False
) -> tuple[list[Question], dict[str, Any]]:
    """A split, from parquet files, or from LLM-Adapters' JSON, where the reported split is called test."""
    paths = tables(folder, split)
    ask = adapters_row if paths[0].suffix == ".json" else with_passage if passage else info.ask
    manifest.check(folder, paths)
    return ask_all(paths, ask)


def tables(folder: Path, split: str) -> list[Path]:
    """The files of a split; DataError where there are none."""
    if paths := sorted([*folder.glob(f"{split}*.parquet"), *folder.glob(f"{split}/*.parquet")]):
        return paths
    path = folder / f"{'train' if split == 'train' else 'test'}.json"
    if not path.is_file():
        raise DataError(f"{folder}: neither {split}*.parquet nor {path.name}; fetch the dataset again")
    return [path]


def read_mix(data_dir: Path | None) -> tuple[list[Question], dict[str, Any]]:
    """LLM-Adapters' training mix, and facts of its file."""
    return ask_all([mix(data_dir)], adapters_row)


def mix(data_dir: Path | None) -> Path:
    """The file of LLM-Adapters' training mix; DataError where there is none."""
    path = Path(data_dir or "") / MIX
    if not path.is_file():
        raise DataError(f"task.train=mix: there is no {path}; fetch it from the repository of LLM-Adapters")
    return path


def from_hub(info: DatasetInfo) -> Path:
    """The folder of the hub's cache with the dataset's files; DataError where they cannot be had."""
    repository, configuration = info.hub
    options: dict[str, Any] = {
        "repo_type": "dataset",
        "revision": "refs/convert/parquet",
        "allow_patterns": f"{configuration}/*",
    }
    try:
        reach_hub()
        return Path(huggingface_hub.snapshot_download(repository, **options)) / configuration
    except (WeightsError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(f"hub {repository}: {first_line(error)}") from error


class _Row(dict[str, Any]):
    """A row whose empty cells are errors."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if value is None:
            raise ValueError(f"column {key} is empty")
        return value


def ask_all(paths: Sequence[Path], ask: Callable[[Row], Question]) -> tuple[list[Question], dict[str, Any]]:
    """Every row of the files as a question, and rows and sha256 of each file."""
    questions: list[Question] = []
    facts: dict[str, Any] = {}
    for path in paths:
        rows = _read(path)
        for number, row in enumerate(rows):
            try:
                questions.append(ask(_Row(row)))
            except KeyError as error:
                raise DataError(f"{path}: no column {error.args[0]} (it has {', '.join(row)})") from error
            except (ValueError, TypeError) as error:
                raise DataError(f"{row_of(path, number)}: {first_line(error)}; mend the file") from error
        facts[path.name] = {"rows": len(rows), "sha256": sha256_of(path)}
    if not questions:
        raise DataError(f"{paths[0]}: no rows; fetch the file again")
    return questions, facts


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError("not a list of questions")
            return rows
        return read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)}); fetch it again") from error
