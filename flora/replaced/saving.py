"""What is saved of an adapter: every tensor of it, whatever the adapter is called, and each whole."""

from collections.abc import Iterator, Sequence
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def check_adapter_name(name: object) -> None:
    """Raise ValueError unless torch can keep an adapter under this name."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"adapter_name: {name!r} cannot name an adapter; take a word without dots that is no attribute of "
            "torch.nn.ModuleDict"
        )


def put_back(model: nn.Module, adapter: str, others: Sequence[str], layer_type: type, state: dict[str, Tensor]) -> None:
    """Put back what PEFT took for another adapter's: entries in which another's name names a module or a parameter.

    Args:
        model: the model that carries the adapters.
        adapter: the adapter that is saved.
        others: the names of all others.
        layer_type: the class of adapted layers.
        state: entries of the model's state dict, completed in place: PEFT goes on with them.
    """
    for key, value in _tensors_of(model, adapter, layer_type):
        if key not in state and any(f".{other}." in key or key.endswith(f".{other}") for other in others):
            state[key] = value.detach()


def without(model: nn.Module, others: Sequence[str], layer_type: type, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries that are not another adapter's, which PEFT leaves in where the other's name names every module."""
    theirs = {key for other in others for key, _ in _tensors_of(model, other, layer_type)}
    return {key: value for key, value in state.items() if key not in theirs}


def _tensors_of(model: nn.Module, adapter: str, layer_type: type) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, layer_type):
            containers: Sequence[str] = module.adapter_layer_names  # type: ignore[attr-defined]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            containers = module.adapter_layer_names
        else:
            continue
        for container in containers:
            owner, _, attribute = container.rpartition(".")
            held: Any = getattr(module.get_submodule(owner), attribute)
            if adapter not in held:
                continue
            prefix = f"{name}.{container}.{adapter}".lstrip(".")
            own = held[adapter]
            entries = own.state_dict(keep_vars=True).items() if isinstance(own, nn.Module) else [("", own)]
            for key, value in entries:
                full = f"{prefix}.{key}".rstrip(".")
                yield full.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", ""), value


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter, each whole on this process.

    Raises:
        ValueError: for the first that is a shard.
    """
    return {key: _whole(key, value) for key, value in state.items()}


def _whole(key: str, value: Tensor) -> Tensor:
    local = value.to_local() if isinstance(value, DTensor) else value
    if local.shape == value.shape and local.numel():  # ZeRO-3 leaves none of a parameter's
        return local
    raise ValueError(
        f"{key}: a shard of a distributed model is not saved as if whole; pass the gathered state dict, e.g. "
        "save_pretrained(folder, state_dict=accelerator.get_state_dict(model))"
    )
