"""Hostile input, by seed: a config or a file that is wrong ends in one line or in a right record, never in between."""

import copy
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load, save

import train
from flora.config import composed, semantic_config
from flora.errors import DataError, FloraError
from flora.launch.entry import main
from flora.methods import Peft
from flora.methods.base import load as load_adapter
from flora.results import Store
from flora.tasks.images.decode import decode
from flora.tasks.images.parquet import open_pool, read_class_names
from tests.results.test_store import record

FAST, ALL = range(25), range(500)
SECONDS = 4  # then the run was a sound one, only long
MEMORY = 24 << 30  # of addresses: a config may ask for more than the machine has
QUICK = (
    *("task=digits", "logger=none", "trainer.device=cpu", "trainer.max_steps=1", "trainer.max_eval_examples=8"),
    *("trainer.batch_size=4", "trainer.epochs=1", "model.image_size=32"),
)
BASES = [("adapter=linear_probe",), ("adapter=lora", "adapter.r=2"), ("adapter=flora", "adapter.r=2"), ("logger=csv",)]
ENDS = (0, 1, 2, 3, 130)  # what train.py may exit with; 130: interrupted after SECONDS


class TooLong(KeyboardInterrupt):
    """The time of one case is over."""


def wrong_values(sandbox):
    """What to put where something else belongs. Absolute paths stay in the sandbox, where they are seen."""
    return [
        *(None, True, False, 0, -1, 10**9, 10**30, -(10**18), 1e308, -0.5, 0.3, math.inf, math.nan, "", " ", "nan"),
        *(
            [],
            {},
            [1],
            [None],
            ["a", 2],
            {"a": 1},
            {"pattern": "("},
            [{"pattern": "("}],
            [{"pattern": ".*", "rank": -1}],
        ),
        *(
            "auto",
            "all",
            "1e-3",
            "ünï→😀",
            "\u202eevil",
            "a\nb",
            "nul\0byte",
            "x" * 5000,
            "(",
            "[",
            ".*",
            "${oc.env:NO}",
        ),
        *("../../escape", "../escape", f"{sandbox}/escape", f"{sandbox}/work/../escape", "~/escape", ".", "/", "."),
        *(
            "/dev/null",
            "/proc/self/mem",
            "/dev/full",
            "file:///etc/passwd",
            "CON",
            "-rf",
            "%s%n",
            "{0}",
            "$(touch escape)",
        ),
        *({"_target_": "os.system", "_args_": ["touch escape"]}, [{"_target_": "flora.config.hydra.utils.get_method"}]),
        *(
            "flora.results.record.os.system",
            "os.system",
            "flora.training.Csv",
            "flora.tasks.Vtab",
            "flora.models.TimmModel",
        ),
    ]


def places(node, at=()):
    """Every key of a config, as the keys that lead to it."""
    found = []
    for key, value in node.items():
        found += [(*at, key)] + (places(value, (*at, key)) if isinstance(value, dict) else [])
    return found


def mutated(config, chance, sandbox):
    """A config with one to three changes: a value, a missing key, an unknown key; and what they are, in words."""
    config, said = copy.deepcopy(config), []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        spots = [spot for spot in places(config) if spot[0] not in ("hydra", "debug", "launcher")]
        *outer, key = chance.choice(spots)
        if key in ("num_workers",):
            continue  # as many processes as asked for
        node = config
        for name in outer:
            node = node[name]
        how = chance.choice(("change", "change", "change", "change", "drop", "add"))
        value = copy.deepcopy(chance.choice(wrong_values(sandbox)))
        if how == "drop":
            del node[key]
        elif how == "add":
            node[f"{key}_" if chance.random() < 0.8 else "_target_"] = value
        else:
            node[key] = value
        said.append(f"{how} {'.'.join(map(str, (*outer, key)))} {value!r:.60}")
    return config, "; ".join(said)


def snapshot(folder):
    """What lies where, with sizes and times."""
    return {
        os.path.join(place, name): os.lstat(os.path.join(place, name)).st_mtime_ns
        for place, folders, files in os.walk(folder)
        for name in files
    }


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """A folder to work in, a home and a cache, all below one that is watched; memory is bounded."""
    for name in ("work", "home", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, limits[1]))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_AS, limits)


def outcome(config):
    """Exit code and record path of a run as ``train.py`` would end it; whatever else it raises is a traceback."""
    path = []

    def stop(number, frame):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        main(lambda: path.append(train.run(config)), trace=lambda: False)
        return 0, path[0]
    except SystemExit as end:
        return end.code, None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def config_complaint(seed, sandbox, capsys):
    """What is wrong with how a mutated config ended, or None; and its exit code. Seed None changes nothing."""
    chance = random.Random(seed)
    base = OmegaConf.to_container(composed((*QUICK, *chance.choice(BASES))))
    base.pop("hydra", None)
    config, said = (base, "unchanged") if seed is None else mutated(base, chance, sandbox)
    cfg = OmegaConf.create(config)
    shutil.rmtree(sandbox / "work" / "results", ignore_errors=True)  # else a run of another seed stands for this one
    before = snapshot(sandbox)
    capsys.readouterr()
    try:
        code, path = outcome(cfg)
    except BaseException as error:
        return f"seed {seed} ({said}): {type(error).__name__}: {error!s:.200}", None
    err = capsys.readouterr().err
    mine = [os.path.realpath(str(cfg.paths[key])) for key in ("output", "results")] if path or code in (3, 130) else []
    mine += [str(sandbox / "work" / name) for name in ("outputs", "results/measured")]
    strays = [name for name, time in snapshot(sandbox).items() if before.get(name) != time]
    strays = [name for name in strays if not any(os.path.realpath(name).startswith(f"{place}/") for place in mine)]
    if strays:
        return f"seed {seed} ({said}): wrote {strays[:3]}", code
    if code not in ENDS:
        return f"seed {seed} ({said}): exit {code}", code
    if code == 2 and ("Traceback" in err or not err.strip().splitlines()[-1].startswith("error: ")):
        return f"seed {seed} ({said}): said {err[-200:]!r}", code
    if code == 0:
        record = json.loads(path.read_text())
        right = {
            "status": record["status"] == "finished",
            "value": record["value"] == record["metrics"][record["metric"]] and 0 <= record["value"] <= 1,
            "config": record["config"] == json.loads(json.dumps(semantic_config(cfg))),
            "name": path.stem == record["run_id"],
            "facts": record["seed"] == cfg.seed and record["dataset"] == "digits",
        }
        if not all(right.values()):
            return f"seed {seed} ({said}): a record with a wrong {[k for k, v in right.items() if not v]}", code
    return None, code


def check_configs(seeds, sandbox, capsys):
    ends = []
    complaints = []
    for seed in (None, *seeds):
        torch.manual_seed(0)
        complaint, code = config_complaint(seed, sandbox, capsys)
        complaints += [complaint] if complaint else []
        ends.append(code)
    assert complaints == []
    assert ends[0] == 0
    assert ends.count(2) > len(ends) / 4, "mutations are meant to be noticed"
    return ends


def test_mutated_configs_end_in_one_line_or_a_right_record(sandbox, capsys):
    check_configs(FAST, sandbox, capsys)


@pytest.mark.slow
def test_500_mutated_configs_end_in_one_line_or_a_right_record(sandbox, capsys):
    ends = check_configs(ALL, sandbox, capsys)
    assert ends[1:].count(0) > 0, "some mutations are harmless"


def damaged(content, chance):
    """A file's bytes with flipped bits, cut short, with a piece twice, zeroed or put elsewhere."""
    data = bytearray(content)
    how = chance.choice(("flip", "flip", "flip", "cut", "double", "zero", "swap", "head", "length"))
    at = chance.randrange(len(data))
    size = chance.randrange(1, 64)
    if how == "flip":
        for _ in range(chance.choice((1, 1, 3, 20))):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "double":
        data[at:at] = data[at : at + size]
    elif how == "zero":
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif how == "swap":
        data[at : at + size], data[:size] = data[:size], data[at : at + size]
    elif how == "head":
        data[: min(64, len(data))] = chance.randbytes(min(64, len(data)))
    else:
        data[:8] = chance.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
    return bytes(data)


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
    path = store.write(record("abc"))
    whole = json.loads(path.read_text())
    if chance.random() < 0.5:
        path.write_bytes(damaged(path.read_bytes(), chance))
    else:
        key = chance.choice(list(whole))
        value = chance.choice([None, True, [], {}, "x", -1, 1e400, {"a": "b"}, [1], "finished", "../../escape"])
        path.write_text(json.dumps(whole | {key: value}))
    contents, found = store.read_all(), store.finished("abc")
    summary = contents.finished("abc")
    if (found is None) != (summary is None):
        return "the two ways to read it disagree"
    if found is None:
        return None if contents.problems or contents.records else "it vanished without a word"
    sound = type(found["value"]) in (int, float) and math.isfinite(found["value"]) and found["run_id"] == "abc"
    return None if sound else f"finished with {found['value']!r}"


@cache
def saved_adapter():
    """The files of a small adapter, by name."""
    with tempfile.TemporaryDirectory() as name:
        method = Peft("lora", "peft.LoraConfig", 1e-3, 1e-3, target_modules=["0"], r=2)
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
        return None  # Experiment.evaluate makes one line of it
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
    check_files(kind, FAST, sandbox / "work")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seeds"), [("parquet", range(170)), ("record", range(170)), ("adapter", range(160))])
def test_500_damaged_files_are_refused_or_read_right(kind, seeds, sandbox):
    check_files(kind, seeds, sandbox / "work")
