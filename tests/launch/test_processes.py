"""`python train.py` in two processes, as torchrun starts them: one run, one voice, one end."""

import json
import os
import signal
import subprocess
import sys

import pytest
from transformers import TrainerCallback

import train
from flora.errors import ConfigError
from flora.launch import processes
from flora.launch.entry import main
from flora.launch.worker import Worker
from flora.methods import Peft
from flora.training import TrainerSettings
from tests.training.processes import start

pytestmark = pytest.mark.dist


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


RUN = (
    *("task=digits", "model=timm", "model.timm_name=resnet10t", "model.pretrained=false", "model.image_size=32"),
    *("trainer.max_steps=4", "trainer.max_eval_examples=33", "trainer.batch_size=8", "trainer.device=cpu"),
    *("logger=csv", "trainer.log_every=2"),
)


def run(folder, *overrides, signalled=None, broken=None):
    """`python train.py` in this process; a signal comes to one process after its first step, or a process breaks."""
    places = [f"paths.output={folder}/outputs", f"paths.results={folder}/results"]
    sys.argv = ["train.py", *RUN, *places, *overrides]

    class Event(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1 and processes.index() == signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            if state.global_step == 2 and processes.index() == broken:
                raise ValueError("a cable was cut")

    apply = Peft.apply

    def with_event(self, model, head):
        adapted = apply(self, model, head)
        adapted.callbacks.append(Event())
        return adapted

    Peft.apply = with_event
    main(train.job, trace=lambda: False)


def ended(folder, *overrides, **events):
    """Exit codes, the lines that were said, and the records, of a run in two processes."""
    (folder / "said.log").unlink(missing_ok=True)
    both = start(folder, run, folder, *overrides, **events)
    for process in both:
        process.join(200)
    said = [line for line in (folder / "said.log").read_text().splitlines() if line.strip()]
    records = [json.loads(path.read_text()) for path in folder.glob("results/*.json")]
    return [process.exitcode for process in both], said, records


def lines(said, beginning):
    return [line for line in said if line.startswith(beginning)]


def test_a_run_of_two_processes_is_one_run(tmp_path):
    codes, said, records = ended(tmp_path, "trainer=ddp")
    (record,) = records
    assert codes == [0, 0], said
    assert lines(said, "record: ") == [f"record: {tmp_path}/results/{record['run_id']}.json"]
    assert len(lines(said, "digits resnet10t flora seed 0: test accuracy")) == 1
    assert record["execution"]["processes"] == 2
    assert (record["status"], record["execution"]["distributed"]) == ("finished", "ddp")
    assert len((tmp_path / "outputs" / record["run_id"] / "metrics.csv").read_text().splitlines()) > 3
    assert list((tmp_path / "results" / ".locks").iterdir()) == []

    codes, said, _ = ended(tmp_path, "trainer=fsdp")  # how it is shared out is not what is run
    assert (codes, len(lines(said, "record: "))) == ([0, 0], 1)
    assert "finished before" in said[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.batch_size=9"], "trainer.batch_size=9 cannot be divided over 2 processes"),
        slow(["adapter.r=0"], "r: must be a positive"),
        slow(["trainer.cuda_graph=true"], "trainer.cuda_graph=true is for one process"),
        (["-m", "seed=0,1"], "torchrun"),
    ],
)
def test_bad_input_is_one_line_of_all_processes(tmp_path, overrides, message):
    codes, said, records = ended(tmp_path, *overrides)
    assert codes == [2, 2], said
    (line,) = lines(said, "error: ")
    assert message in line
    assert records == []
    assert not any("Traceback" in line for line in said)


@pytest.mark.parametrize("signalled", [slow(0), 1])
def test_a_signal_to_one_process_preempts_all(tmp_path, signalled):
    codes, said, (record,) = ended(tmp_path, signalled=signalled)
    assert codes == [75, 75], said
    who = "another process of the run" if signalled else "the signal "
    assert len(lines(said, f"interrupted: {who}")) == 1
    assert record["status"] == "interrupted"

    codes, said, (record,) = ended(tmp_path)
    assert codes == [0, 0], said
    assert (record["status"], record["execution"]["resumed_at_steps"]) == ("finished", [1])


@pytest.mark.parametrize("broken", [slow(0), 1])
def test_an_error_in_one_process_ends_all_and_is_told_once(tmp_path, broken):
    codes, said, (record,) = ended(tmp_path, broken=broken)
    assert codes == [1, 1], said
    assert len(lines(said, "failed: a cable was cut")) == 1
    assert len(lines(said, "ValueError: a cable was cut")) == 1
    assert (record["status"], "a cable was cut" in record["error"]) == ("failed", True)


def test_workers_and_single_processes_have_no_place_among_others(tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "PMI_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert (processes.index(), processes.count(), processes.first()) == (1, 2, False)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE"} & Worker(None, tmp_path).environment.keys()
    monkeypatch.undo()
    monkeypatch.setenv("SLURM_NTASKS", "8")  # of a batch script that starts what it likes
    assert (processes.index(), processes.count(), processes.first()) == (0, 1, True)
    with pytest.raises(ConfigError, match="torchrun"):
        TrainerSettings(epochs=1, lr=1, distributed="ddp")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc-per-node=2"],
        ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"],
    ],
)
def test_launchers_start_a_run(tmp_path, launcher):
    places = [f"paths.output={tmp_path}/outputs", f"paths.results={tmp_path}/results"]
    command = [sys.executable, "-m", *launcher, "train.py", *RUN, *places, "trainer=fsdp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(lines(done.stdout.splitlines(), "record: ")) == 1
    assert done.stdout.splitlines()[-1].startswith(f"record: {tmp_path}/results/")
