"""diffusers' interface for adapters, on a small UNet: what it does with LoRA's it does with FLoRA's."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

import flora

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
TARGETS = ["to_q", "to_v", "conv1", "conv2", "proj_in"]


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**UNET).double().eval()


def config(**settings: Any) -> flora.FloraConfig:
    return flora.FloraConfig(**{"r": 3, "init_weights": False, "target_modules": TARGETS, **settings})


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def run() -> Any:
    images, words = torch.randn(2, 4, 8, 8, dtype=torch.double), torch.randn(2, 5, 8, dtype=torch.double)
    return lambda model, **kwargs: model(images, 3, words, **kwargs).sample


def by_hand(model: Any, weights: dict[str, float]) -> Any:
    """A UNet whose weights are W + sum of weighted updates: the oracle."""
    plain = unet()
    for name, layer in model.named_modules():
        if isinstance(layer, flora.FloraLayer):
            for adapter, weight in weights.items():
                plain.get_submodule(name).weight += weight * layer.get_delta_weight(adapter)
    return plain


@pytest.fixture
def model() -> Any:
    adapted = unet()
    adapted.add_adapter(config())
    adapted.add_adapter(config(r=2, scale=0.6), "two")
    return adapted


def test_adapters_are_set_weighted_switched_off_and_on(model, run):
    assert model.active_adapters() == ["two"]
    expected = {name: run(by_hand(model, {name: 1.0})) for name in ("default", "two")}
    for name in ("default", "two"):
        model.set_adapter(name)
        torch.testing.assert_close(run(model), expected[name])
    both = run(by_hand(model, {"default": 0.5, "two": 2.0}))
    model.set_adapters(["default", "two"], [0.5, 2.0])
    torch.testing.assert_close(run(model), both)
    model.set_adapters("default")
    torch.testing.assert_close(run(model), expected["default"])
    model.disable_lora()
    torch.testing.assert_close(run(model), run(unet()))
    model.enable_lora()
    half = by_hand(model, {"default": 0.5})
    torch.testing.assert_close(run(model, cross_attention_kwargs={"scale": 0.5}), run(half))
    torch.testing.assert_close(run(model), expected["default"])


def test_adapters_are_fused_unfused_deleted_and_unloaded(model, run):
    model.set_adapter("default")
    expected = run(model)
    model.fuse_lora(safe_fusing=True)
    torch.testing.assert_close(run(model), expected)
    with pytest.raises(ValueError, match=r"^default: merged adapters cannot be deleted"):
        model.delete_adapters("default")
    model.unfuse_lora()
    torch.testing.assert_close(run(model), expected)
    model.delete_adapters("two")
    torch.testing.assert_close(run(model), expected)
    model.unload_lora()
    torch.testing.assert_close(run(model), run(unet()))
    assert not [name for name in model.state_dict() if "tucker_" in name]
    model.add_adapter(config())
    assert (run(model) - run(unet())).abs().max() > 1e-3


def test_adapters_are_saved_and_loaded_by_pefts_functions(model, run, tmp_path):
    """The route that the documentation gives: save_lora_adapter's file is read by diffusers as LoRA's only."""
    model.set_adapter("two")
    expected = run(model)
    model.peft_config["two"].save_pretrained(tmp_path)
    save_file(get_peft_model_state_dict(model, adapter_name="two"), tmp_path / "adapter_model.safetensors")
    again = unet()
    again.add_adapter(peft.PeftConfig.from_pretrained(tmp_path), "two")
    set_peft_model_state_dict(again, load_file(tmp_path / "adapter_model.safetensors"), "two")
    torch.testing.assert_close(run(again), expected)


def test_what_diffusers_cannot_load_leaves_the_model_alone(model, run, tmp_path):
    model.save_lora_adapter(tmp_path)
    again = unet()
    with pytest.raises(TypeError, match="LoraConfig"):
        again.load_lora_adapter(tmp_path, prefix=None, weight_name=Path(*tmp_path.glob("*.safetensors")).name)
    torch.testing.assert_close(run(again), run(unet()))


@pytest.mark.parametrize("form", ["auto", "factored", "merged"])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn])
def test_layerwise_casting_casts_the_base_and_not_the_adapter(form, storage, run):
    images, words = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    model = unet().float()
    model.add_adapter(config(forward=form))
    rounded = unet().float()
    for name, layer in model.named_modules():
        if isinstance(layer, flora.FloraLayer):
            base = rounded.get_submodule(name)
            for parameter in base.parameters(recurse=False):
                parameter.copy_(parameter.to(storage))
            base.weight += layer.get_delta_weight("default")
    others = tuple(f"^{name}$" for name, layer in model.named_modules() if not _adapted(model, name, layer))
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32, skip_modules_pattern=others)
    kept = {layer.base_layer.weight.dtype for layer in model.modules() if isinstance(layer, flora.FloraLayer)}
    assert kept == {storage}
    output: Tensor = model(images, 3, words).sample
    torch.testing.assert_close(output, rounded(images, 3, words).sample, rtol=1e-4, atol=1e-5)


def _adapted(model: Any, name: str, layer: Any) -> bool:
    """Whether a module is, holds or belongs to an adapted layer."""
    parts = name.split(".")
    above = [model.get_submodule(".".join(parts[:count])) for count in range(1, len(parts))]
    return any(isinstance(module, flora.FloraLayer) for module in [*above, *layer.modules()])
