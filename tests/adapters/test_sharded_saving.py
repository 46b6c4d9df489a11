"""Adapters of distributed models: a shard is never saved as if it were the whole tensor."""

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import flora


@pytest.fixture
def model() -> Any:
    net = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Flatten(), nn.Linear(6, 4))
    return peft.get_peft_model(net, flora.FloraConfig(r=4, target_modules=["0", "2"], init_weights=False))


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Two processes, of which this one is the first and the other does not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield DeviceMesh("cpu", [0, 1])
    finally:
        dist.destroy_process_group()


def test_a_partitioned_core_is_refused_and_a_gathered_state_dict_is_saved(model, tmp_path):
    gathered = {name: value.clone() for name, value in model.state_dict().items()}
    core = model.get_submodule("base_model.model.2").core("default")
    core.data = torch.empty(0)  # what DeepSpeed ZeRO-3 leaves between uses
    message = r"base_model\.model\.2\.tucker_core.*: a shard of a distributed model is not saved as if whole"
    with pytest.raises(ValueError, match=message):
        get_peft_model_state_dict(model)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    model.save_pretrained(tmp_path, state_dict=gathered)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(
        saved["base_model.model.2.tucker_core.weight"], gathered["base_model.model.2.tucker_core.default.weight"]
    )


def test_sharded_tensors_are_refused_and_replicated_ones_saved(model, mesh, tmp_path):
    layer = model.get_submodule("base_model.model.2")
    core = layer.core("default").detach().clone()
    held = layer.tucker_core["default"]
    held["weight"] = nn.Parameter(distribute_tensor(core, mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"tucker_core.*: a shard of a distributed model"):
        model.save_pretrained(tmp_path)
    held["weight"] = nn.Parameter(distribute_tensor(core, mesh, [Replicate()]))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.2.tucker_core.weight"]
    torch.testing.assert_close(saved, core, rtol=0, atol=0)
