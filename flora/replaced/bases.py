"""What a base layer's weight is kept as: plain numbers, to which an update can be added, or something quantised."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import parametrize

_PLAIN = {Tensor, nn.Parameter, nn.UninitializedParameter, FakeTensor, FunctionalTensor}
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_MARKS = ("quant_state", "quant_type", "CB")  # attributes of quantised parameters, before and after they are packed


def parametrised(owner: nn.Module, attribute: str) -> bool:
    """``torch.nn.utils.parametrize.is_parametrized``, in a tenth of the time."""
    return "parametrizations" in owner._modules and parametrize.is_parametrized(owner, attribute)


def plain(layer: nn.Module, name: str) -> bool:
    """Whether a weight is an ordinary parameter of the layer itself: quickly, and by far the most are."""
    weight = layer._parameters.get(name)
    ordinary = type(weight) is nn.Parameter and weight.dtype in FLOATS and weight.layout is torch.strided
    return ordinary and not hasattr(type(layer), "qweight")


def stored(owner: nn.Module, attribute: str) -> Any:
    """The tensor that a weight is kept as, looked up without computing anything; ``None`` where there is none.

    That of a parametrised weight is the first of its originals.
    """
    for tensors in (owner._parameters, owner._buffers):
        if (tensor := tensors.get(attribute)) is not None:
            return tensor
    if parametrised(owner, attribute):
        kept: Any = owner.parametrizations[attribute]  # type: ignore[index]
        return next(chain(kept.parameters(recurse=False), kept.buffers(recurse=False)), None)
    return getattr(owner, attribute, None)


def quantised_as(owner: nn.Module, attribute: str) -> str | None:
    """What a weight is quantised to, in a word, if it is; ``None`` for plain floating-point numbers.

    The dtype does not tell: tensor subclasses (torchao, optimum-quanto) report the one they compute in. Nor does the
    tensor where the layer quantises it at each use (optimum-quanto before it is frozen).
    """
    weight = stored(owner, attribute)
    if not isinstance(weight, Tensor):
        return type(owner).__name__
    if isinstance(weight, DTensor):
        weight = weight._local_tensor
    kind = type(weight)
    if kind not in _PLAIN and (_overrides(kind) or any(hasattr(weight, mark) for mark in _MARKS)):
        return kind.__name__
    if weight.dtype not in FLOATS:
        return str(weight.dtype)
    if weight.layout is not torch.strided:
        return str(weight.layout)
    return type(owner).__name__ if _quantises(owner) else None


def unpacks(owner: nn.Module, attribute: str) -> bool:
    """Whether a layer's class has a forward of its own because it quantises, and else is what it is derived from."""
    weight = stored(owner, attribute)
    return _quantises(owner) or not isinstance(weight, Tensor) or weight.dtype not in FLOATS


def _quantises(owner: nn.Module) -> bool:
    """Whether a layer computes the quantised weight that it runs with (optimum-quanto)."""
    return hasattr(type(owner), "qweight") and getattr(owner, "weight_qtype", True) is not None


def _overrides(kind: type[Tensor]) -> bool:
    """Whether tensors of a kind do other than plain ones do."""
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    plain = (Tensor.__torch_function__.__func__, nn.Parameter.__torch_function__)  # type: ignore[attr-defined]
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ or function not in plain


def spread_like(update: Tensor, weight: DTensor) -> DTensor:
    """An update that every process has whole, laid out as a weight is that tensor parallelism spreads over devices."""
    whole = [Replicate()] * weight.device_mesh.ndim
    return DTensor.from_local(update, weight.device_mesh, whole, run_check=False).redistribute(
        placements=weight.placements
    )


def make_same(parameters: Iterable[Tensor], weight: DTensor) -> None:
    """Have all processes that share a weight take the parameters of the first."""
    mesh = weight.device_mesh
    for parameter in parameters:
        for dim in range(mesh.ndim):
            if not parameter.is_meta:
                torch.distributed.broadcast(parameter.data, group=mesh.get_group(dim), group_src=0)


def packed_linear(module: nn.Module) -> bool:
    """Whether a module that is no nn.Linear is one in effect: it has its sizes, and keeps quantised numbers itself."""
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    if not all(isinstance(size, int) for size in sizes) or isinstance(module, nn.Linear):
        return False
    if callable(getattr(module, "weight", None)):
        return True  # torch.ao.nn.quantized: a method unpacks it
    own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    names = [name for name, tensor in own if tensor.dim() > 0]
    return any(quantised_as(module, name) for name in (["weight"] if "weight" in names else names))
