"""`python train.py`: what a user types, what comes back, and what bad input says."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

import flora
import flora.models
from flora.tasks import Digits
from flora.training import Trainer, evaluate
from tests.quick import record_of, runner

FIELDS = [
    *("schema_version", "method_version", "run_id", "status", "task", "dataset", "model", "adapter", "seed"),
    *("metric", "value", "metrics", "split", "trainable_params", "head_params", "total_params", "skipped_layers"),
    *("ranks", "train_seconds", "examples_per_second", "peak_memory_bytes", "device", "dtype", "commit", "dirty"),
    *("versions", "config", "started", "finished"),
]


@pytest.fixture
def run(tmp_path, monkeypatch, script):
    """See ``runner``; in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return runner(script, tmp_path)


@pytest.mark.parametrize("adapter", ["flora", "lora", "linear_probe", "full"])
def test_a_run_leaves_a_whole_record_and_is_found_again(run, adapter):
    code, out, err = run(f"adapter={adapter}")
    assert code == 0, err
    record = record_of(out)
    assert [field for field in FIELDS if field not in record] == []
    assert (record["status"], record["adapter"], record["split"]) == ("finished", adapter, "test")
    assert record["value"] == record["metrics"]["accuracy"]
    assert Path(record["adapter_path"], "README.md").exists()

    code, again, err = run(f"adapter={adapter}")
    assert code == 0
    assert "finished before" in err
    assert record_of(again) == record, "the second call must not touch the record"

    code, forced, _ = run(f"adapter={adapter}", "force=true")
    assert record_of(forced)["started"] >= record["finished"]
    assert record_of(forced)["value"] == record["value"]

    code, out, _ = run(f"adapter={adapter}", "mode=eval", f"checkpoint={record['adapter_path']}")
    evaluated = record_of(out)
    assert evaluated["run_id"] != record["run_id"]
    assert evaluated["metrics"] == record["metrics"]


def test_five_lines_of_plain_peft_reproduce_the_recorded_metric(run):
    _, out, _ = run("adapter=flora", "trainer.max_steps=5", "trainer.max_eval_examples=null", "model.image_size=null")
    record = record_of(out)

    base = flora.models.load("convnext", num_classes=10)
    model = peft.PeftModel.from_pretrained(base, record["adapter_path"]).eval()
    spec = flora.models.get("convnext")
    task = Digits(**{k: v for k, v in record["config"]["task"].items() if k != "_target_"})
    splits = task.load(image_size=spec.image_size, data_dir=None)
    assert evaluate(model, spec, task, splits.test) == record["metrics"]


def test_merging_changes_the_logits_by_less_than_1e_4(run):
    _, out, _ = run("adapter=flora", "trainer.max_steps=20", "trainer.lr=1e-2")  # what it learns is not small
    base = flora.models.load("convnext", num_classes=10)
    plain = type(base)
    model = peft.PeftModel.from_pretrained(base, record_of(out)["adapter_path"]).eval()
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
        merged = model.merge_and_unload()
        actual = merged(images)
    assert type(merged) is plain
    assert not any("tucker" in name for name, _ in merged.named_parameters())
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=vtab", "task.dataset=eurosta"], "eurosat"),
        (["task=vtab", "task.dataset=eurosat", "paths.data=/nowhere"], "/nowhere"),
        (["task=glue", "task.dataset=rt"], "did you mean rte?"),
        (["task=glue", "task.rates=best"], "task.rates=best must be scripts or paper"),
        (["adapter.r=0"], "r"),
        (["adapter.r=-3"], "r"),
        (["adapter.kernel_rank=0"], "kernel_rank"),
        (["adapter.target_modules=[nothing_is_called_this]"], "nothing_is_called_this"),
        (["adapter.init=best"], "init"),
        (["paths.output=/proc/no"], "paths.output"),
        (["paths.results=/proc/no"], "paths.results"),
        (["adapter.rank=4"], "rank"),
        (["+adapter.rank=4"], "rank"),
        (["model=resnet1000"], "resnet1000"),
        (["trainer.lr=-1"], "trainer.lr"),
        (["trainer.epochs=two"], "trainer.epochs"),
        (["protocol.lr_grid=[]"], "lr_grid"),
        (["mode=eval"], "checkpoint"),
        (["mode=eval", "checkpoint=/nowhere"], "/nowhere"),
        (["mode=predict"], "mode"),
        (["seed=abc"], "seed"),
        ([f"seed={2**32}"], "seed must be a whole number in 0..4294967295"),
        (["force=maybe"], "force must be true or false"),
        (["checkpoint=outputs"], "checkpoint=outputs is for mode=eval"),
        (["adapter=8"], "must be a string"),
        (["model.image_size=0"], "model.image_size"),
        (["model.image_size=big"], "model.image_size"),
        (["launcher=gpu_pool", "workers=0", "-m"], "n_jobs"),
        (["task._target_=os.system"], "not allowed"),
        (["task._target_=flora.results.record.os.system"], "not allowed"),
        (["adapter.config_class=peft.import_utils.lru_cache"], "not allowed"),
        (["adapter.config_class=flora.nothing.Config"], "cannot be found"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_no_record(run, tmp_path, overrides, message):
    code, out, err = run(*overrides)
    last = err.strip().splitlines()[-1]
    assert code == 2, err
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in err
    assert "record:" not in out
    assert list(tmp_path.glob("results/*.json")) == []


def test_a_rank_above_the_mode_size_is_refused_in_a_pattern_and_clipped_in_r(run):
    pattern = "adapter.rank_pattern=[{pattern:'stem\\.0',rank:[64,8,2,2]}]"
    code, _, err = run(pattern)
    assert code == 2, err
    assert "rank_pattern" in err

    code, out, _ = run("adapter.r=64")
    assert code == 0
    assert record_of(out)["ranks"]["stem.0"][1] <= 3  # three input channels


def test_a_checkpoint_of_another_model_or_damaged_weights_exits_2(run):
    _, out, _ = run("adapter=linear_probe")
    folder = Path(record_of(out)["adapter_path"])
    code, _, err = run(
        "mode=eval", f"checkpoint={folder}", "model=timm", "model.timm_name=resnet10t", "model.pretrained=false"
    )
    assert code == 2
    assert "trained on model=convnext" in err

    damaged = folder.parent / "damaged"
    shutil.copytree(folder, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    code, _, err = run("mode=eval", f"checkpoint={damaged}")
    assert code == 2
    assert "error: " in err.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_weights_that_the_last_step_breaks_are_neither_tested_nor_saved(run, tmp_path, monkeypatch, kind):
    def spoil(callback, args, state, control, model=None, **kwargs):
        tensors = model.parameters() if kind == "parameter" else model.buffers()
        next(t for t in tensors if t.is_floating_point()).data.view(-1)[:1] = float("inf")

    monkeypatch.setattr("flora.training.callbacks.StepMeter.on_train_end", spoil)
    network = ["model=timm", "model.timm_name=resnet10t", "model.pretrained=false"]
    code, _, err = run(*network, "adapter=full", "protocol.select=last")
    assert code == 3, err
    assert "was not finite when training ended: lower trainer.lr" in err.strip().splitlines()[-1]
    assert [json.loads(p.read_text())["status"] for p in tmp_path.glob("results/*.json")] == ["failed"]
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(("where", "prefix"), [("the validation loss", "eval"), ("the loss on the test", "test")])
def test_a_result_that_is_not_finite_fails_the_run(run, tmp_path, monkeypatch, where, prefix):
    evaluate = Trainer.evaluate

    def spoiled(trainer, *args, metric_key_prefix="eval", **kwargs):
        forward, trainer.loss = trainer.loss, trainer.loss
        if metric_key_prefix == prefix:
            trainer.loss = lambda *a: forward(*a) * float("nan")
        try:
            return evaluate(trainer, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            trainer.loss = forward

    monkeypatch.setattr(Trainer, "evaluate", spoiled)
    code, _, err = run()
    assert code == 3, err
    assert f"{where} was nan" in err.strip().splitlines()[-1]
    assert [json.loads(p.read_text())["status"] for p in tmp_path.glob("results/*.json")] == ["failed"]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_any_timm_model_without_weights(run):
    code, out, _ = run("model=timm", "model.timm_name=resnet10t", "model.pretrained=false", "adapter=flora")
    assert code == 0
    assert record_of(out)["model"] == "resnet10t"


def test_an_interrupt_leaves_an_interrupted_record(run, tmp_path, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("flora.training.run.Run.train", interrupt)
    code, _, _ = run()
    assert code == 130
    assert [json.loads(p.read_text())["status"] for p in tmp_path.glob("results/*.json")] == ["interrupted"]


def test_a_divergence_leaves_a_failed_record_and_another_exit_code(run, tmp_path):
    code, out, err = run(
        "adapter=full", "trainer.lr=1e30", "trainer.max_grad_norm=1e30", "trainer.log_every=1", "trainer.max_steps=8"
    )
    assert code == 3
    assert "lower trainer.lr" in err
    assert [json.loads(p.read_text())["status"] for p in tmp_path.glob("results/*.json")] == ["failed"]
    assert "record:" not in out


def test_a_preempted_run_exits_75_and_goes_on_when_started_again(run, tmp_path, monkeypatch):
    def tell(callback, args, state, control, **kwargs):
        if state.global_step == 1 and not told:
            told.append(os.kill(os.getpid(), signal.SIGUSR1))

    told = []
    monkeypatch.setattr("flora.training.callbacks.StepMeter.on_step_end", tell, raising=False)
    code, out, err = run("trainer.max_steps=3")
    assert code == 75, err
    assert "interrupted: the signal SIGUSR1 asked it to stop" in err
    assert "record:" not in out
    (record,) = [json.loads(p.read_text()) for p in tmp_path.glob("results/*.json")]
    assert record["status"] == "interrupted"

    code, out, err = run("trainer.max_steps=3")
    assert code == 0, err
    assert record_of(out)["execution"]["resumed_at_steps"] == [1]
    folder = tmp_path / "outputs" / record["run_id"]
    assert [path.name for path in folder.iterdir()] == ["adapter"], "a finished run needs no checkpoint"


def test_a_full_disk_is_one_line_exit_2_and_an_interrupted_record(run, tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("flora.training.progress._sync", fail)
        code, _, err = run("trainer.checkpoint_every=1")
    assert code == 2
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("error: checkpoint ")
    assert "No space left on device" in err
    (path,) = tmp_path.glob("results/*.json")
    assert json.loads(path.read_text())["status"] == "interrupted"
    code, out, _ = run("trainer.checkpoint_every=null")
    assert (code, record_of(out)["run_id"]) == (0, path.stem), "how often changes no result"


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]])
def test_help_and_config_are_shown_without_a_run(arguments):
    shown = subprocess.run([sys.executable, "train.py", *arguments], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert "task" in shown.stdout
    if arguments == ["--help"]:
        assert len(shown.stdout.splitlines()) <= 40
        for key in ("task.dataset=", "paths.data=", "adapter.r=", "mode=eval", "protocol.lr_grid="):
            assert key in shown.stdout


def test_a_sweep_runs_every_cell(run, tmp_path, monkeypatch):
    monkeypatch.setattr("flora.launch.sweep._folder", None)
    code, _, err = run("adapter=linear_probe", "seed=0,1", "-m")
    assert code == 0, err
    assert sorted(json.loads(p.read_text())["seed"] for p in tmp_path.glob("results/*.json")) == [0, 1]
