"""InternViT-6B: its published files in timm's network, against transformers' own network of the same design."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file
from transformers import InternVLVisionConfig, InternVLVisionModel

from flora.config import instantiate
from flora.errors import WeightsError
from flora.files import ROOT
from flora.models import InternVit

WIDTH, HEADS, DEPTH, SIDE = 24, 3, 2, 28
SIZES = {"embed_dim": WIDTH, "num_heads": HEADS, "depth": DEPTH}


@pytest.fixture(scope="module")
def native():
    torch.manual_seed(0)
    config = InternVLVisionConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=SIDE,
        use_qk_norm=True,
        norm_type="rms_norm",
    )
    model = InternVLVisionModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def as_published(native) -> dict[str, torch.Tensor]:
    """Tensors under the names of OpenGVLab/InternViT-6B-224px, whose projections of q, k and v are one."""
    own = native.state_dict()
    published = {
        "embeddings.class_embedding": own["embeddings.cls_token"],
        "embeddings.position_embedding": own["embeddings.position_embeddings"],
        "embeddings.patch_embedding.weight": own["embeddings.patch_embeddings.projection.weight"],
        "embeddings.patch_embedding.bias": own["embeddings.patch_embeddings.projection.bias"],
    }
    for i in range(DEPTH):
        old, new = f"encoder.layer.{i}", f"encoder.layers.{i}"
        qkv = [own[f"{old}.attention.{part}_proj.weight"] for part in "qkv"]
        published |= {f"{new}.attn.qkv.weight": torch.cat(qkv)}
        for theirs, ours in {
            "attention.projection_layer.weight": "attn.proj.weight",
            "attention.projection_layer.bias": "attn.proj.bias",
            "attention.q_norm.weight": "attn.q_norm.weight",
            "attention.k_norm.weight": "attn.k_norm.weight",
            "layernorm_before.weight": "norm1.weight",
            "layernorm_after.weight": "norm2.weight",
            "lambda_1": "ls1",
            "lambda_2": "ls2",
            **{f"mlp.{layer}.{kind}": f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")},
        }.items():
            published[f"{new}.{ours}"] = own[f"{old}.{theirs}"]
    return {name: tensor.clone().contiguous() for name, tensor in published.items()}


@pytest.mark.parametrize("several", [False, True])
def test_the_published_files_compute_what_transformers_computes(native, tmp_path, several):
    tensors = as_published(native)
    path = tmp_path / "model.safetensors"
    if several:
        path = tmp_path / "pytorch_model.bin.index.json"
        parts = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
        for part in set(parts.values()):
            torch.save({name: tensors[name] for name in parts if parts[name] == part}, tmp_path / part)
        path.write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    else:
        save_file(tensors, path)
    spec = InternVit(weights=str(path), image_size=SIDE, architecture=SIZES)
    model = spec.build(5).eval()
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        features = model.forward_features(images)
        expected = native(images).last_hidden_state
        assert torch.allclose(features, expected, atol=1e-4)
        assert model(images).shape == (2, 5)
    assert set(spec.facts.get("shards", {})) == (set(parts.values()) if several else set())
    if several:
        (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
        with pytest.raises(WeightsError, match=r"no file .*pytorch_model-00002-of-00002\.bin, which pytorch_model"):
            spec.build(5)


def test_without_weights_it_says_where_they_are():
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        spec = instantiate(compose("train", ["model=internvit_6b"]).model)
    with pytest.raises(WeightsError, match=r"internvit_6b: the weights are OpenGVLab/InternViT-6B-224px on the hub"):
        spec.build(2)
    # 48 blocks: norms, scales, q and k norms, qkv, its output, the MLP; then class, positions and patches of 14 x 14.
    w, mlp = 3200, 12800
    block = 4 * w + 2 * w + 3 * w * w + (w * w + w) + (w * mlp + mlp) + (mlp * w + w)
    network = spec.skeleton(2)
    total = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("head."))
    assert total == 48 * block + w + 257 * w + (3 * 14**2 * w + w)
