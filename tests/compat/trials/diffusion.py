"""diffusers: a small UNet trained, saved, loaded, fused; adapters that pipelines load."""

import copy
from typing import Any

import peft
import torch
from torch import Tensor, nn

from ..frame import trial
from ..methods import Method
from ..reference import SINGLE, TIGHT, assert_close, by_hand, compare_steps, three_steps

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ALL = [
    *ATTENTION,
    "conv1",
    "conv2",
    "conv_in",
    "proj_in",
    "ff.net.0.proj",
    "ff.net.2",
    "time_emb_proj",
    "conv_shortcut",
]
NEEDS = ("diffusers",)


def unet() -> Any:
    import diffusers

    torch.manual_seed(3)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    ).double().eval()  # fmt: skip


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def predicted(network: nn.Module) -> Tensor:
    return network(noise(2, 4, 8, 8), torch.tensor([3, 700]), encoder_hidden_states=noise(2, 5, 16, seed=1)).sample


def loss(network: nn.Module) -> Tensor:
    return (predicted(network) - noise(2, 4, 8, 8, seed=2)).square().mean()


@trial("diffusers", "UNet2DConditionModel under get_peft_model, attention and convolutions, three steps", needs=NEEDS)
def wrapped(method: Method) -> None:
    three_steps(method, unet(), ALL, loss)


@trial("diffusers", "UNet with gradient checkpointing, an evaluation before backward, three steps", needs=NEEDS)
def checkpointed(method: Method) -> None:
    def step(network: nn.Module) -> Tensor:
        value = loss(network)
        with torch.no_grad():
            predicted(network)
        return value

    model = unet().train()
    model.enable_gradient_checkpointing()
    three_steps(method, model, ALL, step)


@trial("diffusers", "unet.add_adapter, set_adapter, disable_adapters, delete_adapters; three steps", needs=NEEDS)
def added(method: Method) -> None:
    base = unet()
    model = copy.deepcopy(base)
    model.add_adapter(method.config(ALL))
    model.add_adapter(method.config(ATTENTION), "other")
    model.set_adapter("default")
    compare_steps(method, model, by_hand(method, base, model), loss)
    model.set_adapters(["default", "other"], [0.5, 0.0])
    model.disable_adapters()
    assert_close(predicted(model), predicted(base), TIGHT, "output without adapters")
    model.enable_adapters()
    model.set_adapters(["other"], [1.0])
    assert_close(predicted(model), predicted(by_hand(method, base, model, "other")), TIGHT, "output of the other")
    model.delete_adapters(["other"])
    model.set_adapters(["default"], [1.0])
    assert_close(predicted(model), predicted(by_hand(method, base, model)), TIGHT, "output after deleting the other")


@trial("diffusers", "save_pretrained of the adapter, from_pretrained into a new UNet, merge_and_unload", needs=NEEDS)
def saved(method: Method) -> None:
    import diffusers

    base = unet()
    model = three_steps(method, base, ALL, loss)
    expected = predicted(by_hand(method, base, model))
    model.save_pretrained("adapter")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), "adapter").eval()
    assert_close(predicted(loaded), expected, TIGHT, "output of the loaded adapter")
    loaded.merge_and_unload().save_pretrained("merged")
    merged = diffusers.UNet2DConditionModel.from_pretrained("merged").double().eval()
    assert_close(predicted(merged), expected, SINGLE, "output of the merged UNet")


@trial("diffusers", "fuse_lora with a scale, unfuse_lora", needs=NEEDS)
def fused(method: Method) -> None:
    base = unet()
    model = copy.deepcopy(base)
    model.add_adapter(method.config(ALL))
    expected = predicted(by_hand(method, base, model))
    model.fuse_lora()
    assert_close(predicted(model), expected, TIGHT, "fused output")
    model.unfuse_lora()
    assert_close(predicted(model), expected, TIGHT, "output after unfusing")
    model.fuse_lora(lora_scale=0.5, safe_fusing=True)
    half = by_hand(method, base, model)
    for (name, key), update in half.updates.items():
        layer = base.get_submodule(name)
        layer.weight.data += 0.5 * (getattr(half.get_submodule(name), key) - layer.weight).detach()
        del update
    assert_close(predicted(model), predicted(base), TIGHT, "output fused at half its scale")


@trial(
    "diffusers",
    "save_lora_adapter and load_lora_adapter, which are of LoRA's matrices only",
    needs=NEEDS,
    expected={"FLoRA": "fails: TypeError: `LoraConfig` class could not be instantiated."},
)
def saved_by_diffusers(method: Method) -> None:
    base = unet()
    model = copy.deepcopy(base)
    model.add_adapter(method.config(ALL))
    expected = predicted(by_hand(method, base, model))
    model.save_lora_adapter("adapter")
    loaded = copy.deepcopy(base)
    loaded.load_lora_adapter("adapter", weight_name="pytorch_lora_weights.safetensors", prefix=None)
    assert_close(predicted(loaded), expected, TIGHT, "output of the loaded adapter")


@trial("diffusers", "unet.add_adapter, saved and loaded by PEFT's functions for state dicts", needs=NEEDS)
def saved_by_peft(method: Method) -> None:
    base = unet()
    model = copy.deepcopy(base)
    model.add_adapter(method.config(ALL))
    expected = predicted(by_hand(method, base, model))
    model.peft_config["default"].save_pretrained("adapter")
    state = {key: value.clone() for key, value in peft.get_peft_model_state_dict(model).items()}
    loaded = copy.deepcopy(base)
    loaded.add_adapter(peft.PeftConfig.from_pretrained("adapter"))
    peft.set_peft_model_state_dict(loaded, state)
    assert_close(predicted(loaded), expected, TIGHT, "output of the loaded adapter")


@trial("diffusers", "an adapter converted to LoRA, loaded by unet.load_lora_adapter", needs=NEEDS, skipped=("LoRA",))
def converted(method: Method) -> None:
    from flora.adapters.export import to_lora

    base = unet()
    model = method.wrap(copy.deepcopy(base), ALL, rank_pattern={"to_q": 2, "conv1": [3, 4, 2, 1]})
    expected = predicted(by_hand(method, base, model))
    to_lora(model, "lora")
    loaded = copy.deepcopy(base)
    loaded.load_lora_adapter("lora", weight_name="adapter_model.safetensors", prefix="base_model.model")
    assert_close(predicted(loaded), expected, SINGLE, "output of the LoRA")


@trial("diffusers", "enable_layerwise_casting: weights stored in float8, computed in float32", needs=NEEDS)
def layerwise(method: Method) -> None:
    from diffusers.training_utils import cast_training_params

    def build() -> Any:
        model = unet().float()
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        return model

    model, plain = build(), unet().float()
    for (_, p), (_, stored) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        p.data = stored.data.float()
    model.add_adapter(method.config(ATTENTION))
    cast_training_params(model, torch.float32)  # as its training scripts do
    inputs = {"encoder_hidden_states": noise(2, 5, 16, seed=1).float(), "timestep": torch.tensor([3, 700])}
    with torch.no_grad():
        before = model(noise(2, 4, 8, 8).float(), **inputs).sample
    expected = by_hand(method, plain, model)(noise(2, 4, 8, 8).float(), **inputs).sample
    assert_close(before, expected, SINGLE, "output")
