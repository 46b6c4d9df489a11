"""bench_dense.py on small networks: made files through the real task and trainer, against a plain loop."""

import json
from argparse import Namespace

import numpy as np
import pytest
from PIL import Image

from flora.results.benchmarks import markdown, read
from scripts import bench_dense

QUICK = ("--model", "test_convnext", "--batch", 2, "--size", 64, "--width", 8, "--images", 100, "--device", "cpu")
QUICK += ("--r", 2, "--rounds", 1, "--steps", 2, "--warmup", 1)


@pytest.mark.parametrize("task", [["segment"], ["detect"], ["detect", "--masks"]])
def test_training_and_the_bare_step_of_lora_and_flora(run, tmp_path, task):
    file = tmp_path / "dense.json"
    code, out, _ = run(bench_dense.bench_dense, *QUICK, "--task", *task, "--trainer", "num_workers=2", "--json", file)
    result = json.loads(file.read_text())
    assert code == 0
    assert [row["method"] for row in result["rows"]] == ["lora", "flora"]
    for row in result["rows"]:
        assert row["share"] == pytest.approx(row["train"] / row["bare"], rel=0.05)
        assert 0 < row["loss"] < 1000
    assert (result["benchmark"], result["task"], result["masks"]) == ("dense", task[0], len(task) > 1)
    assert result["command"].startswith("python scripts/")
    lora, flora = (row["bare"] for row in result["rows"])
    assert f"takes {lora / flora:.3f} times as long as LoRA's" in out
    page = markdown(read(tmp_path))
    assert f"### {task[0]}{' with masks' if len(task) > 1 else ''}, test_convnext, batch 2, 64 px" in page.replace(
        "\\", ""
    )
    assert f"| {lora / flora:.3f} |" in page


def test_what_was_stopped_between_is_told_without_a_comparison():
    rows = [bench_dense.row("lora", None, None, [4.0]), bench_dense.row("flora", 2.5, [3.0, 5.0], None)]
    said = {"task": "segment", "model": "convnext", "batch": 2, "size": 64, "dtype": "fp32", "device": "cpu"}
    text = bench_dense.shown(said | {"cpus": 2, "spread": "of rounds", "rows": rows})
    assert [line.split() for line in text.splitlines()[2:4]] == [
        ["lora", "-", "-", "4.0", "0.0", "-"],
        ["flora", "4.0", "1.0", "-", "-", "-"],
    ]
    assert "times as long" not in text


def test_the_files_are_of_ade20ks_layout_and_as_large_as_asked(tmp_path):
    bench_dense.write_scenes(tmp_path, Namespace(seed=0, size=96, images=70, batch=3))
    there = sorted((tmp_path / "images" / "training").iterdir())
    assert len(there) == 70
    for image, mask in zip(there, sorted((tmp_path / "annotations" / "training").iterdir()), strict=True):
        assert image.stem == mask.stem
        with Image.open(image) as shown, Image.open(mask) as numbers:
            assert shown.size == numbers.size == (128, 96)
            assert np.asarray(numbers).max() <= 150
    assert len({path.read_bytes() for path in there}) == bench_dense.DISTINCT


@pytest.mark.parametrize(
    ("arguments", "said"),
    [("--methods magic", "magic"), ("--masks", "--masks is for --task detect"), ("--images 0", "--images")],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, run):
    code, out, err = run(bench_dense.bench_dense, "--device", "cpu", *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
