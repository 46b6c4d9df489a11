"""A saved run that is tested: under its own settings, but for what was typed."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import train
from flora.config import composed, instantiate
from flora.errors import ConfigError, WeightsError
from flora.launch import worker
from flora.launch.entry import main
from flora.training.tested import trained_with
from tests.tasks.texts import word_tokenizer

TIMM = ("model=timm", "model.timm_name=resnet10t", "model.image_size=32", "trainer.device=cpu", "logger=none")
QUICK = (*TIMM, "trainer.max_steps=2", "trainer.batch_size=8")
ORIENTATION = (
    *("task=vtab", "task.dataset=dsprites_orientation", "task.test_size=48", "protocol=holdout", "adapter=lora"),
    *(*QUICK, "model.pretrained=false", "seed=3", "trainer.max_eval_examples=40", "trainer.eval_batch_size=16"),
)


def ran(*overrides):
    """The record of `python train.py OVERRIDES` in this process."""
    sys.argv = ["train.py", *overrides]
    return json.loads(train.run(composed(overrides), overrides).read_text())


def evaluated(*overrides):
    return ran("mode=eval", "checkpoint=run", "trainer.device=cpu", "logger=none", *overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which ``run`` is a LoRA of random weights on dsprites_orientation, and its record."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "argv", [])
        record = ran(*ORIENTATION)
        shutil.copytree(Path(record["adapter_path"]).parent, "run")
    return place, record


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """The record of a run, whose folder is ``run``."""
    place, record = trained
    shutil.copytree(place / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    return record


def say(folder="run", **changes):
    """Change what a run says of itself; None: no longer."""
    path = Path(folder, "adapter", "run.json")
    said = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))


def test_a_run_is_tested_on_its_own_data_with_its_own_model_method_seed_and_limits(run, capsys):
    again = evaluated()
    assert again["metrics"] == run["metrics"]
    assert again["mode"] == "eval"
    for key in ("dataset", "model", "adapter", "seed", "dtype"):
        assert again[key] == run[key]
    for key in ("task", "model", "adapter", "trainer", "protocol"):
        assert again["config"][key] == run["config"][key]
    assert (run["dataset"], run["adapter"], run["seed"]) == ("dsprites_orientation", "lora", 3)
    err = capsys.readouterr().err
    assert "dsprites_orientation resnet10t lora" in err
    assert "tested with" not in err
    assert "set_anew" not in again["execution"]


def test_what_is_typed_wins_and_is_said_and_recorded(run, capsys):
    again = evaluated("trainer.max_eval_examples=20", "seed=3")
    assert again["config"]["trainer"]["max_eval_examples"] == 20
    assert again["config"]["task"]["test_size"] == 48
    assert again["execution"]["set_anew"] == {"trainer.max_eval_examples": {"now": 20, "trained": 40}}
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tested with: ")]
    assert line == "tested with: trainer.max_eval_examples=20 (trained with 40)"


def test_other_classes_than_those_of_the_run_are_refused(run):
    """Both data sets have sixteen classes."""
    with pytest.raises(ConfigError, match=r"orientation 0-2, .* but the data has location 0-1, "):
        evaluated("task.dataset=dsprites_location")


def test_a_group_that_is_typed_takes_the_place_of_the_runs(run, capsys):
    with pytest.raises(ConfigError, match="but the data has 0, 1, 2"):  # ten classes, not sixteen
        evaluated("task=digits")
    assert "tested with: task=digits (trained with vtab)" in capsys.readouterr().err


def test_hydra_a_sweep_and_a_worker_read_the_run(run, script, monkeypatch, tmp_path):
    monkeypatch.setattr("flora.launch.sweep._folder", None)
    asked = ("mode=eval", "checkpoint=run", "trainer.device=cpu", "logger=none")
    call = partial(script, partial(main, train.job, trace=lambda: False), "train.py")
    code, out, err = call(*asked)
    assert code == 0, err
    record = json.loads(Path(out.splitlines()[-1].removeprefix("record: ")).read_text())
    assert record["metrics"] == run["metrics"]
    code, _, err = call("-m", *asked, "trainer.max_eval_examples=8,12", "paths.results=swept")
    assert code == 0, err
    swept = [json.loads(path.read_text()) for path in Path("swept").glob("*.json")]
    assert sorted(r["config"]["trainer"]["max_eval_examples"] for r in swept) == [8, 12]
    assert {r["dataset"] for r in swept} == {run["dataset"]}
    assert worker._run(train, [*asked, "paths.results=worked"]) == (0, False, True)
    (path,) = Path("worked").glob("*.json")
    assert json.loads(path.read_text())["metrics"] == run["metrics"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter=flora", "adapter=flora: checkpoint=run was trained with lora"),
        ("adapter.r=4", "adapter.r=4: a saved adapter is as it was trained; leave adapter.r out"),
        ("seed=4", "seed=4: the base weights of checkpoint=run are random and come from its seed, 3"),
        ("model=convnext", "was trained on model=resnet10t, not convnext"),
        ("model.timm_name.x=1", "model.timm_name.x"),
    ],
)
def test_what_a_saved_run_cannot_be_tested_with_is_refused(run, override, message):
    with pytest.raises(ConfigError, match=message.replace("+", r"\+")):
        evaluated(override)
    assert not list(Path().rglob("outputs/records/*.json"))


def test_the_same_method_may_be_typed(run):
    assert evaluated("adapter=lora", "adapter.r=8")["metrics"] == run["metrics"]


def test_a_run_of_older_code_is_tested_with_what_is_typed(run, capsys):
    say(config=None, weights=None)
    again = evaluated(*(word for word in ORIENTATION if word not in ("trainer.device=cpu", "logger=none")))
    assert again["metrics"] == run["metrics"]
    assert "checkpoint=run does not say how it was trained: what is typed counts" in capsys.readouterr().err


@pytest.mark.parametrize("config", [3, {}, {"task": 1}, {"seed": 0}])
def test_a_config_that_is_none_is_refused(run, config):
    say(config=config)
    with pytest.raises(ConfigError, match="its config is not that of a run"):
        evaluated()


@pytest.mark.parametrize("weights", [3, [], {}])
def test_facts_of_weights_that_are_none_are_passed_over(run, weights):
    say(weights=weights)
    assert evaluated("trainer.max_eval_examples=4")["status"] == "finished"


def test_a_reference_to_the_environment_is_not_followed(run):
    config = json.loads(Path("run/adapter/run.json").read_text())["config"]
    say(config=config | {"model": config["model"] | {"weights": {"hub": "${oc.env:HOME}", "file": "a"}}})
    with pytest.raises(ConfigError, match="its config is not that of a run"):
        evaluated()


def test_code_of_a_tokenizer_is_not_run_on_a_folders_word(run):
    config = json.loads(Path("run/adapter/run.json").read_text())["config"]
    say(config=config | {"model": config["model"] | {"trust_remote_code": True}})
    assert trained_with(Path("run/adapter"))["model"]["trust_remote_code"] is False


def test_data_are_read_where_the_run_read_them(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    say(data_folder=str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match="but the data has 0, 1, 2"):
        evaluated("task=digits")
    config = json.loads(Path("run/adapter/run.json").read_text())["config"]
    say(config=config | {"task": config["task"] | {"dataset": "eurosat"}})
    with pytest.raises(Exception, match="elsewhere has no folder eurosat"):
        evaluated()


def without_backbone(folder):
    path = Path(folder, "model.safetensors")
    kept = {name: tensor for name, tensor in load_file(path).items() if name.startswith("fc.")}
    assert kept
    save_file(kept, path)


def test_a_full_fine_tune_of_which_only_the_head_is_left_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    digits = ("task=digits", *QUICK, "model.pretrained=false", "trainer.max_eval_examples=16")
    record = ran(*digits, "adapter=full")
    assert (
        ran("mode=eval", f"checkpoint={record['adapter_path']}", "trainer.device=cpu")["metrics"] == record["metrics"]
    )
    folder = Path(record["adapter_path"])
    (folder / "run.json").unlink()
    without_backbone(folder)
    asked = (*digits, "mode=eval", f"checkpoint={folder}")
    with pytest.raises(ConfigError, match=r"lacks \d+ tensors"):
        ran(*asked, "adapter=full")
    with pytest.raises(ConfigError, match=r"no run\.json that says how it was trained"):
        ran(*asked)
    assert ran(*asked, "adapter=linear_probe")["adapter"] == "linear_probe", "that is all that such a run saves"


def test_other_base_weights_are_refused_unless_they_are_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    state = timm.create_model("resnet10t", num_classes=10).state_dict()
    save_file(state, "w.safetensors")
    weights = ("model.pretrained=true", "model.weights=w.safetensors")
    record = ran("task=digits", *QUICK, *weights, "trainer.max_eval_examples=16", "adapter=linear_probe")
    again = ("mode=eval", f"checkpoint={record['adapter_path']}", "trainer.device=cpu", "logger=none")
    assert ran(*again)["metrics"] == record["metrics"]
    save_file({name: t * 1.5 if t.ndim > 1 else t for name, t in state.items()}, "w.safetensors")
    with pytest.raises(WeightsError, match=r"w.safetensors has sha256 \w+, but .* was trained on weights with sha256"):
        ran(*again)
    other = ran(*again, "model.weights=w.safetensors")
    assert other["run_id"] != record["run_id"]
    assert "w.safetensors has sha256" in other["execution"]["set_anew"]["weights"]
    assert "tested on other base weights" in capsys.readouterr().err
    assert torch.equal(load_file("w.safetensors")["fc.bias"], state["fc.bias"])


def test_a_regression_is_tested_in_the_units_that_it_was_trained_in(tmp_path, monkeypatch):
    mine = composed(["task=text"]).task
    task = instantiate(mine)
    task.remember({"kind": "regression", "columns": {"texts": ["text"]}, "labels": {"mean": 10.0, "deviation": 2.0}})
    (tmp_path / "new.csv").write_text("text,label\n" + "".join(f"the cat {n},{100 + n}\n" for n in range(20)))
    task.dataset, task.whole_test = "new.csv", True
    splits = task.load(tokenizer=word_tokenizer(), max_length=16, data_dir=tmp_path)
    assert (task.kind, len(splits.test)) == ("regression", 20)
    zero = type(
        "Zero", (torch.nn.Module,), {"forward": lambda self, **batch: SimpleNamespace(logits=torch.zeros(1, 1))}
    )
    outputs, _ = task.forward(None)(zero(), {"labels": torch.tensor([100.0])}, False)
    assert outputs.item() == 10, "a zero is the mean of what it was trained on, not of the new labels"


def test_what_was_typed_is_what_is_refused(tmp_path, monkeypatch):
    """With another start the settings of the gradients go too, which nobody typed."""
    monkeypatch.chdir(tmp_path)
    network = ("task=digits", *QUICK, "model.pretrained=false", "+model.architecture={zero_init_last: false}")
    look = ("adapter=flora_gradient", "adapter.gradient.head_steps=2", "adapter.gradient.batches=1")
    shutil.copytree(Path(ran(*network, *look, "trainer.max_eval_examples=8")["adapter_path"]).parent, "run")
    with pytest.raises(ConfigError, match=r"^adapter\.init=zero_output: a saved adapter is as it was trained; leave "):
        evaluated("adapter.init=zero_output")
