"""``mode=predict``: what a saved run says of new inputs, written to one file, or to one folder of files for each."""

from __future__ import annotations

import contextlib
import csv
import itertools
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf

from flora.config import instantiate
from flora.contents import IMAGES
from flora.errors import ConfigError
from flora.files import whole_file, whole_folder
from flora.launch import processes
from flora.predict.inputs import Inputs, read
from flora.predict.predictor import Predictor, probabilities
from flora.tasks.base import Predicted
from flora.tasks.images.decode import as_picture, as_rgb
from flora.training.tested import Tested

_TABLES = (".csv", ".parquet")
_FEW = 20  # classes that get a column each
_TOP = 5  # classes that are named where there are more
_AT_ONCE = 1 << 14  # inputs whose outputs are in memory
_MAPS_AT_ONCE = 16  # of those that have a number for each pixel


def predict(tested: Tested) -> Path:
    """Predict what ``input=`` names with a saved run; returns the path of the file, or of the folder.

    It is whole or not there. Rows are in the order of the inputs: what tells an input apart (``path`` or ``row``), then
    ``prediction``, of classes also ``probability`` and a column ``p(NAME)`` for each, or the five likeliest where there
    are more than twenty. What is said of places in images goes to a folder of files (``Task.leave``).

    Raises:
        ConfigError: inputs of another kind than the run's, or a place that cannot be written to.
        DataError: inputs that are missing or unreadable.
    """
    if processes.count() > 1:
        raise ConfigError("mode=predict is for one process: start it without torchrun")
    config: Any = OmegaConf.to_container(tested.cfg, resolve=True)
    leaves_files = instantiate(tested.cfg.task).leaves_files
    place = _place(config.get("output"), tested.folder, () if leaves_files else _TABLES)
    if config.get("input") is None:
        raise ConfigError("mode=predict needs input=, a folder, a file or a text")
    predictor = Predictor(config, tested.folder)
    inputs = read(
        config["input"],
        predictor.spec.kind,
        getattr(predictor.task, "text_columns", ()),
        getattr(predictor.task, "columns", None),
    )
    done = _files(predictor, inputs, place) if leaves_files else _table(predictor, inputs, place)
    whole = len(inputs.values)
    if left_out := whole - done:
        print(f"{left_out} of {whole} inputs cannot be decoded and were left out", file=sys.stderr)
    print(f"predicted {done} of {whole} inputs", file=sys.stderr)
    return place


def _table(predictor: Predictor, inputs: Inputs, place: Path) -> int:
    """Write a row for each input; returns how many."""
    table: dict[str, list[Any]] = {name: [] for name in inputs.columns} | {name: [] for name in _columns(predictor)}
    for numbers, outputs in _predicted(predictor, inputs, _AT_ONCE):
        for name, cells in inputs.columns.items():
            table[name] += [cells[number] for number in numbers]
        for name, cells in _cells(predictor, outputs).items():
            table[name] += cells
    with whole_file(place) as path:
        (_write_parquet if place.suffix.lower() == ".parquet" else _write_csv)(table, path)
    return len(table["prediction"])


def _files(predictor: Predictor, inputs: Inputs, place: Path) -> int:
    """Write files for each input; returns for how many."""
    paths = [str(path) for path in inputs.columns.get("path", [f"row_{n:06}" for n in inputs.columns.get("row", [])])]
    names, done = _names(paths), []

    def predicted() -> Iterator[Predicted]:
        for numbers, outputs in _predicted(predictor, inputs, _MAPS_AT_ONCE):
            for number, row in zip(numbers, outputs, strict=True):
                picture = as_picture(inputs.values[number], number)
                opened = partial(as_rgb, picture.open, picture.name, "stored")
                done.append(number)
                yield Predicted(number, paths[number], names[number], opened, predictor.prediction(row))

    with whole_folder(place, contextlib.nullcontext) as folder:
        predictor.task.leave(predicted(), predictor.class_names, folder)
    return len(done)


def _names(paths: Sequence[str]) -> list[str]:
    """Names of files without suffix: paths below the folder that all share; with the suffix where two would be one."""
    places = [PurePath(path) for path in paths]
    folder = PurePath(os.path.commonpath([str(place.parent) for place in places]))
    names = [place.relative_to(folder).with_suffix("").as_posix() for place in places]
    twice = {name for name, count in Counter(names).items() if count > 1}
    return [p.relative_to(folder).as_posix() if name in twice else name for p, name in zip(places, names, strict=True)]


def _place(output: str | None, adapter: Path, suffixes: Sequence[str]) -> Path:
    """Where predictions go, which can be written to: a file with one of the suffixes, or without these a folder."""
    folder = adapter.parent if adapter.name == "adapter" else adapter
    place = Path(output).expanduser() if output else _free(folder / f"predictions{suffixes[0] if suffixes else ''}")
    if suffixes and place.suffix.lower() not in suffixes:
        raise ConfigError(f"output={place} must end in {' or '.join(suffixes)}")
    if not suffixes and place.suffix.lower() in (*_TABLES, ".json", *IMAGES):
        raise ConfigError(f"output={place}: this run writes a folder of files: name one")
    if not suffixes and os.path.lexists(place):
        raise ConfigError(f"output={place} is there already: name a new folder")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        tempfile.TemporaryFile(dir=place.parent).close()
    except OSError as error:
        what = "file" if suffixes else "folder"
        raise ConfigError(f"output={place} cannot be written ({error.strerror}): choose another {what}") from error
    return place


def _free(place: Path) -> Path:
    """The place, or the first of NAME-2, NAME-3, ... where that holds earlier predictions."""
    numbered = (place.with_stem(f"{place.stem}-{number}") for number in itertools.count(2))
    return next(p for p in itertools.chain([place], numbered) if not os.path.lexists(p))


def _predicted(predictor: Predictor, inputs: Inputs, each: int) -> Iterator[tuple[list[int], np.ndarray]]:
    """Numbers of inputs and their outputs, some at a time."""
    for start in range(0, len(inputs.values), each):
        kept, outputs = predictor.outputs(inputs.values[start : start + each])
        yield [start + number for number in kept], outputs


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
