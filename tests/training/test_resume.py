"""An interrupted fit ends as one that was left alone, bit for bit; only whole checkpoints count."""

import dataclasses
import json
import os
import resource
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from flora.errors import AlreadyRunning, CheckpointError, ConfigError, TrainingDiverged
from flora.launch import preemption
from flora.methods import Full
from flora.methods.adalora import AdaLora
from flora.results.lock import Lock
from flora.tasks.images.augment import Augment
from flora.training import Run, TrainerSettings, progress
from flora.training.progress import KEPT, Checkpoints, Progress
from flora.training.trainer import Trainer
from tests.training.test_run import HOLDOUT, SPLITS, VTAB, ToyModel, ToyTask, lora

EPOCHS, STEPS = 3, 6  # of 96 examples in batches of 16


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    """Tests outlive no power cut."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


class Killed(BaseException):
    """What a test ends a run with; nothing handles it, as nothing handles SIGKILL."""


class RandomModel(ToyModel):
    """Draws random numbers on the way."""

    def build(self, num_classes, drop_path=0.0):
        return nn.Sequential(*super().build(num_classes)[:6], nn.Dropout(0.2), *super().build(num_classes)[6:])

    classifier = ["8.fc"]


class RandomTask(ToyTask):
    """As does the data."""

    def augment(self):
        return Augment(crop=True, flip=True)


def checkpointed_run(folder, method=None, protocol=HOLDOUT, analysis=None, **settings):
    settings = TrainerSettings(
        **({"epochs": EPOCHS, "lr": 1e-2, "batch_size": 16, "log_every": 4, "checkpoint_every": 1} | settings)
    )
    method = method or Full("full")
    folder.mkdir(exist_ok=True)
    return Run(RandomTask(), RandomModel(), method, settings, protocol, SPLITS, 0, folder, analysis=analysis)


def interrupted(run, monkeypatch, writes):
    """Train until so many checkpoints are written, then die."""
    write = Progress.write

    def count(self, *arguments):
        nonlocal writes
        path = write(self, *arguments)
        writes -= 1
        if writes == 0:
            raise Killed
        return path

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "write", count)
        with pytest.raises(Killed):
            run.train()


def result(outcome):
    """Everything that must not depend on interruptions; timings do."""
    timings = ("runtime", "per_second", "preparation_time")
    history = [
        {k: v for k, v in entry.items() if not k.endswith(timings)} for entry in outcome.trainer.state.log_history
    ]
    state = {name: tensor.numpy().tobytes() for name, tensor in outcome.adapted.model.state_dict().items()}
    selection = {k: v for k, v in outcome.selection.items() if k != "seconds"}
    return outcome.metrics, history, selection, outcome.adapted.ranks, state


GRID = [1e-3, 3e-2]
CASES = {
    "full": {},
    "lora, last epoch": {"method": lora(lora_dropout=0.1), "protocol": VTAB},
    "average": {"ema_decay": 0.9},
    "accumulation": {"gradient_accumulation": 4, "max_steps": 11},
    "evaluation by steps": {"eval_steps": 4},
    "adalora": {"method": AdaLora("adalora", 2, target_modules=["7"], layer_types=["Linear"])},
    "norms": {"analysis": {"every_n_steps": 2, "rank": 2}},
    "grid": {"protocol": dataclasses.replace(HOLDOUT, lr_grid=GRID), "epochs": 2},
    "grid, then all data": {"protocol": dataclasses.replace(VTAB, lr_grid=GRID), "epochs": 2},
}


SLOW = ("norms", "evaluation by steps", "grid, then all data")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES])
def test_a_run_that_was_killed_twice_ends_as_if_left_alone(tmp_path, monkeypatch, case):
    options = CASES[case]
    calm = result(checkpointed_run(tmp_path / "calm", **options).train())
    for writes in (3, 5):  # after step 3, and 5 steps later in the second epoch
        interrupted(checkpointed_run(tmp_path / "killed", **options), monkeypatch, writes)
    last = checkpointed_run(tmp_path / "killed", **options)
    outcome = last.train()
    assert result(outcome) == calm
    assert last.progress.seconds > outcome.trainer.meter.train_seconds > 0


def test_fits_of_the_grid_that_were_done_are_not_done_again(tmp_path, monkeypatch, capsys):
    options = {"protocol": dataclasses.replace(HOLDOUT, lr_grid=GRID), "epochs": 1}
    calm = result(checkpointed_run(tmp_path / "calm", **options).train())
    interrupted(checkpointed_run(tmp_path / "killed", **options), monkeypatch, STEPS + 2)  # within the second
    capsys.readouterr()
    assert result(checkpointed_run(tmp_path / "killed", **options).train()) == calm
    said = capsys.readouterr().err
    assert "lr 0.001 epoch" not in said
    assert "lr 0.03: going on from checkpoint" in said
    assert result(checkpointed_run(tmp_path / "killed", **options).train()) == calm, "nothing is left to train"
    assert "epoch" not in capsys.readouterr().err


def test_without_a_setting_short_runs_write_nothing(tmp_path):
    checkpointed_run(tmp_path, checkpoint_every=None).train()
    assert list(tmp_path.iterdir()) == []


def test_resume_false_starts_over(tmp_path, monkeypatch, capsys):
    interrupted(checkpointed_run(tmp_path), monkeypatch, 3)
    outcome = checkpointed_run(tmp_path, resume=False).train()
    assert outcome.trainer.resumed_at == []
    assert "going on" not in capsys.readouterr().err


STATE = {"seconds": 1.0, "notes": {}, "done": {}, "fit": {"weights": {"w": torch.arange(5.0)}}}


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def damage_flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def damage_remove(path):
    path.unlink()


@pytest.mark.parametrize("file", ["state.pt", "trainer_state.json", "sha256.json"])
@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_remove])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, damage, file):
    checkpoints = Checkpoints(tmp_path)
    first = checkpoints.write(STATE | {"seconds": 1.0}, "{}")
    second = checkpoints.write(STATE | {"seconds": 2.0}, "{}")
    assert Checkpoints(tmp_path).newest()[0] == second
    damage(second / file)
    checkpoints = Checkpoints(tmp_path)
    path, state = checkpoints.newest()
    assert (path, state["seconds"]) == (first, 1.0)
    assert torch.equal(state["fit"]["weights"]["w"], torch.arange(5.0))
    assert f"warning: checkpoint {second} is damaged" in capsys.readouterr().err
    third = checkpoints.write(STATE, "{}")
    assert sorted(tmp_path.iterdir()) == [first, third], "the damaged one is not what is kept to fall back on"


def test_a_resumed_run_survives_a_torn_checkpoint(tmp_path, monkeypatch, capsys):
    calm = result(checkpointed_run(tmp_path / "calm").train())
    interrupted(checkpointed_run(tmp_path / "torn"), monkeypatch, 9)
    damage_truncate(tmp_path / "torn" / "checkpoints" / "9" / "state.pt")
    outcome = checkpointed_run(tmp_path / "torn").train()
    assert "is damaged" in capsys.readouterr().err
    assert outcome.trainer.resumed_at == [8]
    assert result(outcome) == calm


def test_where_no_checkpoint_is_whole_the_run_starts_over(tmp_path, monkeypatch, capsys):
    calm = result(checkpointed_run(tmp_path / "calm").train())
    interrupted(checkpointed_run(tmp_path / "torn"), monkeypatch, 9)
    for path in (tmp_path / "torn" / "checkpoints").glob("*/sha256.json"):
        path.write_text("{}")
    assert result(checkpointed_run(tmp_path / "torn").train()) == calm
    assert capsys.readouterr().err.count("is damaged") == KEPT


def test_who_lost_the_run_writes_no_checkpoint_and_deletes_none(tmp_path, monkeypatch):
    with Lock(tmp_path / "records", "abc") as claim:
        checkpoints = Checkpoints(tmp_path / "c", claim)
        first = checkpoints.write(STATE, "{}")
        assert json.loads((first / "sha256.json").read_text())["owner"] == claim.token
        sync = progress._sync

        def lose(folder):  # while the disk is busy
            sync(folder)
            claim.path.unlink(missing_ok=True)

        monkeypatch.setattr(progress, "_sync", lose)
        for _ in range(2):
            with pytest.raises(AlreadyRunning, match="was taken over"):
                checkpoints.write(STATE, "{}")
    assert list((tmp_path / "c").iterdir()) == [first]


def test_a_checkpoint_that_changed_while_it_was_read_starts_no_training(tmp_path, monkeypatch):
    interrupted(checkpointed_run(tmp_path), monkeypatch, 3)
    fitting = Trainer.fitting

    def gone(self):  # transformers then begins at step 0
        shutil.rmtree(tmp_path / "checkpoints")
        return fitting(self)

    monkeypatch.setattr(Trainer, "fitting", gone)
    with pytest.raises(CheckpointError, match=r"of step 3 changed while it was read .it says step 0 now"):
        checkpointed_run(tmp_path).train()


def test_a_sum_file_that_is_no_mapping_is_damage(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path)
    first, second = checkpoints.write(STATE, "{}"), checkpoints.write(STATE, "{}")
    (second / "sha256.json").write_text("[]")
    assert Checkpoints(tmp_path).newest()[0] == first
    assert "is damaged" in capsys.readouterr().err


def test_older_checkpoints_go_once_the_new_one_is_there(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    for _ in range(5):
        checkpoints.write(STATE, "{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(CheckpointError, match=r"No space left on device.*5 is intact"):
        checkpoints.write(STATE, "{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]


@contextmanager
def small_files():
    """Inside, no file may grow beyond 64 kB: the kernel then refuses as it does on a full disk.

    It holds for pytest's own output too, so nothing but the write under test belongs inside.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_cannot_grow_is_one_clear_error(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    first = checkpoints.write(STATE, "{}")
    big = STATE | {"fit": {"weights": torch.zeros(100_000)}}
    refused = pytest.raises(CheckpointError, match=r"checkpoint .*/2 cannot be written \(File too large\).*1 is intact")
    with refused, small_files():
        checkpoints.write(big, "{}")
    assert list(tmp_path.iterdir()) == [first]
    assert Checkpoints(tmp_path).newest()[0] == first


def test_what_a_killed_write_left_does_not_count(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    first = checkpoints.write(STATE, "{}")
    shutil.copytree(first, tmp_path / ".2.tmp")
    assert Checkpoints(tmp_path).newest()[0] == first
    assert checkpoints.write(STATE, "{}").name == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_checkpoint_runs_no_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    Checkpoints(tmp_path / "c").write(STATE | {"fit": Evil()}, "{}")
    assert Checkpoints(tmp_path / "c").newest() is None
    assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("number", preemption.SIGNALS)
@pytest.mark.parametrize("step", [4, 2 * STEPS])
def test_a_signal_is_answered_by_a_checkpoint_at_the_next_step(tmp_path, monkeypatch, number, step):
    calm = result(checkpointed_run(tmp_path / "calm", checkpoint_every=None).train())
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    preemption.install()
    try:
        run = checkpointed_run(tmp_path / "told", checkpoint_every=None)

        def tell(trainer, args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), number)

        with monkeypatch.context() as patch:
            patch.setattr("flora.training.callbacks.StepMeter.on_step_end", tell, raising=False)
            with pytest.raises(preemption.Preempted):
                run.train()
        preemption.install()
        again = checkpointed_run(tmp_path / "told", checkpoint_every=None)
        outcome = again.train()
    finally:
        for other, handler in zip(preemption.SIGNALS, before, strict=True):
            signal.signal(other, handler)
    assert outcome.trainer.resumed_at == [step]
    assert outcome.trainer.execution["resumed_at_steps"] == [step]
    assert result(outcome) == calm


def test_a_divergence_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    loss = ToyTask.loss

    def explode(self, outputs, labels, smoothing):
        value = loss(self, outputs, labels, smoothing)
        calls.append(value)
        return value * float("nan") if len(calls) > 5 else value

    calls = []
    monkeypatch.setattr(ToyTask, "loss", explode)
    with pytest.raises(TrainingDiverged, match=rf"at step 6: .*last good checkpoint: {tmp_path}/checkpoints/5\)"):
        checkpointed_run(tmp_path, log_every=100).train()
    assert Checkpoints(tmp_path / "checkpoints").newest()[1]["fit"]["label"] == "train"


def test_a_run_that_diverges_after_its_last_log_has_no_result(tmp_path):
    with pytest.raises(TrainingDiverged, match="validation loss was nan at step 6"):
        checkpointed_run(
            tmp_path, lr=1e30, max_grad_norm=1e30, max_steps=8, log_every=100, checkpoint_every=None
        ).train()


@pytest.mark.parametrize("change", ["data", "weights", "run"])
def test_a_checkpoint_of_other_inputs_is_refused_and_kept(tmp_path, monkeypatch, change):
    interrupted(checkpointed_run(tmp_path / "run"), monkeypatch, 2)
    again = checkpointed_run(tmp_path / "run")
    if change == "data":
        again.splits = dataclasses.replace(again.splits, facts={"sha256": "another"})
    elif change == "weights":
        again.model = type("Changed", (RandomModel,), {"facts": {"sha256": "another"}})()
    else:
        again.claim = Lock(tmp_path, "another").__enter__()
    kept = sorted((tmp_path / "run").rglob("*.pt"))
    with pytest.raises(ConfigError, match=r"is of another run, or of data or weights that have changed.*force=true"):
        again.train()
    assert kept
    assert sorted((tmp_path / "run").rglob("*.pt")) == kept


def test_checkpoints_behind_a_link_are_deleted_too(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    kept = Checkpoints(tmp_path / "run")
    kept.write({"seconds": 0.0}, "{}")
    kept.remove()
    assert kept.newest() is None
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_checkpoint_of_another_model_is_refused(tmp_path, monkeypatch):
    interrupted(checkpointed_run(tmp_path), monkeypatch, 1)
    with pytest.raises(ConfigError, match=r"another model .*: trainer.resume=false starts over"):
        checkpointed_run(tmp_path, lora()).train()


@pytest.mark.parametrize("change", [{"resume": "always"}, {"checkpoint_every": 0}, {"checkpoint_every": "epoch"}])
def test_settings_are_checked(change):
    with pytest.raises(ConfigError, match=f"trainer.{next(iter(change))}"):
        TrainerSettings(epochs=1, lr=1, **change)


def test_a_loss_that_explodes_ends_the_run_before_it_is_infinite(tmp_path, monkeypatch):
    loss = ToyTask.loss
    monkeypatch.setattr(ToyTask, "loss", lambda *arguments: loss(*arguments) * 1e9)
    with pytest.raises(TrainingDiverged, match=r"training loss was \d.*at step 4: lower trainer.lr"):
        checkpointed_run(tmp_path, checkpoint_every=None).train()
