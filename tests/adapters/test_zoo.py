"""The whole life of an adapter on many families of models: wrap, train, save, load, merge."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import flora

from .zoo import ZOO, Entry, every_layer


def build(entry: Entry) -> nn.Module:
    torch.manual_seed(1)
    return entry.build().eval()


def outputs(model: nn.Module, entry: Entry, inputs: dict[str, Any]) -> Tensor:
    result = model(**inputs) if "input" in str(list(inputs)) else model(*inputs.values())
    return result if isinstance(result, Tensor) else result[entry.output]


def config(entry: Entry) -> flora.FloraConfig:
    settings = copy.deepcopy(entry.settings)
    if "target_modules" not in settings:
        settings["target_modules"] = every_layer(entry.build(), without=settings["modules_to_save"][0])
    return flora.FloraConfig(r=4, kernel_rank=2, **settings)


@pytest.mark.parametrize("name", ZOO)
def test_wrap_train_save_load_merge(name: str, tmp_path: Path):
    entry = ZOO[name]
    inputs = entry.inputs()
    before = outputs(build(entry), entry, inputs)

    model = peft.get_peft_model(build(entry), config(entry)).eval()
    start = outputs(model, entry, inputs)
    assert (start - before).abs().max() <= 1e-6 * before.abs().max()

    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    initial = {key: p.detach().clone() for key, p in trained.items()}
    optimiser = torch.optim.AdamW(trained.values(), lr=3e-2)
    for _ in range(3):
        optimiser.zero_grad()
        logits = outputs(model, entry, inputs)
        torch.nn.functional.cross_entropy(
            logits.flatten(0, -2), torch.zeros(logits[..., 0].numel(), dtype=int)
        ).backward()
        optimiser.step()
    unmoved = [key for key, p in trained.items() if torch.equal(p, initial[key])]
    assert not unmoved
    after = outputs(model, entry, inputs)
    assert (after - before).abs().max() > 1e-3 * before.abs().max()

    model.save_pretrained(tmp_path)
    # A saved adapter holds itself, and with targeted token embeddings PEFT adds those.
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {key for key in stored if ".tucker_" in key} == {
        key.replace(".default", "") for key in trained if ".tucker_" in key
    }
    loaded = peft.PeftModel.from_pretrained(build(entry), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(outputs(loaded, entry, inputs), outputs(model, entry, inputs))

    merged = loaded.merge_and_unload()
    assert not [key for key in merged.state_dict() if "tucker" in key or "base_layer" in key]
    with torch.no_grad():
        assert (outputs(merged, entry, inputs) - after).abs().max() <= 1e-5 * after.abs().max()
