"""`python scripts/analyze_delta.py RUN`: what it compares, and what it cannot compare."""

import json
import types
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flora.launch.entry import main
from flora.results import Store
from flora.results.cells import load
from scripts import analyze_delta
from tests.results.records import write


@pytest.fixture
def analyze(tmp_path, monkeypatch, script):
    """Analyze a made-up run of a small network: (exit code, stdout, stderr)."""
    cell = next(cell for cell in load("eurosat").cells if cell.method == "full")
    base = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3), "fc": nn.Linear(6, 2), "fc_norm": nn.Linear(6, 6)})
    network = types.SimpleNamespace(build=lambda classes: base, classifier=["fc"])
    task = types.SimpleNamespace(network=lambda model: model)
    monkeypatch.setattr(analyze_delta, "instantiate", lambda config: network if "convnext" in str(config) else task)

    def run(*arguments, moved=(), pretrained=True, facts=None, record=None, weights=None, without=()):
        made = {"weights": {"pretrained": pretrained}} | (record or {})
        write(Store(tmp_path / "run"), cell, 0.9, **made)
        after = base.state_dict() | {name: torch.randn(base.state_dict()[name].shape) for name in moved}
        after = {name: weight for name, weight in after.items() if name not in without}
        save_file(after | (weights or {}), tmp_path / "run" / "model.safetensors")
        kept = {"run_id": cell.cell_id, "adapter": "full", "dataset": "eurosat", "model": "net", "num_classes": 2}
        (tmp_path / "run" / "run.json").write_text(json.dumps(kept | (facts or {})))
        places = ["--results", str(tmp_path / "run"), "--output", str(tmp_path / "out" / "deep")]
        entry = partial(main, analyze_delta.analyze_delta, trace=lambda: False)
        return script(entry, "analyze_delta.py", tmp_path / "run", *places, *arguments)

    return run


def test_the_head_is_left_out_and_nothing_that_only_begins_like_it(analyze, tmp_path):
    code, out, _ = analyze(moved=["conv.weight", "fc.weight", "fc_norm.weight"])
    assert code == 0
    assert json.loads(out.splitlines()[0])["layers"] == 2
    (table,) = tmp_path.rglob("delta_*.csv")
    assert [line.split(",")[0] for line in table.read_text().splitlines()] == ["layer", "conv", "fc_norm"]


@pytest.mark.parametrize("name", ["../../../escape", "/escape", "..", "x" * 300, "$\\frac{", "a\nb\tc"])
@pytest.mark.parametrize("of", ["facts", "record"])
def test_no_name_leads_out_of_the_output_folder(analyze, tmp_path, of, name):
    code, _, err = analyze(moved=["conv.weight"], **{of: {"dataset": name, "model": name}})
    made = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    if of == "record":
        assert (code, made) == (2, {"run"})
        assert "its config says 'eurosat'" in err
    else:
        assert (code, made) == (0, {"run", "out/deep/tables", "out/deep/figures"}), err


@pytest.mark.parametrize(
    ("arguments", "made", "message"),
    [
        (["--r", "0"], {}, "--r 0: at least 1"),
        (["--kernel-rank", "-1"], {}, "--kernel-rank -1: at least 1"),
        ([], {"pretrained": False}, "started from random weights"),
        ([], {"facts": {"run_id": "../run/x"}}, "run_id '../run/x', num_classes 2 are of no run"),
        ([], {"facts": {"num_classes": "2"}}, "num_classes '2' are of no run"),
        ([], {"facts": {"num_classes": 10**12}}, "has no head of 1000000000000 classes"),
        ([], {"without": ["conv.bias"]}, "conv.bias of model convnext is missing"),
        (
            [],
            {"weights": {"conv.weight": torch.zeros(1)}},
            "conv.weight is torch.float32 [1], model convnext has another shape",
        ),
        ([], {"weights": {"conv.weight": torch.zeros(6, 4, 3, 3).int()}}, "conv.weight is torch.int32"),
        ([], {"weights": {"fc.bias": torch.full((2,), torch.nan)}}, "fc.bias holds numbers that are not finite"),
        ([], {"moved": ["fc.weight"]}, "no weight outside the head has changed"),
    ],
)
def test_what_cannot_be_compared_is_one_line(analyze, tmp_path, arguments, made, message):
    code, _, err = analyze(*arguments, **{"moved": ["conv.weight"]} | made)
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()
