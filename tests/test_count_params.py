"""`scripts/count_params.py`: the published counts, and what it prints for bad input."""

import json
from functools import partial
from pathlib import Path

import pytest

from flora.launch.entry import main
from scripts import count_params


@pytest.fixture
def count(monkeypatch, script, tmp_path):
    """Run the script in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides):
        return script(partial(main, count_params.job, trace=lambda: False), "count_params.py", *overrides)

    return call


def lora(r, layers):
    return sum(number * r * (rows + columns) for number, rows, columns in layers)


DEBERTA = [(48, 768, 768), (24, 768, 3072)]  # q, k, v and output; up and down; 12 blocks
LLAMA = [(96, 4096, 4096), (64, 4096, 11008)]  # q, k, v; up and down; 32 blocks
LLAMA3 = [(32, 4096, 4096), (64, 4096, 1024), (64, 4096, 14336)]  # keys and values have 8 heads of 32
BERT_LARGE = [(96, 1024, 1024), (48, 1024, 4096)]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # counts as published, or as the published shapes give them
        ("model=deberta_v3_base adapter=lora adapter.r=2", 331776),
        ("model=deberta_v3_base adapter=lora adapter.r=4", 663552),
        ("model=deberta_v3_base adapter=lora adapter.r=8", 1327104),
        ("model=deberta_v3_base adapter=lora adapter.r=16", lora(16, DEBERTA)),
        ("model=deberta_v3_base adapter=flora adapter.r=2", 332064),
        ("model=deberta_v3_base adapter=flora adapter.r=4", 664704),
        ("model=deberta_v3_base adapter=flora adapter.r=8", 1331712),
        ("model=deberta_v3_base adapter=flora adapter.r=16", lora(16, DEBERTA) + 72 * 16**2),
        ("model=llama_7b adapter=lora adapter.r=4", 7012352),
        ("model=llama_7b adapter=lora adapter.r=32", lora(32, LLAMA)),
        ("model=llama3_8b adapter=lora adapter.r=16", lora(16, LLAMA3)),
        ("model=llava_1_5_7b adapter=lora adapter.r=128", 319815680),
        ("model=bert_large adapter=lora adapter.r=8", lora(8, BERT_LARGE)),
        (
            "model=internvit_6b adapter=lora adapter.r=16",
            lora(16, [(48, 3200, 9600), (48, 3200, 3200), (96, 3200, 12800)]) + 16 * (3 * 14**2 + 3200),
        ),
        ("model=convnextv2_large adapter=flora adapter.r=16", 4529905),
        ("model=convnextv2_large adapter=lora_flat adapter.r=8", 12946080),
        ("model=convnextv2_large adapter=lora_flat adapter.r=16", 25892160),
        ("model=convnextv2_large adapter=lora_flat adapter.r=32", 51784320),
        ("model=convnextv2_large adapter=dora_flat adapter.r=32", 51949632),
        ("model=convnextv2_large adapter=bitfit", 165312),
    ],
)
def test_adapter_parameters(count, overrides, expected):
    code, out, err = count(*overrides.split())
    assert code == 0, err
    assert json.loads(out)["trainable_params"] == expected


# Totals with the head at its default size, and the head: 1000 ImageNet classes, or two classes of text.
TOTALS = {
    "deberta_v3_base": (184423682, 768 * 768 + 768 + 2 * 768 + 2),
    "convnextv2_large": (197956840, 1537 * 1000),
    "vit_b16": (86567656, 769 * 1000),
    "resnet50": (25557032, 2049 * 1000),
    "llama_7b": (6738415616, 0),
    "llama3_8b": (8030261248, 0),
    "llava_1_5_7b": (7063427072, 20979712),
    # EfficientNet-Lite0 without its classifier, SmolLM2, and a layer norm with two linear layers between them.
    "llava_mini": (138958784, 2 * 1280 + 1281 * 576 + 577 * 576),
    "minilm_l6": (22713216 + 385 * 2, 385 * 2),
}


@pytest.mark.parametrize("model", TOTALS)
def test_totals(count, model):
    code, out, err = count(f"model={model}", "adapter=full")
    assert code == 0, err
    total, head = TOTALS[model]
    assert json.loads(out) == {"trainable_params": total - head, "head_params": head, "total_params": total}


@pytest.mark.slow
def test_every_method_counts_without_weights(count):
    """On the first network that each can adapt."""
    for path in sorted(Path(count_params.__file__).parents[1].glob("configs/adapter/*.yaml")):
        for model in ("minilm_l6", "vit_b16"):
            code, out, err = count(f"model={model}", f"adapter={path.stem}")
            if code == 0:
                break
        assert code == 0, f"{path.stem}: {err}"
        assert json.loads(out)["trainable_params"] > 0 or path.stem == "linear_probe"


def test_one_json_line_and_nothing_else_on_stdout(count):
    _, out, _ = count("model=resnet50", "adapter=full")
    assert out.count("\n") == 1
    counts = json.loads(out)
    assert counts["trainable_params"] + counts["head_params"] == counts["total_params"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=nothing"], "model=nothing: there is no such model"),
        (["model=bert_large", "adapter=lora", "adapter.target_modules=[nothing_is_called_this]"], "nothing_is_called"),
        (["adapter.r=0"], "r: must be a positive integer"),
        (["model=roberta_base", "model.kind=poem"], "model.kind"),
        (["model=roberta_base", "model.architecture.model_type=robberta"], "model.architecture"),
        (["model=roberta_base", "model.weights=null"], "model.weights"),
        (["adapter.budget=2%%"], "adapter.budget must be"),
        (["adapter.budget=0.1%"], "below the smallest adapter"),
        (["adapter=bitfit", "adapter.budget=2%"], "bitfit has no ranks"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(count, overrides, message):
    code, out, err = count(*overrides)
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in err
