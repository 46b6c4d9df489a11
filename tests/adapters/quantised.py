"""Quantised layers made by hand: each way in which libraries keep a weight that cannot be added to."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

FLOAT8 = torch.float8_e4m3fn


class Rounded(Tensor):
    """A tensor that holds 8-bit integers and says that it is a float tensor, as torchao's and optimum-quanto's do."""

    @staticmethod
    def __new__(cls, codes: Tensor, step: Tensor) -> "Rounded":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=step.dtype, device=codes.device)

    def __init__(self, codes: Tensor, step: Tensor) -> None:
        self.codes, self.step = codes, step

    @classmethod
    def of(cls, weight: Tensor) -> "Rounded":
        step = weight.detach().abs().max() / 127
        return cls((weight.detach() / step).round().to(torch.int8), step)

    def plain(self) -> Tensor:
        return self.codes.to(self.step.dtype) * self.step

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].codes, args[0].step)
        if func is torch.ops.aten._to_copy.default and "dtype" in kwargs:
            return cls(args[0].codes, args[0].step.to(kwargs["dtype"]))
        args, kwargs = tree_map_only(cls, cls.plain, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **kwargs: Any) -> str:
        return "Rounded()"


def rounded(layer: nn.Module, name: str = "weight") -> nn.Module:
    """The layer with a weight whose class says how it computes (torchao, optimum-quanto when frozen)."""
    setattr(layer, name, nn.Parameter(Rounded.of(getattr(layer, name)), requires_grad=False))
    return layer


class Integers(nn.Linear):
    """An integer weight and a forward that unpacks it (bitsandbytes, EETQ)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        weight = Rounded.of(linear.weight)
        self.step, self.bias = weight.step, linear.bias
        self.weight = nn.Parameter(weight.codes, requires_grad=False)

    def unpacked(self) -> Tensor:
        return self.weight * self.step

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.unpacked().to(x.dtype), self.bias.to(x.dtype))


class Float8(Integers):
    """A float8 weight, whose dtype counts as floating-point (transformers' FP8Linear)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.weight = nn.Parameter(linear.weight.detach().to(FLOAT8), requires_grad=False)

    def unpacked(self) -> Tensor:
        return self.weight.float()


class AtUse(nn.Linear):
    """A plain weight that is quantised whenever the layer runs (optimum-quanto before it is frozen)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias

    @property
    def qweight(self) -> Tensor:
        return Rounded.of(self.weight)

    def unpacked(self) -> Tensor:
        return self.qweight.plain()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.unpacked().to(x.dtype), self.bias.to(x.dtype))


class Packed(nn.Module):
    """No nn.Linear and no weight, but packed integers (GPTQ, AWQ, HQQ)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = Rounded.of(linear.weight)
        self.register_buffer("qweight", weight.codes.mT.contiguous())
        self.register_buffer("scales", weight.step)
        self.bias = linear.bias

    def unpacked(self) -> Tensor:
        return self.qweight.mT * self.scales

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.unpacked().to(x.dtype), self.bias.to(x.dtype))


LINEAR: dict[str, Any] = {
    "tensor subclass": rounded,
    "integers": Integers,
    "float8": Float8,
    "quantised at use": AtUse,
    "packed": Packed,
}


def dequantised(layer: Any) -> Tensor:
    """The weight that a layer of ``LINEAR`` runs with."""
    return layer.weight.plain() if isinstance(getattr(layer, "weight", None), Rounded) else layer.unpacked().detach()
