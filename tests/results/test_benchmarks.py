"""The table of step costs: what the JSON files hold, the same bytes each time."""

import csv
import io
import json
import math
from functools import partial

import pytest

from flora.errors import DataError
from flora.files import ROOT
from flora.launch.entry import main
from flora.results import benchmarks, costs
from scripts import make_tables

FACTS = {
    "device": "NVIDIA H100 80GB HBM3",
    "torch": "2.11.0",
    "command": "python scripts/bench_step.py --model resnet50",
    "commit": "0123456789abcdef",
    "dirty": False,
    "versions": {"torch": "2.11.0"},
    "model": "resnet50",
    "batch": 64,
    "size": 224,
    "tokens": None,
    "dtype": "bf16",
    "r": 16,
    "kernel_rank": 2,
    "channels_last": False,
}
STEP = FACTS | {"benchmark": "step", "captured": False, "layers": "all", "match": False}


def row(method, ms, **more):
    base = {"method": method, "ms": ms, "ms_spread": 0.25, "ratio": ms and ms / 10, "peak_bytes": 2_500_000_000}
    return base | {"layers": 53, "trainable_params": 1234567} | more


def step(**changes):
    rows = [row("floor", 10.0, layers=None, trainable_params=0), row("lora", 24.0), row("flora", 12.0)]
    crashed = row("dense", None, peak_bytes=None, error="RuntimeError: expected 1 channel")
    return STEP | {"rows": [*rows, crashed]} | changes


@pytest.fixture
def results(tmp_path):
    """A results folder with one file of every benchmark."""
    folder = tmp_path / "results" / "benchmarks"
    folder.mkdir(parents=True)
    infer = FACTS | {"benchmark": "infer", "difference": 1e-7, "export": {"passed": True, "difference": 0.0}}
    infer["rows"] = [{"method": "merged", "ms": 5.0, "ms_spread": 0.1, "ratio": 1.001, "ratio_spread": 0.002}]
    rates = {"train": 9000.0, "train_spread": 10.0, "bare": 9900.0, "bare_spread": 5.0, "share": 0.9091}
    train = FACTS | {"benchmark": "train", "trainer": {"cuda_graph": True}, "rows": [{"method": "flora"} | rates]}
    start = FACTS | {"benchmark": "start", "batches": 8, "gradient_checkpointing": True}
    start["rows"] = [{"method": "start", "seconds": 3.25, "peak_bytes": 4_500_000_000, "weights": 2, "kept": 0.625}]
    files = {"resnet50": step(), "b_infer": infer, "a_train": train, "c_start": start}
    files["deberta"] = step(model="deberta", size=None, tokens=128, rows=[row("lora", 40.0), row("flora", 10.0)])
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return tmp_path / "results"


@pytest.fixture
def render(results, script):
    """Run make_tables.py: (exit code, stdout, stderr)."""

    def call(*arguments):
        places = ["--results", str(results / "measured"), "--output", str(results)]
        return script(
            partial(main, make_tables.make_tables, trace=lambda: False), "make_tables.py", *arguments, *places
        )

    return call


def test_a_line_shows_time_spread_ratios_memory_and_parameters(results):
    text = benchmarks.rendered(results)[results / "tables" / "step_cost.md"]
    assert "| flora | 12.00 | 0.25 | 1.20 | 0.50 | 2.50 | 53 | 1,234,567 |" in text  # half of LoRA's 24 ms
    assert "| floor | 10.00 | 0.25 | 1.00 | 0.42 | 2.50 | - | 0 |" in text
    assert "| dense | - | 0.25 | - | - | - | 53 | 1,234,567 |" in text
    assert "- dense: RuntimeError: expected 1 channel" in text
    assert "| merged | 5.000 | 0.100 | 1.001 | 0.002 |" in text
    assert "| flora | 9,000 | 10 | 9,900 | 5 | 0.909 |" in text
    assert "trainer.cuda_graph=True" in text
    assert "| start | 8 | 3.25 | 4.50 | 0.625 |" in text
    assert "gradient checkpointing" in text
    for words in (
        "NVIDIA H100",
        "torch 2.11.0",
        "commit 0123456789ab",
        "`python scripts/bench_step.py --model resnet50`",
    ):
        assert words in text
    order = [
        text.index(words) for words in ("### deberta", "### resnet50", "## Inference", "## train.py", "## A start")
    ]
    assert order == sorted(order)


def test_the_speed_up_over_lora_is_a_geometric_mean_of_comparable_runs():
    measured = [step(file="a"), step(file="b", rows=[row("lora", 45.0), row("flora", 10.0)])]
    measured += [step(file="c", captured=True), step(file="d", rows=[row("flora", 10.0)]), step(file="e", match=True)]
    lines = benchmarks.speedups(measured)
    assert len(lines) == 3
    mean = math.sqrt(2.0 * 4.5)
    assert f"x{mean:.2f} as fast as LoRA, geometric mean of 2 (NVIDIA H100 80GB HBM3, eager, equal r)" in lines[0]
    assert "x2.00" in lines[1]
    assert "eager, equal parameters" in lines[1]
    assert "captured, equal r" in lines[2]


def test_compiled_steps_have_a_section_and_a_speed_up_of_their_own(results):
    compiled = {"compile_seconds": 61.25, "graphs": 1, "graph_breaks": 0}
    rows = [row("lora", 30.0, **compiled), row("flora", 10.0, **compiled)]
    file = results / "benchmarks" / "resnet50_compiled.json"
    file.write_text(json.dumps(step(compiled="max-autotune-no-cudagraphs", rows=rows)))
    text = benchmarks.rendered(results)[results / "tables" / "step_cost.md"]
    eager, rest = text.split("## Forward and backward through torch.compile")
    own = rest.split("## Inference")[0]
    assert "### resnet50" in eager
    assert "mode max-autotune-no-cudagraphs" not in eager.split("## Forward and backward")[1]
    assert "mode max-autotune-no-cudagraphs" in own
    assert "| flora | 10.00 | 0.25 | 1.00 | 0.33 | 2.50 | 53 | 1,234,567 | 61.2 | 1 | 0 |" in own
    assert "x3.00 as fast as LoRA, geometric mean of 1 (NVIDIA H100 80GB HBM3, torch.compile max-autotune-no" in eager


def test_the_csv_holds_every_number_unrounded(results):
    text = benchmarks.rendered(results)[results / "tables" / "step_cost.csv"]
    lines = list(csv.DictReader(io.StringIO(text)))
    assert len(lines) == 4 + 2 + 1 + 1 + 1
    (flora,) = (line for line in lines if (line["file"], line["method"]) == ("resnet50.json", "flora"))
    assert (flora["ms"], flora["ratio"], flora["peak_bytes"], flora["size"]) == ("12.0", "1.2", "2500000000", "224")
    assert (flora["adapted_layers"], flora["layers"], flora["error"]) == ("53", "all", "")


def test_make_tables_renders_it_and_notices_a_new_file(results, render):
    stem = results / "tables" / "step_cost"
    code, out, _ = render("step_cost")
    assert code == 0
    assert out.startswith("# What a step costs")
    written = {path: path.read_bytes() for path in (stem.with_suffix(".md"), stem.with_suffix(".csv"))}
    assert render()[0] == 0  # with no record of any run
    assert render("--check")[0] == 0
    assert "x LoRA" in (results / "report.html").read_text()
    assert {path: path.read_bytes() for path in written} == written
    (results / "benchmarks" / "z.json").write_text(json.dumps(step(model="vit")))
    code, _, err = render("--check")
    assert code == 1
    assert "step_cost.md" in err
    assert "report.html" in err


def test_without_results_there_is_no_table(tmp_path):
    assert benchmarks.rendered(tmp_path) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}', '{"benchmark": "other"}'])
def test_a_file_of_another_kind_is_named(text, results):
    (results / "benchmarks" / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json: not the result of a benchmark"):
        benchmarks.rendered(results)


STEPS = [  # the rows of docs/speed.md, by file
    *("convnextv2_large", "convnextv2_large_captured", "resnet50", "resnet50_match", "resnet50_captured"),
    *("llama", "llava_mini", "deberta"),
]


def test_the_page_on_speed_says_what_the_benchmarks_measured():
    lines = [line for line in (ROOT / "docs" / "speed.md").read_text().splitlines() if line.startswith("| ")]
    start = lines.index("| | steps | LoRA | FLoRA | full |") + 2
    for name, line in zip(STEPS, lines[start : start + len(STEPS)], strict=True):
        result = json.loads((ROOT / "results" / "benchmarks" / f"{name}.json").read_text())
        by_method = {row["method"]: row for row in result["rows"]}
        _, how, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert how == ("one CUDA graph" if result["captured"] else "eager")
        assert result["match"] == ("equal parameters" in line)
        for method, cell in zip(("lora", "flora", "full"), cells, strict=True):
            if method not in by_method:
                assert cell == "-", f"{name} {method} was not measured"
                continue
            ratio, params = cell.removesuffix("M").split(", ")
            assert float(ratio) == pytest.approx(by_method[method]["ratio"], abs=0.0051)
            assert float(params) == pytest.approx(by_method[method]["trainable_params"] / 1e6, rel=0.005)
    noisy = {"resnet50", "resnet50_match", "llava_mini", "deberta"}
    for name in STEPS:
        result = json.loads((ROOT / "results" / "benchmarks" / f"{name}.json").read_text())
        spreads = [row["ms_spread"] / row["ms"] for row in result["rows"]]
        assert (0.11 < min(spreads) < max(spreads) < 0.34) if name in noisy else max(spreads) < 0.05


def test_table_5_shows_methods_at_equal_parameters_on_a_gpu():
    rows = [
        {"method": "floor", "ms": 10.0, "ms_spread": 0.1, "peak_bytes": 10**9, "trainable_params": 0},
        {"method": "lora", "ms": 20.0, "ms_spread": 0.2, "peak_bytes": 2 * 10**9, "trainable_params": 1000},
        {"method": "flora", "ms": 16.0, "ms_spread": 0.1, "peak_bytes": 10**9, "trainable_params": 999},
        {"method": "dora", "ms": None, "ms_spread": None, "peak_bytes": None, "trainable_params": 998},
    ]
    facts = {"benchmark": "step", "model": "net", "batch": 32, "size": 64, "dtype": "bf16", "r": 8, "captured": False}
    measured = [facts | {"rows": rows, "match": True, "device": "GPU"}]
    text = costs.markdown([*measured, facts | {"rows": rows, "match": False, "device": "GPU"}])
    (flora,) = [line for line in text.splitlines() if "| flora |" in line]
    assert flora.endswith("| eager | flora | 16.00 ± 0.10 | 2,000 | 1.00 | 999 | 0.80 | 0.50 |")
    (dora,) = [line for line in text.splitlines() if "| dora |" in line]
    assert dora.endswith("| dora | - | - | - | 998 | - | - |")
    assert "| floor" not in text
    assert costs.markdown([measured[0] | {"device": "cpu: a"}]) == ""
