"""FSDP2: every parameter in shards, one a process, gathered block by block where a pass needs it."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flora.launch import processes
from flora.training.internals import mark_sharded, own_parameters


def shard(model: nn.Module, device: torch.device) -> None:
    """Share a model's parameters out over all processes, in place; they must be equal there and lie on the CPU.

    Blocks are what a network repeats: each is gathered for its own forward and backward pass. Only trained parameters
    need one dtype, so that a frozen model in bf16 may carry adapters in fp32.
    """
    mesh = init_device_mesh(device.type, (processes.count(),))
    network = model.get_base_model() if isinstance(model, peft.PeftModel) else model  # is called by itself to generate
    for module in dict.fromkeys([*reversed(_blocks(network)), network, model]):
        fully_shard(module, mesh=mesh)
    mark_sharded(network)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Modules with parts of their own that lie in a list beside others of their class, outer before inner."""
    blocks = []
    for container in network.modules():
        if isinstance(container, nn.Sequential | nn.ModuleList):
            kinds = Counter(type(child) for child in container)
            blocks += [child for child in container if kinds[type(child)] > 1 and any(child.children())]
    return blocks


def reshard(model: nn.Module) -> None:
    """Drop what is gathered, so that the model's parameters are its shards; a model without shards is left alone."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered if it is in shards; all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """A tensor, or this process's shard of it, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, sharded: Tensor) -> Tensor:
    """A whole tensor in shards like another; the tensor itself where the other is whole or of another shape."""
    if not isinstance(sharded, DTensor) or tensor.shape != sharded.shape:
        return tensor
    placed = tensor.to(sharded.device)
    return distribute_tensor(placed, sharded.device_mesh, sharded.placements, src_data_rank=None)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, the first process has the whole model, on the CPU, as what saves an adapter expects; all must ask."""
    reshard(model)
    own = [(own_parameters(module), name) for module in model.modules() for name in own_parameters(module)]
    places: list[tuple[Any, str, Any]] = [(h, n, p) for h, n in own if isinstance(p := h[n], DTensor)]
    for held, name, parameter in places:
        tensor = whole(parameter)
        if processes.first():
            held[name] = nn.Parameter(tensor.detach().cpu(), parameter.requires_grad)
    try:
        yield
    finally:
        for held, name, parameter in places:
            held[name] = parameter
