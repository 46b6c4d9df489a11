"""bench_end_to_end.py: data, networks and rivals on small networks; how runs are watched, and what is made of them."""

import json
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from timm.models import load_state_dict
from transformers import AutoModelForSequenceClassification, BertTokenizerFast

from flora.bench.rivals import huggingface, shared, timm_loop
from flora.bench.workloads import HELD_OUT, WORKLOADS, Extent, balanced, prepare
from flora.models import TransformersModel
from flora.results.benchmarks import markdown
from scripts import bench_end_to_end as script

EXTENT = Extent(4, test=8, workers=0, r=2, dtype="fp32", device="cpu", seed=0)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "the", "is", "positive", "negative"]


@pytest.fixture
def data(tmp_path):
    """A folder of datasets: images of two colours, sentences of two words."""

    def image(label, number):
        buffer = BytesIO()
        Image.new("RGB", (20, 16), (200 * label, 60, number % 250)).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    for folder in ("eurosat", "glue/sst2"):
        (tmp_path / "datasets" / folder).mkdir(parents=True)
    for split, count in (("train", 6), ("validation", 4), ("test", 4)):
        rows = [{"image": image(n % 2, n), "label": n % 2} for n in range(count)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "datasets" / "eurosat" / f"{split}.parquet")
    for split, count in (("train", 8 + HELD_OUT), ("validation", 6)):
        rows = [{"sentence": ("bad film", "good film")[n % 2], "label": n % 2} for n in range(count)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "datasets" / "glue" / "sst2" / f"{split}.parquet")
    return tmp_path / "datasets"


def small(kind, tmp_path):
    """A network of a few thousand parameters with a vocabulary of its own."""
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(tmp_path / "words" / "vocab.txt")).save_pretrained(tmp_path / "words")
    sizes = {"vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 8, "model_type": "bert" if kind == "sequence_classification" else "llama"}
    sizes |= {"pad_token_id": 0} | ({} if "bert" in sizes["model_type"] else {"eos_token_id": 3})
    targets = ["query"] if kind == "sequence_classification" else ["q_proj"]
    head = ["classifier"] if kind == "sequence_classification" else []
    return TransformersModel(kind, kind, sizes, head, pretrained=False, adapter_targets=targets)


def trained(monkeypatch, tmp_path, rival, job):
    """Run a rival in this process; what it left."""
    (tmp_path / "out").mkdir()
    replace(job, output=str(tmp_path / "out")).write(tmp_path / "job.json")
    monkeypatch.setattr(sys, "argv", ["rival", str(tmp_path / "job.json")])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rival.main()
    return json.loads((tmp_path / "out" / "result.json").read_text())


def test_transformers_and_timm_train_the_same_network_on_the_same_files(monkeypatch, tmp_path, data):
    workload = replace(WORKLOADS["convnext_64"], size=32, batch=4, eval_batch=4)
    prepared = prepare(workload, EXTENT, data, tmp_path)
    files = list(Path(prepared.job.data, "train").rglob("*.png"))
    assert len(files) == 8, "two epochs of two batches"
    assert len({file.read_bytes() for file in files}) == 6, "the table has no more"
    done = {}
    for name, rival in (("huggingface", huggingface), ("timm", timm_loop)):
        (tmp_path / name).mkdir()
        done[name] = trained(monkeypatch, tmp_path / name, rival, prepared.job)
        assert done[name]["examples_per_second"] > 0
        assert 0 <= done[name]["value"] <= 1
    assert done["huggingface"]["trainable_params"] == done["timm"]["trainable_params"] > 0
    kept = torch.load(tmp_path / "timm" / "out" / "last.pth.tar", weights_only=False)["state_dict"]
    theirs = next((tmp_path / "huggingface" / "out").glob("checkpoint-*/adapter_model.safetensors"))
    assert theirs.stat().st_size > 0
    base = {name: tensor for name, tensor in kept.items() if "base_layer.weight" in name}
    shipped = load_state_dict(prepared.job.weights)
    for name, tensor in base.items():
        own = name.removeprefix("base_model.model.").replace("base_layer.", "")
        assert torch.equal(tensor, shipped[own].float()), name


@pytest.mark.parametrize(
    ("workload", "kind"), [("minilm_sst2", "sequence_classification"), ("smollm2_sst2", "causal_lm")]
)
def test_transformers_trains_on_texts(monkeypatch, tmp_path, data, workload, kind):
    spec = small(kind, tmp_path)
    extent = replace(EXTENT, random=True, tokenizer=str(tmp_path / "words"))
    prepared = prepare(replace(WORKLOADS[workload], batch=4, eval_batch=4), extent, data, tmp_path, spec)
    assert prepared.weights == "random, tokenizer of words"
    assert f"model.weights={prepared.job.network}" in prepared.overrides
    done = trained(monkeypatch, tmp_path, huggingface, prepared.job)
    assert done["examples_per_second"] > 0
    assert done["metric"] == "accuracy"
    assert 0 <= done["value"] <= 1
    assert done["trainable_params"] == 2 * 8 * 2, "LoRA's two factors of one layer"
    if kind == "sequence_classification":
        assert AutoModelForSequenceClassification.from_pretrained(prepared.job.network).num_labels == 2
    else:
        lines = Path(prepared.job.data, "train.jsonl").read_text().splitlines()
        assert len(lines) == 8
        assert json.loads(lines[0])["text"].endswith(
            ("the correct answer is positive", "the correct answer is negative")
        )


def test_classes_take_turns_and_rows_come_again():
    labels = np.array([0, 0, 0, 0, 0, 1, 1])
    chosen = balanced(labels, 4, seed=0)
    assert sorted(labels[chosen]) == [0, 0, 1, 1]
    assert sorted(np.unique(balanced(labels, 9, seed=0), return_counts=True)[1]) == [1, 1, 1, 1, 1, 2, 2]


def test_a_rivals_clock_leaves_out_the_first_quarter_and_what_is_done_aside(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(shared.time, "perf_counter", lambda: now[0])
    clock = shared.Clock(steps=8, on_gpu=False)
    for number in range(1, 9):
        now[0] += 5.0 if number <= 2 else 0.5
        clock.step(number)
        with clock.aside():
            now[0] += 30.0
    assert clock.seconds == 3.0
    assert clock.rate(batch=4) == 6 * 4 / 3.0


def test_a_program_is_watched_to_its_end(tmp_path):
    spent, said = script.watched([sys.executable, "-c", "x = bytearray(90 * 2**20); print('record: x')"], tmp_path)
    assert said == "record: x\n"
    assert spent["seconds"] > 0
    assert spent["cpu_seconds"] > 0
    assert spent["peak_bytes"] > 90 * 2**20
    with pytest.raises(RuntimeError, match="exit code 3: so it is"):
        script.watched([sys.executable, "-c", "import sys; sys.stderr.write('so it is'); sys.exit(3)"], tmp_path)


def fake(monkeypatch, tmp_path):
    """Runs that take no time, of which timm's fails."""
    job = SimpleNamespace(epochs=2, workers=2)
    monkeypatch.setattr(script, "prepare", lambda *_: SimpleNamespace(job=job, weights="shipped"))
    monkeypatch.setattr(script, "watched", lambda *_: None)
    rates = {"flora": iter([30.0, 10.0, 20.0]), "lora": iter([8.0, 8.0, 8.0]), "huggingface": iter([10.0, 10.0, 10.0])}

    def run(name, *_):
        if name == "timm":
            raise RuntimeError("exit code 1: no memory")
        common = {"metric": "accuracy", "value": 0.5, "peak_bytes": 3_000_000_000, "trainable_params": 7}
        return common | {"examples_per_second": next(rates[name]), "seconds": 4.0, "cpu_seconds": 6.0}

    monkeypatch.setattr(script, "run", run)


def test_medians_over_the_rounds_and_the_table(run, monkeypatch, tmp_path):
    fake(monkeypatch, tmp_path)
    file = tmp_path / "made.json"
    code, out, _ = run(script.bench_end_to_end, "--device", "cpu", "--trainer", "num_workers=2", "--json", file)
    result = json.loads(file.read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert code == 0
    assert (rows["flora"]["train"], rows["flora"]["train_spread"]) == (20.0, 10.0)
    assert rows["timm"] == {"method": "timm", "error": "exit code 1: no memory"}
    assert "timm: exit code 1: no memory" in out
    page = markdown([result | {"file": "made.json"}])
    assert "| train.py, FLoRA | 20 | 10 | 2.00 | - | 4.0 | 0.0 | 6.0 | 3.00 | 0.5000 | 7 |" in page
    assert "convnext, batch 256, 64 px, eurosat, 200 steps" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--contenders magic", "magic"),
        ("--workload minilm_sst2 --contenders timm", "timm"),
        ("--steps 5", "--steps"),
        ("--random", "--random"),
        ("--workload minilm_sst2 --size 32", "--size"),
        ("--data nowhere", "--data"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, run):
    code, out, err = run(script.bench_end_to_end, "--device", "cpu", *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert said in err
