"""Loggers: what each writes, that W&B's runs are grouped and go on, and that no logger ends a run."""

import csv
import errno
import json
import os
import struct
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import wandb
from PIL import Image
from wandb.proto import wandb_internal_pb2

import train
from flora.errors import ConfigError
from flora.launch.entry import main
from flora.training import Csv, Protocol, TensorBoard, Wandb
from flora.training.loggers import About, Log, opened
from tests.tasks.segment.made import write_camvid
from tests.training.test_run import toy_run

SECRET = "c0ffee" * 7


def trained(logger, folder, run_id="0123456789ab", anew=False, **settings):
    """A toy run under a logger: its outcome."""
    run = toy_run(folder, **{"epochs": 1, "log_every": 2} | settings)
    with logger.run(About(run_id, "toy", "group", "cell", anew=anew), folder) as run.log:
        outcome = run.train()
        run.log.result(outcome.metrics, outcome.selection, outcome.trainer.state.global_step)
    return outcome


def losses(outcome):
    return {entry["step"]: entry["loss"] for entry in outcome.trainer.state.log_history if "loss" in entry}


def lines(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_holds_every_number_of_the_history_and_the_test(tmp_path):
    trained(Csv(), tmp_path)
    outcome = trained(Csv(), tmp_path)  # again: the file starts anew
    rows = lines(tmp_path)
    assert {int(row["step"]): float(row["value"]) for row in rows if row["name"] == "train/loss"} == losses(outcome)
    assert len(losses(outcome)) == 3
    history = [e["eval_accuracy"] for e in outcome.trainer.state.log_history if "eval_accuracy" in e]
    assert [float(row["value"]) for row in rows if row["name"] == "validation/accuracy"] == history
    assert [float(row["value"]) for row in rows if row["name"] == "test/accuracy"] == [outcome.metrics["accuracy"]]


def test_each_learning_rate_of_a_grid_logs_under_its_own_name(tmp_path):
    outcome = trained(Csv(), tmp_path, protocol=Protocol("holdout", "last", "train", [1e-3, 1e-2]))
    values = {o["name"]: float(o["value"]) for o in lines(tmp_path)}
    assert outcome.selection["values"].keys() == {"0.001", "0.01"}
    for rate, value in outcome.selection["values"].items():
        assert values[f"selection/lr {rate}"] == values[f"lr {rate}/validation/accuracy"] == value
    assert "train/loss" not in values


def test_tensorboard_files_hold_the_losses_of_the_last_run(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trained(TensorBoard(), tmp_path)
    outcome = trained(TensorBoard(), tmp_path)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(losses(outcome))
    assert [e.value for e in events.Scalars("test/accuracy")] == pytest.approx([outcome.metrics["accuracy"]])


class Broken:
    """A logger that fails at one moment."""

    def __init__(self, moment):
        self.moment = moment

    def fail(self, moment):
        if moment == self.moment:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def run(self, about, folder):
        self.fail("open")
        try:
            yield Log(lambda *numbers: self.fail("write"))
        finally:
            self.fail("close")


ABOUT = About("0123456789ab", "toy", "group", "cell")
SAID = {"open": "logging nothing", "write": "stopped", "close": "not finished"}


@pytest.mark.parametrize("moment", SAID)
def test_a_logger_that_fails_ends_nothing_and_hides_no_other_error(tmp_path, capsys, moment):
    with opened(Broken(moment), ABOUT, tmp_path) as log:
        log.write({"a": 1.0}, 1)
    warning = f"warning: logger: {SAID[moment]} ([Errno 28] No space left on device); the run goes on\n"
    assert capsys.readouterr().err == warning

    def fails():
        with opened(Broken(moment), ABOUT, tmp_path) as log:
            log.write({"a": 1.0}, 1)
            raise KeyError("of the run")

    with pytest.raises(KeyError, match="of the run"):
        fails()
    assert capsys.readouterr().err == warning


def test_a_full_disk_ends_the_csv_alone(tmp_path, capsys):
    (tmp_path / "metrics.csv").symlink_to("/dev/full")
    with opened(Csv(), ABOUT, tmp_path) as log:
        log.write({"a": 1.0}, 1)
    assert "logging nothing ([Errno 28]" in capsys.readouterr().err


def test_what_tensorboards_thread_meets_prints_no_trace(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    with opened(TensorBoard(), ABOUT, tmp_path) as log:
        monkeypatch.setattr(RecordWriter, "write", lambda *args: Broken("write").fail("write"))
        for step in range(30):
            log.write({"a": 1.0}, step)
    err = capsys.readouterr().err
    assert "warning: logger: stopped ([Errno 28]" in err
    assert "Traceback" not in err


def test_without_tensorboard_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ConfigError, match=r"needs tensorboard, which is not installed: pip install -e \"\.\[tensorboard\]\""
    ):
        TensorBoard()


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    """A W&B service takes long to start where all cores are busy with other tests."""
    monkeypatch.setattr("flora.training.loggers.SECONDS", 200.0)


def messages(content):
    """What a .wandb file holds: LevelDB's log format after a header of 7 bytes; records may span 32 KiB blocks."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        if at + 7 + length > len(content):
            return  # still being written
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            message = wandb_internal_pb2.Record()
            message.ParseFromString(whole)
            yield message
            whole = b""


def whole(path):
    """The records of a .wandb file once its run's exit is among them: ``finish`` may return before that is written."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        records = list(messages(path.read_bytes()))
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} was never finished")


def wandb_files(folder):
    """What W&B wrote, per offline run: its facts, config, numbers by name and raw bytes."""
    runs, end = [], time.monotonic() + 60
    while not [*folder.glob("wandb/offline-run-*/*.wandb")] and time.monotonic() < end:
        time.sleep(0.1)  # another process of W&B's makes it
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):  # the names begin with the time
        facts, config, numbers = None, {}, {}
        for record in whole(path):
            if record.HasField("run"):
                facts = facts or record.run
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            for item in record.history.item:
                numbers.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
        runs.append((facts, config, numbers, path.read_bytes()))
    return runs


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run train.py in this process for two steps: its record."""

    def call(*overrides):
        quick = ("task=digits", "trainer.max_steps=2", "trainer.max_eval_examples=16", "trainer.batch_size=8")
        tiny = ("model=timm", "model.timm_name=resnet10t", "model.pretrained=false", "adapter=linear_probe")
        monkeypatch.setattr(sys, "argv", ["train.py", *quick, *tiny, "paths.results=results", *overrides])
        monkeypatch.chdir(tmp_path)
        main(train.job, trace=lambda: False)
        return json.loads(Path(capsys.readouterr().out.strip().rpartition("record: ")[2]).read_text())

    return call


def test_train_py_groups_and_tags_the_run_and_tells_no_secret(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    record = run("logger=wandb", "table=first_table", 'cell="digits tiny r=8"', f"+secret={SECRET}")
    ((facts, config, numbers, content),) = wandb_files(Path("outputs", record["run_id"]))
    assert (facts.run_id, facts.project) == (record["run_id"], "flora")
    assert (facts.run_group, facts.job_type) == ("first_table", "digits tiny r=8")
    assert {"digits", "resnet10t", "linear_probe", "holdout", "first_table"} <= set(facts.tags)
    assert {key: config[key] for key in record["config"]} == record["config"]
    assert {"run_id", "commit", "versions", "device", "dtype", "data"} <= config.keys()
    assert config["command"].endswith("+secret=<HF_TOKEN>")
    assert SECRET.encode() not in content
    assert numbers["test/accuracy"] == [record["value"]]

    plain = run("table=another", "logger=none")  # what a run is for and who logs it do not change it
    assert plain == record


def test_pictures_of_the_test_are_shown_in_wandb_and_in_tensorboard(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    write_camvid(tmp_path / "data")
    tiny = ("model=timm", "model.pretrained=false", "+model.architecture={channels: [8, 8, 16, 16]}", "adapter=lora")
    small = ("task=segment", "task.size=48", "task.crop=32", "task.hidden_size=8", "trainer.max_steps=2")
    for logger in ("wandb", "tensorboard"):
        options = (f"logger={logger}", f"paths.output={tmp_path / logger}", "trainer.device=cpu", "force=true")
        assert script(partial(main, train.job, trace=lambda: True), "train.py", *small, *tiny, *options)[0] == 0
    (folder,) = (path.parent for path in (tmp_path / "wandb").glob("*/predictions.png"))
    ((_, _, numbers, _),) = wandb_files(folder)
    (path,) = numbers["test/predictions/path"]
    (said,) = folder.glob(f"wandb/offline-run-*/files/{path}")
    assert said.read_bytes() == (folder / "predictions.png").read_bytes()
    assert len(numbers["test/mIoU"]) == 1
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (folder,) = Path("tensorboard").glob("*/tensorboard")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    (shown,) = events.Images("test/predictions")
    with Image.open(folder.parent / "predictions.png") as picture:
        assert (shown.width, shown.height) == picture.size


def test_a_repeated_wandb_run_continues_the_one_of_its_id(tmp_path):
    outcomes = [trained(Wandb(), tmp_path, "repeated")]
    time.sleep(1)  # W&B names the folder of a run by the second
    outcomes.append(trained(Wandb(), tmp_path, "repeated", anew=True))
    files = wandb_files(tmp_path)
    assert [facts.run_id for facts, _, _, _ in files] == ["repeated", "repeated"]
    for (facts, _, numbers, _), outcome in zip(files, outcomes, strict=True):
        assert (facts.run_group, facts.job_type) == ("group", "cell")
        assert dict(zip(numbers["step"], numbers["train/loss"], strict=False)) == losses(outcome)
    assert wandb.run is None, "the next job of a sweep gets its own"
    steps = [step for _, _, numbers, _ in files for step in numbers["_step"]]
    assert steps == list(range(len(steps)))


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(("grid", "deaths"), [(None, (5, 4)), ([1e-3, 1e-2], (17, 4))])
def test_a_resumed_run_shows_each_row_once_in_wandb(tmp_path, monkeypatch, grid, deaths):
    protocol = Protocol("holdout", "last", "train", grid)
    options = {"epochs": 2, "log_every": 1, "checkpoint_every": 3, "protocol": protocol}
    trained(Wandb(), tmp_path / "calm", "calm", **options)
    ((_, _, calm, _),) = wandb_files(tmp_path / "calm")
    for steps in deaths:  # of 12 a fit; some of them after the checkpoint
        left = iter(range(steps))

        def kill(callback, args, state, control, left=left, **kwargs):
            if next(left, None) is None:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr("flora.training.loggers.Log.on_step_end", kill, raising=False)
            with pytest.raises(Killed):
                trained(Wandb(), tmp_path / "killed", "killed", **options)
        time.sleep(1)  # W&B names the folder of a run by the second
    trained(Wandb(), tmp_path / "killed", "killed", **options)
    whole = {}
    for _, _, numbers, _ in wandb_files(tmp_path / "killed"):
        for name, values in numbers.items():
            whole.setdefault(name, []).extend(values)
    timings = ("runtime", "per_second", "_timestamp", "preparation_time")
    kept = [name for name in calm if not name.endswith(timings)]
    assert {name: whole[name] for name in kept} == {name: calm[name] for name in kept}
    assert whole["_step"] == list(range(len(whole["_step"])))


def test_an_unreachable_server_is_one_warning_and_the_run_is_logged_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("flora.training.loggers.SECONDS", 1.0)
    with Wandb().run(About("unreachable", "toy", "group", "cell"), tmp_path) as log:
        log.write({"loss": 0.5}, 1)
    err = capsys.readouterr().err
    assert err.count("warning: logger: ") == 1
    assert "logging offline" in err
    ((_, _, numbers, _),) = wandb_files(tmp_path)
    assert numbers["loss"] == [0.5]


class StubRun:
    """A W&B run that keeps what it is told; the part that ``breaks`` fails."""

    offline = True

    def __init__(self, breaks=None):
        self.breaks, self.logged, self.exit_codes = breaks, [], []

    def call(self, part):
        if part == self.breaks:
            raise RuntimeError("disk full")

    def init(self, **kwargs):
        self.call("init")
        return self

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, numbers, step):
        self.call("log")
        self.logged.append(numbers)

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)
        self.call("finish")


@pytest.mark.parametrize(("breaks", "logged", "exit_codes"), [("init", 0, []), ("log", 0, [0]), ("finish", 3, [0])])
def test_a_failing_wandb_warns_and_the_run_goes_on(tmp_path, monkeypatch, capsys, breaks, logged, exit_codes):
    stub = StubRun(breaks)
    monkeypatch.setattr("wandb.init", stub.init)
    with Wandb().run(About("failing", "toy", "group", "cell"), tmp_path) as log:
        for step in range(3):
            log.write({"loss": 0.5}, step)
    assert capsys.readouterr().err.count("disk full") == 1
    assert (len(stub.logged), stub.exit_codes) == (logged, exit_codes)


def test_a_run_that_fails_is_marked_so_in_wandb_and_its_error_goes_on(tmp_path, monkeypatch):
    stub = StubRun()
    monkeypatch.setattr("wandb.init", stub.init)
    with pytest.raises(ZeroDivisionError), Wandb().run(About("fails", "toy", "group", "cell"), tmp_path):
        raise ZeroDivisionError
    assert stub.exit_codes == [1]


def test_a_log_that_fails_is_told_once_and_asked_no_more(capsys):
    asked = []

    def write(numbers, step, epoch):
        asked.append(step)
        raise OSError("gone")

    log = Log(write)
    for step in range(3):
        log.write({"loss": 1.0}, step)
    assert asked == [0]
    assert capsys.readouterr().err.count("gone") == 1


def test_a_resumed_run_repeats_its_history_where_the_logger_starts_anew(tmp_path):
    seen = []
    run = toy_run(tmp_path, epochs=1, log_every=1)
    run.log = Log(lambda numbers, step, epoch: seen.append((step, sorted(numbers))))
    outcome = run.train()
    before = list(seen)
    run.log.on_train_begin(outcome.trainer.args, outcome.trainer.state, outcome.trainer.control)
    assert seen[len(before) :] == before
    assert (1, ["train/grad_norm", "train/learning_rate", "train/loss"]) in before
