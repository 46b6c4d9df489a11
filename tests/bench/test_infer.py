"""bench_infer.py on small networks: merged against base, and torch.export of the merged model."""

import json

import pytest
import torch

import flora.models
from flora.adapters.layer import FloraLayer
from flora.bench import networks
from flora.bench.methods import Methods, Ranks
from flora.bench.networks import network, unlabelled
from scripts.bench_infer import bench_infer, difference, exported, made, rows
from tests.tasks.chats import tiny_llava

CPU = torch.device("cpu")


def test_the_result_compares_base_merged_and_adapted(run, tmp_path):
    file = tmp_path / "infer.json"
    arguments = ("--model", "test_convnext", "--batch", 2, "--size", 32, "--device", "cpu", "--rounds", 3, "--steps", 1)
    code, out, _ = run(bench_infer, *arguments, "--r", 4, "--json", file)
    result = json.loads(file.read_text())
    assert code == 0
    assert [row["method"] for row in result["rows"]] == ["base", "merged", "adapted"]
    assert result["rows"][0]["ratio"] == 1.0
    assert all(row["ms"] > 0 for row in result["rows"])
    assert result["difference"] < 1e-5
    assert result["export"]["passed"] is True
    assert result["export"]["difference"] < 1e-5
    assert "torch.export of the merged model: passes" in out


def test_merging_leaves_the_base_networks_structure_and_the_adapters_function():
    net = network("test_convnext", batch=2, size=32)
    torch.manual_seed(0)
    models = made(Methods(net, Ranks(r=4)), CPU)
    inputs = unlabelled(net.inputs(CPU))
    assert set(inputs) == {"images"}
    assert not any(isinstance(module, FloraLayer) for module in models["merged"].modules())
    assert [type(m) for m in models["merged"].modules()] == [type(m) for m in models["base"].modules()]
    base, merged, adapted = (net.outputs(model, inputs) for model in models.values())
    assert difference(merged, adapted) < 1e-5
    assert difference(merged, base) > 1e-3, "an update of zero would compare nothing"


def test_a_model_that_cannot_be_exported_says_why_and_whether_its_base_can():
    class Branches(torch.nn.Module):
        def forward(self, images):
            return images + 1 if images.sum() > 0 else images

    net = network("test_convnext", batch=1, size=32)
    inputs = unlabelled(net.inputs(CPU))
    report = exported({"merged": Branches(), "base": torch.nn.Identity()}, net, inputs)
    assert (report["passed"], report["base_passed"]) == (False, True)
    assert report["error"]


def test_ratios_are_taken_within_a_round():
    spent = {"base": [1.0, 2.0, 4.0], "merged": [2.0, 4.0, 8.0]}  # a machine that slows down
    assert rows(spent)[1] == {"method": "merged", "ms": 4.0, "ms_spread": 3.0, "ratio": 2.0, "ratio_spread": 0.0}


@pytest.mark.parametrize("arguments", ["--model nosuch", "--model resnet18 --rounds 0", "--model llava_mini --size 64"])
def test_bad_input_is_one_line_and_exit_code_2(arguments, run):
    code, out, err = run(bench_infer, *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")


def test_a_vision_language_model_is_merged_beside_its_projector(run, tmp_path, monkeypatch):
    targets = flora.models.presets.LLAVA_TARGETS
    monkeypatch.setattr(networks, "get", lambda name: tiny_llava(tmp_path, adapter_targets=targets))
    file = tmp_path / "infer.json"
    few = ("--batch", 2, "--tokens", 6, "--device", "cpu", "--rounds", 1, "--steps", 1, "--r", 2, "--no-export")
    code, _, err = run(bench_infer, "--model", "llava_mini", *few, "--json", file)
    assert code == 0, err
    result = json.loads(file.read_text())
    assert [row["method"] for row in result["rows"]] == ["base", "merged", "adapted"]
    assert result["difference"] < 1e-4
