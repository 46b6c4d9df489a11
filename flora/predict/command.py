"""``mode=predict``: what a saved run says of new inputs, written to one file."""

from __future__ import annotations

import csv
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf

from flora.errors import ConfigError
from flora.files import whole_file
from flora.launch import processes
from flora.predict.inputs import Inputs, read
from flora.predict.predictor import Predictor, probabilities
from flora.training.tested import Tested

_FEW = 20  # classes that get a column each
_TOP = 5  # classes that are named where there are more
_AT_ONCE = 1 << 14  # inputs whose outputs are in memory


def predict(tested: Tested) -> Path:
    """Predict what ``input=`` names with a saved run; returns the path of the file.

    It is whole or not there. Rows are in the order of the inputs: what tells an input apart (``path`` or ``row``), then
    ``prediction``, of classes also ``probability`` and a column ``p(NAME)`` for each, or the five likeliest where there
    are more than twenty.

    Raises:
        ConfigError: inputs of another kind than the run's, or a place that cannot be written to.
        DataError: inputs that are missing or unreadable.
    """
    if processes.count() > 1:
        raise ConfigError("mode=predict is for one process: start it without torchrun")
    config: Any = OmegaConf.to_container(tested.cfg, resolve=True)
    place = _place(config.get("output"), tested.folder)
    if config.get("input") is None:
        raise ConfigError("mode=predict needs input=, a folder, a file or a text")
    predictor = Predictor(config, tested.folder)
    inputs = read(
        config["input"],
        predictor.spec.kind,
        getattr(predictor.task, "text_columns", ()),
        getattr(predictor.task, "columns", None),
    )
    table: dict[str, list[Any]] = {name: [] for name in inputs.columns} | {name: [] for name in _columns(predictor)}
    for numbers, rows in _predicted(predictor, inputs):
        for name, cells in inputs.columns.items():
            table[name] += [cells[number] for number in numbers]
        for name, cells in rows.items():
            table[name] += cells
    whole = len(inputs.values)
    if left_out := whole - len(table["prediction"]):
        print(f"{left_out} of {whole} inputs cannot be decoded and were left out", file=sys.stderr)
    with whole_file(place) as path:
        (_write_parquet if place.suffix.lower() == ".parquet" else _write_csv)(table, path)
    print(f"predicted {whole - left_out} of {whole} inputs", file=sys.stderr)
    return place


def _place(output: str | None, adapter: Path) -> Path:
    """Where predictions go, which can be written to."""
    folder = adapter.parent if adapter.name == "adapter" else adapter
    place = Path(output).expanduser() if output else _free(folder / "predictions.csv")
    if place.suffix.lower() not in (".csv", ".parquet"):
        raise ConfigError(f"output={place} must end in .csv or .parquet")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        tempfile.TemporaryFile(dir=place.parent).close()
    except OSError as error:
        raise ConfigError(f"output={place} cannot be written ({error.strerror}): choose another file") from error
    return place


def _free(place: Path) -> Path:
    """The place, or the first of NAME-2, NAME-3, ... where that holds earlier predictions."""
    numbered = (place.with_stem(f"{place.stem}-{number}") for number in itertools.count(2))
    return next(p for p in itertools.chain([place], numbered) if not os.path.lexists(p))


def _predicted(predictor: Predictor, inputs: Inputs) -> Iterator[tuple[list[int], dict[str, list[Any]]]]:
    """Parts of the table: numbers of inputs, and their cells by column."""
    for start in range(0, len(inputs.values), _AT_ONCE):
        kept, outputs = predictor.outputs(inputs.values[start : start + _AT_ONCE])
        yield [start + number for number in kept], _cells(predictor, outputs)


def _columns(predictor: Predictor) -> list[str]:
    names = predictor.class_names
    if predictor.num_classes < 2:
        return ["prediction"]
    if len(names) <= _FEW:
        return ["prediction", "probability", *(f"p({name})" for name in names)]
    return ["prediction", "probability", *(f"{what} {n}" for n in range(2, _TOP + 1) for what in ("class", "p"))]


def _cells(predictor: Predictor, outputs: np.ndarray) -> dict[str, list[Any]]:
    if predictor.num_classes == 0:
        return {"prediction": [predictor.task.written(predictor.spec, row) for row in outputs]}
    if predictor.num_classes == 1:
        return {"prediction": outputs.reshape(-1).tolist()}
    names, shares = np.array(predictor.class_names, object), probabilities(outputs)
    order = np.argsort(-outputs, axis=1, kind="stable")
    best = np.take_along_axis(shares, order, axis=1)
    cells = [names[order[:, 0]], best[:, 0]]
    if len(names) <= _FEW:
        cells += list(shares.T)
    else:
        cells += [column for n in range(1, _TOP) for column in (names[order[:, n]], best[:, n])]
    return dict(zip(_columns(predictor), (column.tolist() for column in cells), strict=True))


def _write_csv(table: dict[str, list[Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(table)
        lines.writerows(zip(*table.values(), strict=True))


def _write_parquet(table: dict[str, list[Any]], path: Path) -> None:
    pq.write_table(pa.table(table), path)
