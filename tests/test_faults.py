"""What a user sees of a fault and what is kept of the run: each row of docs/faults.md is a run of train.py here."""

import contextlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature

import train
from flora.launch.worker import _run
from flora.results import Store
from flora.results.cells import Cell
from flora.training import Run
from scripts import reproduce
from tests.launch.test_sweep import LAUNCHERS, LONG, TINY, needs, sweeping, wait_for
from tests.place import Place, disk, fill
from tests.tasks.imagefolder.folders import photographs

FOLDER = ("task=imagefolder", "trainer.batch_size=4", "trainer.epochs=10")


@dataclass(frozen=True)
class Row:
    """Of the table."""

    see: str
    code: int
    record: str
    kept: str


def table():
    lines = Path("docs/faults.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")][1:]
    return {fault: Row(see.strip("`"), int(code), record, kept) for fault, see, code, record, kept in cells}


TABLE = table()
FAULTS, SLOW = {}, set()


def fault(name, slow=False):
    """Registers a function that brings a fault about and says how the run ended."""

    def register(function):
        FAULTS[name] = function
        SLOW.update({name} if slow else ())
        return function

    return register


def interrupt():
    raise KeyboardInterrupt


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@fault("newest checkpoint cut short")
def cut_short(place):
    place.run(at=4, do=interrupt)
    newest = place.checkpoints()[-1] / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-99])
    return place.run(), None


@fault("a byte of the newest checkpoint flipped")
def flipped(place):
    place.run(at=4, do=interrupt)
    flip(place.checkpoints()[-1] / "state.pt")
    return place.run(), None


@fault("every checkpoint damaged")
def all_damaged(place):
    place.run(at=4, do=interrupt)
    for path in place.checkpoints():
        flip(path / "trainer_state.json")
    code, err = place.run()
    assert err.count("is damaged") == 2
    assert "going on" not in err
    return (code, err), None


@fault("disk full while a checkpoint is written")
def disk_full(place):
    with disk(place.outputs, "size=64m"):
        ended = place.run(at=3, do=lambda: fill(place.outputs))
        (place.outputs / "filler").unlink()
        shutil.copytree(place.outputs, place.folder / "copy")
    shutil.rmtree(place.outputs)
    (place.folder / "copy").rename(place.outputs)
    return ended, lambda: None


def limited(folder, overrides):
    """A run in a process that may write no large file."""
    with open(folder / "said", "w") as said:
        os.dup2(said.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.exit(_run(train, overrides)[0])


@fault("file-size limit while a checkpoint is written", slow=True)
def file_size(place):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=limited, args=(place.folder, place.command("adapter=full")))
    process.start()
    process.join()
    ended = process.exitcode, (place.folder / "said").read_text()
    return ended, lambda: None


@fault("disk full while the adapter is saved")
def adapter_not_saved(place):
    with disk(place.outputs, "size=64m"):
        with place.patch.context() as patch:
            evaluate = Run._test
            patch.setattr(Run, "_test", lambda *a: (evaluate(*a), fill(place.outputs))[0])
            ended = place.run()
        (place.outputs / "filler").unlink()
        shutil.copytree(place.outputs, place.folder / "copy")
    shutil.rmtree(place.outputs)
    (place.folder / "copy").rename(place.outputs)
    return ended, lambda: None


@fault("disk full while the record is written")
def record_not_written(place):
    with disk(place.results, "size=64m"):
        ended = place.run(at=5, do=lambda: fill(place.results))
    return ended, lambda: None


@fault("disk full for the logger")
def logger_stopped(place):
    place.run("logger=csv", at=4, do=interrupt)
    (numbers,) = place.outputs.glob("*/metrics.csv")
    numbers.unlink()
    numbers.symlink_to("/dev/full")
    return place.run("logger=csv"), None


@fault("out of memory")
def out_of_memory(place):
    return place.run(at=4, do=lambda: torch.empty(1 << 60)), lambda: None


@fault("out of memory on a GPU")
def gpu_out_of_memory(place):
    def ask():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of …")

    return place.run(at=4, do=ask), lambda: None


@fault("Ctrl-C, many times")
def many_interrupts(place):
    def press():
        for _ in range(20):
            os.kill(os.getpid(), signal.SIGINT)

    return place.run("trainer.checkpoint_every=1000", at=4, do=press), lambda: None


@fault("process stopped, its run taken over from another machine")
def taken_over(place):
    def thaw():
        (lock,) = place.results.glob(".locks/*.lock")
        lock.rename(lock.with_name(lock.name.replace(".1.", ".2.")))

    ended = place.run(at=4, do=thaw)
    shutil.rmtree(place.results / ".locks")
    return ended, lambda: None


@fault("copy of a synchronised folder among the locks")
def odd_lock(place):
    (place.results / ".locks").mkdir(parents=True)
    (place.results / ".locks" / "0123456789ab.1 (conflicted copy).lock").write_text("{}")
    return place.run(), None


@fault("output folder read-only")
def read_only_output(place):
    (place.folder / "file").touch()  # root may write wherever a folder can be
    code, err = place.run(f"paths.output={place.folder}/file/outputs")
    with disk(place.outputs, "ro"):
        assert place.run()[0] == code
    return (code, err), None


@fault("results folder read-only")
def read_only_results(place):
    return place.run("paths.results=/proc/records"), None


@fault("W&B unreachable", slow=True)
def no_wandb(place):
    for name, value in {"MODE": "online", "API_KEY": "0" * 40, "BASE_URL": "http://127.0.0.1:9"}.items():
        place.patch.setenv(f"WANDB_{name}", value)
    place.patch.setattr("flora.training.loggers.SECONDS", 1.0)
    return place.run("logger=wandb"), None


@fault("hub unreachable")
def no_hub(place):
    place.patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    place.patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    place.patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place.folder / "cache"))
    return place.run("model.timm_name=convnextv2_femto.fcmae_ft_in1k", "model.pretrained=true"), None


def image_removed(place, workers):
    photographs(place.folder / "data")
    lost = sorted((place.folder / "data" / "train").rglob("*.png"))
    options = (*FOLDER, f"paths.data={place.folder}/data", f"trainer.num_workers={workers}", "trainer.max_steps=30")

    def remove():
        for path in lost:
            path.rename(path.with_suffix(".gone"))

    ended = place.run(*options, at=3, do=remove)

    def mend():
        for path in lost:
            path.with_suffix(".gone").rename(path)
        return options

    return ended, mend


@fault("image file removed while the run reads it")
def image_lost(place):
    return image_removed(place, 0)


@fault("image file removed, read by another process", slow=True)
def image_lost_in_worker(place):
    return image_removed(place, 2)


@fault("parquet file removed while the run goes on")
def parquet_lost(place):
    photographs(place.folder / "images")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["ant", "bee"])})
    for split in ("train", "val"):
        files = sorted((place.folder / "images" / split).rglob("*.png"))
        rows = [
            {"image": {"bytes": p.read_bytes(), "path": p.name}, "label": int(p.parent.name == "bee")} for p in files
        ]
        (place.folder / "data").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, features.arrow_schema), place.folder / "data" / f"{split}.parquet")
    options = (*FOLDER, f"paths.data={place.folder}/data")
    return place.run(*options, at=3, do=lambda: shutil.rmtree(place.folder / "data")), None


@fault("data-loading process killed", slow=True)
def loader_killed(place):
    photographs(place.folder / "data", each=40)
    options = (*FOLDER, f"paths.data={place.folder}/data", "trainer.num_workers=2", "trainer.max_steps=30")

    def kill():
        workers = [child for child in psutil.Process().children() if "forkserver" not in " ".join(child.cmdline())]
        psutil.Process(max(child.pid for child in workers)).kill()

    ended = place.run(*options, at=3, do=kill)
    return ended, lambda: options


@fault("loss not finite")
def diverged(place):
    return place.run("adapter=full", "trainer.lr=1e30", "trainer.max_grad_norm=1e30", "trainer.log_every=1"), None


def worker_killed(place, launcher):
    needs(launcher)
    log = place.folder / "log"
    seeds = "seed=0" if launcher == "submitit" else "seed=0,1"  # submitit waits for one job after the other
    running = sweeping(place.folder, log, *LONG, seeds, *LAUNCHERS[launcher])
    wait_for(place.checkpoints, running)
    os.kill(json.loads(next(place.results.glob(".locks/*.lock")).read_text())["pid"], signal.SIGKILL)
    code = running.wait(timeout=120)
    for lock in place.results.glob(".locks/*.lock"):  # another cell's process may still be ending
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(json.loads(lock.read_text())["pid"]).kill()
    return (code, log.read_text()), None


@fault("process of a joblib sweep killed", slow=True)
def joblib_killed(place):
    return worker_killed(place, "joblib")


@fault("process of a gpu_pool sweep killed", slow=True)
def gpu_pool_killed(place):
    return worker_killed(place, "gpu_pool")


@fault("process of a submitit sweep killed", slow=True)
def submitit_killed(place):
    return worker_killed(place, "submitit")


@fault("process of `reproduce.py --jobs` killed", slow=True)
def reproduce_killed(place):
    def kill():
        while not place.checkpoints():
            time.sleep(0.01)
        os.kill(json.loads(next(place.results.glob(".locks/*.lock")).read_text())["pid"], signal.SIGKILL)

    cells = [Cell((*TINY, *LONG, f"paths.output={place.outputs}", f"seed={seed}")) for seed in range(1)]
    threading.Thread(target=kill, daemon=True).start()
    place.capsys.readouterr()
    todo = {cell: [f"paths.results={place.results}"] for cell in cells}
    failed = reproduce.run_all(todo, [], 2, Store(place.results))
    return (int(failed == cells), place.capsys.readouterr().err), None


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FAULTS]
)
def test_a_fault_shows_and_keeps_what_the_table_says(name, tmp_path, monkeypatch, capsys):
    row, place = TABLE[name], Place(tmp_path, monkeypatch, capsys)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (code, err), mend = FAULTS[name](place)
    assert code == row.code, err
    assert "Traceback" not in err
    pattern = ".*".join(re.escape(part) for part in row.see.split("…"))
    assert any(re.fullmatch(pattern, line) for line in err.splitlines()), err
    statuses = {record["status"] for record in place.records()} or {"none"}
    assert statuses == {row.record}
    files = {
        "adapter": list(place.outputs.glob("*/adapter/*.safetensors")),
        "checkpoint": place.checkpoints(),
    }
    kept = " ".join(kind for kind, paths in files.items() if paths) or "nothing"
    assert kept == row.kept
    assert not list(tmp_path.rglob("*.tmp")), "nothing half-written"
    if mend is not None:
        options = mend() or (["adapter=full"] if "limit" in name else [])
        code, err = place.run(*options)
        assert code == 0, err
        trained_anew = "epoch" in err and "going on from checkpoint" not in err
        assert trained_anew == (row.kept == "nothing")


def test_the_table_and_the_tests_have_the_same_faults():
    assert list(FAULTS) == list(TABLE)
