"""bench_start.py on a small network: a start from gradients beside training steps."""

import json

import torch

from flora.bench.methods import Methods, Ranks
from flora.bench.networks import network
from scripts.bench_start import bench_start

QUICK = ("--model", "test_convnext", "--batch", 2, "--size", 32, "--device", "cpu", "--r", 2)


def test_every_row_is_measured_and_the_start_says_what_it_keeps(run, tmp_path):
    file = tmp_path / "start.json"
    code, out, _ = run(bench_start, *QUICK, "--batches", 2, "--json", file)
    result = json.loads(file.read_text())
    assert code == 0
    assert [row["method"] for row in result["rows"]] == ["lora", "flora", "full", "start"]
    assert all(row["seconds"] > 0 for row in result["rows"])
    start = result["rows"][-1]
    with torch.device("meta"):
        net = network("test_convnext", batch=2, size=32)
        adapted = Methods(net, Ranks(r=2)).tuning("flora").apply(net.spec.skeleton(), net.spec.classifier)
    assert start["weights"] == len(adapted.ranks)
    assert 0 < start["kept"] < 1
    assert "share kept" in out


def test_what_has_no_checkpoints_is_refused(run):
    code, _, err = run(bench_start, *QUICK, "--gradient-checkpointing")
    assert code == 2
    assert err.splitlines()[-1] == "error: --gradient-checkpointing: test_convnext has none; leave it out"
