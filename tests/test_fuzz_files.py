"""Damaged files, by seed: each is refused or read right, never in between."""

import io
import json
import math
import os
import random
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from flora.errors import DataError, FloraError
from flora.methods import Peft
from flora.methods.base import load as load_adapter
from flora.results import Store
from flora.tasks.images.decode import decode
from flora.tasks.images.parquet import open_pool, read_class_names
from tests.mutations import damaged
from tests.results.test_store import record

# As many of each kind as FLORA_MUTATIONS asks of all the inputs of tests/test_mutations.py, which run whole commands.
SEEDS = range(max(25, int(os.environ.get("FLORA_MUTATIONS", 0)) // 3))


def png(value):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 99, 0)).save(stream, "PNG")
    return stream.getvalue()


def parquet_bytes(chance=None):
    """Eight images of two classes; with ``chance`` whole parquet with columns that are not what they say."""
    images = [{"bytes": png(10 * row), "path": f"{row}.png"} for row in range(8)]
    columns = {"image": pa.array(images), "label": pa.array([row % 2 for row in range(8)], pa.int64())}
    if chance is not None:
        wrong = chance.choice(
            [
                {"image": columns["label"], "label": columns["image"]},
                {"image": columns["image"]},
                {"label": pa.array([0.5] * 8)},
                {"label": pa.array(["0"] * 8)},
                {"label": pa.array([None] * 8, pa.int64())},
                {"label": pa.array([2**63] * 8, pa.uint64())},
                {"label": pa.array([-(2**63)] * 8, pa.int64())},
                {"label": pa.array([[0]] * 8)},
                {"image": pa.array([{"bytes": 1}] * 8)},
                {"image": pa.array([{"bytes": "text"}] * 8)},
                {"image": pa.array([None] * 8, columns["image"].type)},
                {"image": pa.array([{"bytes": None, "path": "../../secret.png"}] * 8, columns["image"].type)},
                {"image": pa.array([{"bytes": None, "path": "/etc/passwd"}] * 8, columns["image"].type)},
                {"image": pa.array([{"path": "x"}] * 8)},
                {"image": pa.array([b"x"] * 8)},
            ]
        )
        columns = wrong if len(wrong) == 1 and "image" in wrong and len(columns) == 1 else columns | wrong
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


def read_parquet(folder, content):
    """The images and labels of a folder whose training file has this content."""
    place = folder / "set"
    place.mkdir(exist_ok=True)
    (place / "train.parquet").write_bytes(content)
    names = read_class_names([place / "train.parquet"], 2)
    pool, _ = open_pool([place / "train.parquet"], names)
    images, _ = decode(pool, np.arange(len(pool)), image_size=8, interpolation="bicubic", unreadable="error")
    return images


def parquet_complaint(chance, folder):
    swapped = chance.random() < 0.3
    content = parquet_bytes(chance) if swapped else damaged(parquet_bytes(), chance)
    try:
        images = read_parquet(folder, content)
    except DataError as error:
        return None if error.args[0] and "\n" not in str(error) else f"not one line: {error}"
    # What a checksum would notice is left to manifest.check; here: whole images with labels of the classes.
    sound = images.images.shape[1:] == (3, 8, 8) and set(images.labels.tolist()) <= {0, 1}
    return None if sound else f"{list(images.images.shape)} {images.labels.tolist()}"


def record_complaint(chance, folder):
    store = Store(folder / "records")
    made = record("abc")
    path = store.write(made)
    whole = json.loads(path.read_text())
    if chance.random() < 0.5:
        path.write_bytes(damaged(path.read_bytes(), chance))
    else:
        key = chance.choice(list(whole))
        value = chance.choice([None, True, [], {}, "x", -1, 1e400, {"a": "b"}, [1], "finished", "../../escape"])
        path.write_text(json.dumps(whole | {key: value}))
    contents, read = store.read_all(), store.finished(made.run_id)
    summary = contents.finished(made.run_id)
    if (read is None) != (summary is None):
        return "the two ways to read it disagree"
    if read is None:
        return None if contents.problems or contents.records else "it vanished without a word"
    sound = type(read["value"]) in (int, float) and math.isfinite(read["value"]) and read["run_id"] == made.run_id
    return None if sound else f"finished with {read['value']!r}"


@cache
def saved_adapter():
    """The files of a small adapter, by name."""
    with tempfile.TemporaryDirectory() as name:
        method = Peft("lora", "peft.LoraConfig", target_modules=["0"], r=2)
        method.save(method.apply(network(), ["1"]).model, Path(name))
        return {path.name: path.read_bytes() for path in Path(name).iterdir() if path.suffix != ".md"}


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))


def adapter_complaint(chance, folder):
    place, files = folder / "adapter", dict(saved_adapter())
    place.mkdir(exist_ok=True)
    name = chance.choice(sorted(files))
    if name.endswith(".safetensors") and chance.random() < 0.4:
        tensors = load(files[name])
        key = chance.choice(sorted(tensors))
        tensors[key] = chance.choice(
            [tensors[key].T.contiguous(), tensors[key].double(), tensors[key].long(), tensors[key][:1].clone()]
        )
        files[name] = save(tensors, {"format": "pt"})
    else:
        files[name] = damaged(files[name], chance)
    for file, content in files.items():
        (place / file).write_bytes(content)
    try:
        adapted = load_adapter(network(), ["1"], place)
    except (ValueError, KeyError, FloraError):
        return None  # Run.evaluate makes one line of it
    if any(not tensor.is_floating_point() for tensor in load(files["adapter_model.safetensors"]).values()):
        return "tensors that are no floats were taken for some"
    logits = adapted.model(torch.ones(1, 4))
    return None if logits.shape == (1, 2) else f"logits {list(logits.shape)}"


KINDS = {"parquet": parquet_complaint, "record": record_complaint, "adapter": adapter_complaint}


def check_files(kind, seeds, folder):
    complaints = []
    for seed in seeds:
        try:
            complaint = KINDS[kind](random.Random(seed), folder)
        except Exception as error:
            complaint = f"{type(error).__name__}: {error!s:.200}"
        complaints += [f"seed {seed}: {complaint}"] if complaint else []
    assert complaints == []


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_or_read_right(kind, sandbox):
    check_files(kind, SEEDS, sandbox / "work")
