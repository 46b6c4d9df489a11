"""Faults of what is on the disk: checkpoints, adapters, locks, records, and the disk itself."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys

from safetensors.torch import load_file, save_file

import train
from flora.launch.worker import _run
from flora.training import Run
from tests.faults.frame import disk, fault, fill, flip, interrupt


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


@fault("tensors missing from saved weights that are tested")
def halved(place):
    place.run("adapter=full")
    (path,) = place.outputs.glob("*/adapter/model.safetensors")
    tensors = load_file(path)
    save_file({name: tensors[name] for name in sorted(tensors)[::2]}, path)
    return place.run("adapter=full", "mode=eval", f"checkpoint={path.parent}"), None


def edit_record(place, **changes):
    place.run()
    (path,) = place.results.glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return place.run(), None


@fault("record edited by hand")
def edited(place):
    return edit_record(place, value=0.75)


@fault("record of a newer version")
def newer(place):
    return edit_record(place, schema_version=3)
