"""Inputs of every kind, spoilt by seed and read through the commands: refused in one line, or read right.

FLORA_MUTATIONS says how many cases there are of all kinds together, FLORA_MUTATIONS_SEED where they start.
"""

import contextlib
import csv
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import save_file

import flora.models
import train
from flora.config import composed, recorded_cell
from flora.launch.entry import main
from flora.results import cells
from flora.results.delta import Kept
from flora.training.identity import identify
from scripts import analyze_delta, export, make_tables, reproduce
from tests.conftest import MEMORY
from tests.mutations import NAMES, spoil
from tests.tasks.imagefolder.folders import photographs
from tests.tasks.texts import word_tokenizer, write_rows
from tests.test_fuzz_files import parquet_bytes

CASES, FIRST = int(os.environ.get("FLORA_MUTATIONS", 34)), int(os.environ.get("FLORA_MUTATIONS_SEED", 0))
SECONDS = 15  # of one command, far more than it needs
OURS = ("outputs", "results", "out", "cache", "home")  # what commands may write to

TIMM = ("model=timm", "model.timm_name=resnet10t", "model.image_size=32", "trainer.device=cpu", "logger=none")
QUICK = (*TIMM, "trainer.max_steps=2", "trainer.batch_size=4", "trainer.max_eval_examples=8", "trainer.epochs=1")
RANDOM, FILE = "model.pretrained=false", ("model.pretrained=true", "model.weights=weights.safetensors")
DIGITS = ("task=digits", *QUICK, *FILE)
FLORA, FULL = (*DIGITS, "adapter=flora", "adapter.r=2"), (*DIGITS, "adapter=full")
PICTURES = ("task=imagefolder", *QUICK, RANDOM, "adapter=linear_probe")
LONG = (*DIGITS, "adapter=lora", "adapter.r=2", "trainer.max_steps=6", "trainer.checkpoint_every=2")
BERT = {"model_type": "bert", "vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 12, "max_position_embeddings": 64, "type_vocab_size": 2}
TEXTS = (
    *("task=glue", "task.dataset=rte", "model=roberta_base", "model.weights=null", RANDOM, "model.tokenizer=words"),
    *(f"model.architecture.{key}={value}" for key, value in BERT.items()),
    *("adapter=linear_probe", "trainer.max_steps=2", "trainer.batch_size=4", "trainer.device=cpu", "logger=none"),
    *("trainer.eval_batch_size=8", "protocol.lr_grid=null", "trainer.lr=1e-3"),
)
TABLE = {"title": "T", "scales": {"mini": {"common": list(DIGITS), "grid": {"adapter": ["full", "linear_probe"]}}}}
EXPERIMENT = {
    "defaults": [{"override /task": "digits"}, {"override /model": "timm"}, {"override /adapter": "linear_probe"}],
    **{"trainer": {"max_steps": 2, "batch_size": 4, "max_eval_examples": 8, "device": "cpu"}, "seed": 1},
    **{"model": {"timm_name": "resnet10t", "image_size": 32, "pretrained": False}},
}


class TooLong(BaseException):
    """The time of one command is over."""


def ran(entry, *words):
    """A command in this process: exit code, what it said on stdout and on stderr."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv

    def stop(number, frame):
        raise TooLong

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    rescue = threading.Timer(SECONDS + 1, released, [Path.cwd()])
    rescue.start()
    sys.argv = [entry.__name__, *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(entry, trace=lambda: False)
        return 0, out.getvalue(), err.getvalue()
    except SystemExit as end:
        return end.code, out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
        rescue.cancel()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def released(folder):
    """Let go whoever waits for a pipe's other end in code that no signal interrupts."""
    for path in folder.rglob("*"):
        if path.is_fifo():
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))


def trained(*overrides):
    def run():
        print(train.run(composed(overrides)))

    return ran(run)


def evaluated():
    return trained(*FLORA, "mode=eval", "checkpoint=adapter")


def status():
    return ran(reproduce.reproduce, "t", "--status", "--results", "outputs/records")


def tabled():
    return ran(make_tables.make_tables, "t", "--results", "outputs/records", "--output", "out")


def exported():
    return ran(export.export, "adapter", "out/lora", "--to", "lora")


def analysed():
    return ran(analyze_delta.analyze_delta, "full", "--results", "outputs/records", "--output", "out")


def from_folder():
    return ran(train.job, "--config-dir", "conf", "experiment=mine", "logger=none")


@dataclass(frozen=True)
class Kind:
    """Files that are spoilt alike.

    Attributes:
        files: patterns of them in the world.
        commands: that read them, one after the other.
        tensors: tensors of another kind must be refused.
        busy: that another process has the run is a right answer.
    """

    files: tuple[str, ...]
    commands: tuple = ()
    tensors: bool = False
    busy: bool = False
    change: object = field(default=None)


def class_renamed(path, chance):
    to = path.parent.with_name(chance.choice(NAMES))
    path.parent.rename(to)
    return f"class {os.fsencode(to.name)!r}", False


def columns_swapped(path, chance):
    if chance.random() < 0.6:
        return spoil(path, chance)
    path.write_bytes(parquet_bytes(chance))
    return f"{path}: other columns", False


PHOTOS, WORDS = partial(trained, *PICTURES, "task.dataset=photos"), partial(trained, *TEXTS)
KINDS = {
    "image": Kind(("data/photos/train/*/*.png",), (PHOTOS,)),
    "class folder": Kind(("data/photos/train/*/0.png",), (PHOTOS,), change=class_renamed),
    "parquet": Kind(
        ("data/rows/*.parquet",),
        (partial(trained, *PICTURES, "task.dataset=rows", "task.classes=2"),),
        change=columns_swapped,
    ),
    "text parquet": Kind(("data/glue/rte/*.parquet",), (WORDS,)),
    "manifest": Kind(("data/glue/rte/manifest.json",), (WORDS,)),
    "tokenizer": Kind(("words/*.json",), (WORDS,)),
    "tokens": Kind(("cache/tokenised/*.safetensors",), (WORDS,)),
    "weights": Kind(
        ("weights.safetensors",), (partial(trained, *DIGITS, "adapter=linear_probe", "seed=1"),), tensors=True
    ),
    "checkpoint": Kind(("outputs/*/checkpoints/*/*",), (partial(trained, *LONG),)),
    "lock": Kind(("outputs/records/.locks/*.lock",), (status, partial(trained, *LONG)), busy=True),
    "record": Kind(("outputs/records/*.json",), (status, tabled)),
    "record cache": Kind(("outputs/records/.cache/*.parquet",), (status, tabled)),
    "adapter": Kind(("adapter/*.json", "adapter/*.safetensors"), (evaluated,), tensors=True),
    "adapter to export": Kind(("adapter/*.json", "adapter/*.safetensors"), (exported,)),
    "full run": Kind(("full/run.json", "full/model.safetensors"), (analysed,), tensors=True),
    "experiment": Kind(("experiments/t.yaml",), (status, tabled)),
    "config": Kind(("conf/experiment/mine.yaml",), (from_folder,)),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with inputs of every kind, as commands left them, and what each command gives of them unspoilt."""
    place = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        settle(place, patch)
        photographs(place / "data" / "photos")
        (place / "data" / "rows").mkdir()
        for name in ("train", "val"):
            (place / "data" / "rows" / f"{name}.parquet").write_bytes(parquet_bytes())
        for name in ("train", "validation"):
            rows = {
                "sentence1": ["the cat sat", "a dog ran"] * 8,
                "sentence2": ["a cat", "no dog"] * 8,
                "label": [0, 1] * 8,
            }
            write_rows(place / "data" / "glue" / "rte" / f"{name}.parquet", rows)
        (place / "data" / "glue" / "rte" / "manifest.json").write_text(json.dumps({"files": {}}))
        word_tokenizer().save_pretrained(place / "words")
        spec = flora.models.TimmModel("resnet10t", pretrained=False, image_size=32)
        save_file(spec.build(10).state_dict(), place / "weights.safetensors")
        for folder, text in (("experiments/t.yaml", TABLE), ("conf/experiment/mine.yaml", EXPERIMENT)):
            (place / folder).parent.mkdir(parents=True)
            head = "# @package _global_\n" if "conf" in folder else ""
            (place / folder).write_text(head + yaml.safe_dump(text, sort_keys=False))
        for overrides in (FLORA, FULL, (*DIGITS, "adapter=linear_probe"), TEXTS):
            code, _, err = trained(*overrides)
            assert code == 0, err
        for overrides, name in ((FLORA, "adapter"), (FULL, "full")):
            shutil.copytree(place / "outputs" / identify(composed(overrides)).run_id / "adapter", place / name)
        interrupted(patch)
        kept = {cell.cell_id for cell in cells.load("t").cells}
        for path in (place / "outputs" / "records").glob("*.json"):
            if recorded_cell(json.loads(path.read_text())["config"]) not in kept:
                path.unlink()
        status()
        expected = {}
        for name, kind in KINDS.items():
            with case(place, patch, place.parent / f"sound {name}") as folder:
                for command in kind.commands:
                    code, out, err = command()
                    assert code == 0, (name, err)
                expected[name] = found(folder, out)
        yield place, expected
    shutil.rmtree(place)


def interrupted(patch):
    """A run that was stopped after its second checkpoint, with its lock, as a process leaves it that was killed."""

    class Killed(KeyboardInterrupt):
        pass

    def stop(callback, args, state, control, **kwargs):
        if state.global_step == 5:
            for lock in Path("outputs/records/.locks").iterdir():
                shutil.copyfile(lock, "lock")
                Path("lock").rename(lock.with_name(f"kept {lock.name}"))
            raise Killed

    with patch.context() as during:
        during.setattr("flora.training.resume.Keeper.on_step_end", stop)
        assert trained(*LONG)[0] == 130
    (kept,) = Path("outputs/records/.locks").glob("kept *")
    lock = kept.rename(kept.with_name(kept.name.removeprefix("kept ")))
    facts = json.loads(lock.read_text())
    lock.write_text(json.dumps(facts | {"pid": 2**22 + 1}))
    os.utime(lock, (0, 0))


def settle(folder, patch):
    """Work in a folder, with home and cache in it."""
    patch.chdir(folder)
    patch.setenv("HOME", str(folder / "home"))
    patch.setenv("FLORA_CACHE", str(folder / "cache"))
    patch.setattr(cells, "ROOT", folder)
    few = lambda name, delta, *ranks: Kept(name, tuple(delta.shape), 1, 0.5, 0.5, None, (0.5,))  # noqa: E731
    patch.setattr(analyze_delta, "energy_kept", few)  # as that takes minutes, and reads nothing


@contextlib.contextmanager
def case(world, patch, folder):
    """A copy of the world to work in."""
    shutil.copytree(world, folder, symlinks=True)
    with patch.context() as during:
        settle(folder, during)
        try:
            yield folder
        finally:
            os.chdir(world)
    shutil.rmtree(folder, ignore_errors=True)


def found(folder, out):
    """What there is to be wrong about: finished records by run id, a table's means, cells that are finished."""
    records = {}
    for path in (folder / "results" / "measured").glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(path.read_text()) if path.is_file() else None
            if isinstance(record, dict) and record.get("status") == "finished":
                records[path.stem] = record
    table = folder / "out" / "tables" / "t.csv"
    means = {}
    if table.is_file():
        means = {row["method"]: row["mean"] for row in csv.DictReader(io.StringIO(table.read_text()))}
    states = {line.split()[1] for line in out.splitlines() if line.startswith("finished ")}
    return {"records": records, "means": means, "states": states}


def snapshot(folder):
    """What lies where outside the folders that commands write to, with times."""
    seen = {}
    for place, folders, files in os.walk(folder):
        if Path(place) == Path(folder):
            folders[:] = [name for name in folders if name not in OURS]
        seen |= {os.path.join(place, name): os.lstat(os.path.join(place, name)).st_mtime_ns for name in files}
    return seen


def wrong_records(kind, before, after, expected):
    """Finished records that are not what the same inputs gave unspoilt."""
    for name, record in after["records"].items():
        if record == before["records"].get(name):
            continue  # it was there, whatever it says
        try:
            value = record["value"]
            if not (math.isfinite(value) and 0 <= value <= 1 and value == record["metrics"][record["metric"]]):
                yield f"record of {value!r}"
            sound = expected["records"].get(name)
            same = sound and all(record[key] == sound[key] for key in ("data", "weights", "config"))
            if same and record["metrics"] != sound["metrics"]:
                yield f"record of {record['metrics']}, not of {sound['metrics']}"
        except (KeyError, TypeError) as error:
            yield f"record without sense ({error!r})"


def complaint(name, seed, world, expected, patch, base):
    """What is wrong with how commands took a spoilt file, or None."""
    kind, chance = KINDS[name], random.Random(f"{name} {seed}")
    np.random.seed(0)
    with case(world, patch, base / f"{name} {seed}") as folder:
        path = chance.choice(sorted(p for pattern in kind.files for p in Path().glob(pattern)))
        said, tensors = (kind.change or spoil)(path, chance)
        before, there = found(folder, ""), snapshot(folder)
        around = set(os.listdir(base))
        for command in kind.commands:
            what = f"{name}, seed {seed} ({said})"
            try:
                code, out, err = command()
            except BaseException as error:
                if isinstance(error, TooLong) and name == "config":
                    continue  # a sound config of a run that is only long
                return f"{what}: {type(error).__name__}: {error!s:.200}"
            ends = (0, 1, 2, 3, *((75,) if kind.busy else ()))
            errors = [line for line in err.splitlines() if line.startswith("error: ")]
            if code not in ends:
                return f"{what}: exit {code!r}"
            if "Traceback" in err + out or (code and len(errors) != 1):
                return f"{what}: exit {code} and said {err[-300:]!r}"
            if code == 0 and tensors and kind.tensors:
                return f"{what}: taken"
            after = found(folder, out)
            if wrong := next(wrong_records(kind, before, after, expected), None):
                return f"{what}: {wrong}"
            strange = {k: v for k, v in after["means"].items() if v and v != expected["means"].get(k)}
            if name != "experiment" and strange:
                return f"{what}: means {strange}"
            if name not in ("experiment", "lock") and command is status and len(after["states"]) > 2:
                return f"{what}: finished {after['states']}"
            changed = [k for k, v in snapshot(folder).items() if there.get(k) != v]
            if changed or set(os.listdir(base)) != around:
                return f"{what}: wrote {changed or set(os.listdir(base)) - around}"
    return None


@pytest.mark.parametrize("name", KINDS)
def test_a_spoilt_file_is_refused_in_one_line_or_read_right(world, tmp_path, monkeypatch, name):
    place, expected = world
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, limits[1]))
    try:
        seeds = range(FIRST, FIRST + math.ceil(CASES / len(KINDS)))
        complaints = [complaint(name, seed, place, expected[name], monkeypatch, tmp_path) for seed in seeds]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not any(complaints), "\n".join(filter(None, complaints))
