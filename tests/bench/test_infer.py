"""bench_infer.py on small networks: live adapters beside LoRA's, merged ones, and programs made of them."""

import json

import pytest
import torch
from torch import nn

import flora.models
from flora.adapters.layer import FloraLayer
from flora.bench import inference, networks
from flora.bench.inference import MODELS, Models, _row
from flora.bench.methods import Methods, Ranks
from flora.bench.networks import network
from flora.models import programs
from flora.replaced import passes
from scripts.bench_infer import bench_infer, difference, exported
from tests.tasks.chats import tiny_llava

CPU = torch.device("cpu")
QUICK = ("--batch", 2, "--device", "cpu", "--rounds", 2, "--steps", 2, "--r", 4)


def models(names=tuple(MODELS), adapters=1, cast=False, **settings):
    dtype = torch.bfloat16 if cast else torch.float32
    methods = Methods(network("test_convnext", batch=2, size=32, dtype=dtype, cast=cast), Ranks(r=4))
    return Models(methods, names, CPU, adapters, **settings)


def test_every_model_leaves_a_row(run, tmp_path):
    file = tmp_path / "infer.json"
    code, out, err = run(bench_infer, "--model", "test_convnext", "--size", 32, *QUICK, "--no-export", "--json", file)
    result = json.loads(file.read_text())
    assert code == 0, err
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == list(MODELS)
    assert rows["base"]["ratio"] == rows["lora"]["lora_ratio"] == 1.0
    assert all(row["ms"] > 0 and len(str(row["ratio"])) and "error" not in row for row in rows.values())
    assert all(rows[name]["difference"] < 1e-5 for name in MODELS if name.startswith("flora"))
    assert (result["adapters"], result["cast"], rows["lora"]["difference"]) == (1, False, None)
    assert all(name in out for name in MODELS)


def test_the_models_share_frozen_weights_and_all_of_floras_do_the_same():
    made = models()
    outputs = {name: made.logits(name) for name in MODELS}
    for name in ("flora_alone", "flora_factored", "flora"):
        assert difference(outputs[name], outputs["merged"]) < 1e-5
    for name in ("base", "lora"):
        assert difference(outputs[name], outputs["merged"]) > 1e-3, "an update of zero would compare nothing"
    merged, base = made.by_name["merged"], made.by_name["base"]
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    frozen = {p.data_ptr() for p in base.parameters()}
    layers = [m for m in made.by_name["flora"].modules() if isinstance(m, FloraLayer)]
    assert all(layer.base_layer.weight.data_ptr() in frozen for layer in layers)
    assert made.by_name["flora"] is made.by_name["flora_kept"] is not made.by_name["flora_factored"]


def test_adapters_take_turns_and_what_is_kept_stays_in_its_own_block():
    made = models(("flora_alone", "flora_kept"), adapters=2)
    active, runs = [], {name: made.runner(name) for name in made.names}
    made.by_name["flora_kept"].register_forward_hook(lambda model, *_: active.append(model.active_adapter))
    with torch.inference_mode():
        outputs = {name: [run() for _ in range(4)] for name, run in runs.items()}
    assert active == 2 * ["default", "adapter1"] * 2
    assert passes.running() is None
    for alone, kept in zip(*outputs.values(), strict=True):
        torch.testing.assert_close(kept, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs["flora_kept"][0], outputs["flora_kept"][2])
    assert not torch.allclose(outputs["flora_kept"][0], outputs["flora_kept"][1])


def test_cast_holds_every_weight_in_the_dtype_of_the_arithmetic():
    made = models(("base", "lora", "flora_alone"), cast=True)
    for model in made.by_name.values():
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {made.logits(name).dtype for name in made.names} == {torch.bfloat16}


def test_a_model_that_fails_keeps_its_error_and_the_others_go_on(monkeypatch):
    made = models(("base", "lora"))

    def broken():
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Models, "runner", lambda self, name: broken if name == "lora" else lambda: None)
    base, lora = inference.measured(made, 2, 1, 0, CPU)
    assert base["ms"] > 0
    assert base["lora_ratio"] is None
    assert (lora["ms"], lora["error"]) == (None, "RuntimeError: no such kernel")


def test_ratios_are_taken_within_a_round():
    spent = {"base": [1.0, 2.0, 4.0], "merged": [2.0, 4.0, 8.0]}  # a machine that slows down
    rows = {name: {"method": name, "ms_rounds": ms, "kept_bytes": None} for name, ms in spent.items()}
    row = _row(rows["merged"], rows)
    assert (row["ms"], row["ms_spread"], row["ratio"], row["ratio_spread"]) == (4.0, 3.0, 2.0, 0.0)


def test_programs_are_compared_with_the_eager_model_and_one_that_fails_says_why(monkeypatch):
    made = models(("base",))
    made.by_name = {"merged": torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()}
    monkeypatch.setattr(programs, "ENDS", {".pt2": "torch.export"})
    (row,) = exported(made, None)
    assert (row["method"], row["to"]) == ("merged", "torch.export")
    assert row["difference"] < 1e-5
    monkeypatch.setattr(programs, "run", lambda place, given: torch.zeros(3, 4, 30, 30))
    assert exported(made, None)[0]["difference"] == 1.0

    class Branches(torch.nn.Module):
        def forward(self, images):
            return images + 1 if images.sum() > 0 else images

    made.by_name = {"merged": Branches()}
    (row,) = exported(made, None)
    assert row["difference"] is None
    assert row["error"]


@pytest.mark.parametrize("arguments", ["--model nosuch", "--model resnet18 --rounds 0", "--model llava_mini --size 64"])
def test_bad_input_is_one_line_and_exit_code_2(arguments, run):
    code, out, err = run(bench_infer, *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")


def test_a_vision_language_model_is_merged_beside_its_projector(run, tmp_path, monkeypatch):
    targets = flora.models.presets.LLAVA_TARGETS
    monkeypatch.setattr(networks, "get", lambda name: tiny_llava(tmp_path, adapter_targets=targets))
    file = tmp_path / "infer.json"
    few = ("--tokens", 6, "--no-export", "--adapters", 2)
    code, _, err = run(bench_infer, "--model", "llava_mini", *QUICK, *few, "--json", file)
    assert code == 0, err
    rows = json.loads(file.read_text())["rows"]
    assert not any("error" in row for row in rows)
    assert all(row["difference"] < 1e-4 for row in rows if row["method"].startswith("flora"))


def test_what_is_timed_at_inference_has_torchs_own_norms():
    """Beside the base, which no method has prepared; in training, frozen norms run otherwise."""
    made = Models(Methods(network("test_resnet", batch=1, size=32), Ranks(r=2)), ("base", "lora", "flora"), CPU)
    norms = [m for model in made.by_name.values() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) > 10
    assert not any("forward" in norm.__dict__ for norm in norms)
