"""Weights that a run has saved: what of them decides a test, and what is refused as not whole."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tests.quick import record_of, runner


@pytest.fixture
def run(tmp_path, monkeypatch, script):
    """See ``runner``; in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return runner(script, tmp_path)


def saved_run(run, *overrides):
    """A run's folder of weights, and how to test it: all but ``checkpoint`` as it was trained."""
    code, out, err = run(*overrides)
    assert code == 0, err
    folder = Path(record_of(out)["adapter_path"])
    return folder, lambda: run(*overrides, "mode=eval", f"checkpoint={folder}")


def rewritten(folder, change):
    """The weights in a folder, changed."""
    (path,) = folder.glob("*model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def contents(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


def put_back(files):
    for path, content in files.items():
        path.write_bytes(content)


def test_all_that_decides_a_test_is_in_its_identity(run):
    folder, test = saved_run(run, "adapter=lora", "trainer.max_steps=20", "trainer.lr=1e-2")
    whole, before = contents(folder), record_of(test()[1])
    assert "finished before" in test()[2]
    seen = {before["run_id"]}
    for where, name, key, value in (
        ("adapter", "", "", None),
        ("config", "adapter_config.json", "lora_alpha", 800),
        ("run", "run.json", "adapter", "dora"),
    ):
        put_back(whole)
        if where == "adapter":
            rewritten(folder, lambda tensors: tensors[min(tensors)].mul_(2))
        else:
            (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | {key: value}))
        code, out, err = test()
        assert code == 0, err
        after = record_of(out)
        assert after["run_id"] not in seen
        seen.add(after["run_id"])
        assert (after["metrics"] != before["metrics"]) == (where != "run"), where


def test_a_test_of_weights_on_other_base_weights_is_another_test(run, tmp_path):
    base = {"w.safetensors": timm.create_model("resnet10t", num_classes=10).state_dict()}
    save_file(base["w.safetensors"], tmp_path / "w.safetensors")
    network = ["model=timm", "model.timm_name=resnet10t", f"model.weights={tmp_path}/w.safetensors"]
    _, test = saved_run(run, *network, "adapter=linear_probe")
    before = record_of(test()[1])
    save_file({n: t * 1.01 if t.ndim > 1 else t for n, t in base["w.safetensors"].items()}, tmp_path / "w.safetensors")
    assert record_of(test()[1])["run_id"] != before["run_id"]


def halve(tensors):
    for name in sorted(tensors)[::2]:
        del tensors[name]


def add(tensors):
    tensors["base_model.model.stem.0.bias_of_another"] = torch.zeros(2)


def without_backbone(tensors):
    for name in [name for name in tensors if not name.startswith("head.fc")]:
        del tensors[name]


DAMAGES = {
    "lora": [
        (halve, "lacks"),
        (add, "bias_of_another"),
        (lambda t: t.update({n: x.to(torch.int8) for n, x in t.items()}), "it must be torch.float32"),
    ],
    "flora": [
        (halve, "lacks"),
        (lambda t: t.update({n: x.bool() for n, x in t.items()}), "it must be torch.float32"),
    ],
    "full": [
        (without_backbone, "lacks"),
        (halve, "lacks"),
        (lambda t: t.update({n: x.long() for n, x in t.items()}), "it must be torch.float32"),
    ],
    "linear_probe": [(halve, "lacks")],
}


@pytest.mark.parametrize("adapter", DAMAGES)
def test_saved_weights_that_are_not_whole_are_refused(run, tmp_path, adapter):
    folder, test = saved_run(run, f"adapter={adapter}")
    whole = contents(folder)
    said = json.loads((folder / "run.json").read_text())
    assert len(said["tensors"]) > 1
    earlier = {key: value for key, value in said.items() if key != "tensors"}  # as earlier runs wrote it
    for change, message in DAMAGES[adapter]:
        put_back(whole)
        rewritten(folder, change)
        for listed in (said, earlier):
            (folder / "run.json").write_text(json.dumps(listed))
            code, _, err = test()
            assert code == 2, err
            last = err.strip().splitlines()[-1]
            assert last.startswith("error: checkpoint")
            assert message in last
            assert len(list(tmp_path.glob("results/*.json"))) == 1


@pytest.mark.parametrize("adapter", ["flora", "full", "linear_probe"])
def test_weights_that_are_not_finite_are_not_tested(run, tmp_path, adapter):
    folder, test = saved_run(run, f"adapter={adapter}")
    rewritten(folder, lambda tensors: tensors[max(tensors)].view(-1)[:1].fill_(float("nan")))
    code, _, err = test()
    assert code == 3, err
    assert "is not finite; train it again" in err.strip().splitlines()[-1]
    statuses = {
        json.loads(p.read_text())["mode"]: json.loads(p.read_text())["status"] for p in tmp_path.glob("results/*.json")
    }
    assert statuses == {"train": "finished", "eval": "failed"}
