"""The weight of an adapted layer as code sees it that reads it: computed when its values are used, never written to."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from flora.replaced.guarded import guarded, refuse, shares, written

_T: Any = Tensor
_KNOWN = {
    *(getattr(_T, name).__get__ for name in ("dtype", "device", "shape", "layout", "ndim", "is_cuda", "is_cpu")),
    *(getattr(_T, name).__get__ for name in ("is_meta", "is_sparse", "is_quantized", "itemsize", "requires_grad")),
    *(_T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.element_size, _T.get_device, _T.__len__),
    *(_T.is_floating_point, _T.is_complex, _T.is_signed, torch.is_floating_point, torch.is_complex, torch.numel),
}  # what is known without the values


def lazy(
    name: str,
    base: Tensor,
    compute: Callable[[], Tensor],
    stamp: Callable[[], Any],
    parameters: Iterable[nn.Parameter],
) -> Tensor:
    """What ``compute`` gives, as a tensor of the shape, dtype and device of ``base``, computed at its first use.

    It is computed at once for a base that is no plain tensor and where torch.compile, torch.jit or functorch look on.

    Args:
        name: what messages call it.
        base: a tensor like the result.
        compute: gives the result.
        stamp: tells states apart that give different results: one that has changed before the first use is an error.
        parameters: what gradients of the result go to.
    """
    plain = type(base) is Tensor or type(base) is nn.Parameter
    if torch.compiler.is_compiling() or not plain or torch._C._get_tracing_state() is not None:
        return compute()
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0:
        return compute()
    value = _Value(name, compute, stamp)
    trained = [parameter for parameter in parameters if parameter.requires_grad] if value.with_gradient else []
    return _Unbuilt.apply(value, base, *trained) if trained else _Lazy.of(value, base)


class _Value:
    """A tensor that is computed once, in the state in which it was asked for."""

    def __init__(self, name: str, compute: Callable[[], Tensor], stamp: Callable[[], Any]) -> None:
        self.name: str = name
        self.compute: Callable[[], Tensor] = compute
        self.stamp: Callable[[], Any] = stamp
        self.with_gradient = torch.is_grad_enabled()
        self.asked_in = stamp()
        self.made: Tensor | None = None

    def get(self) -> Tensor:
        if self.made is None:
            if self.stamp() != self.asked_in:
                raise RuntimeError(
                    f"{self.name}: was read before its adapters or their parameters changed, and used after that; read "
                    "it again, or keep a copy of what it was (detach)"
                )
            # A checkpoint that repeats the use must not see the building, which is not repeated.
            unseen = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
            with torch.set_grad_enabled(self.with_gradient), unseen:
                self.made = self.compute()
        return self.made


class _Unbuilt(torch.autograd.Function):
    """Links a tensor that is not computed yet to the parameters it will be computed from.

    Only code that takes it past ``__torch_function__`` (autograd functions, scripted ones) sends gradients here.
    """

    @staticmethod
    def forward(ctx: Any, value: _Value, base: Tensor, *trained: Tensor) -> Tensor:
        ctx.value, ctx.trained = value, trained
        return _Lazy.of(value, base)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        made = ctx.value.get()
        return (
            None,
            None,
            *torch.autograd.grad(made, ctx.trained, gradient, retain_graph=True, create_graph=again, allow_unused=True),
        )


class _Lazy(Tensor):
    """Stands for a tensor; has no memory of its own, so that what reads that fails."""

    value: _Value

    @classmethod
    def of(cls, value: _Value, base: Tensor) -> Tensor:
        about: Any = {"dtype": base.dtype, "device": base.device, "layout": base.layout, "requires_grad": False}
        made = Tensor._make_wrapper_subclass(cls, base.shape, strides=base.stride(), **about)
        made.value = value
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        for target in written(func, args, kwargs):
            if isinstance(target, _Lazy):
                refuse(target.value.name)
        built = _guarded if shares(func) else _plain
        args, kwargs = tree_map_only(_Lazy, built, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, _Lazy):
                refuse(given.value.name)
        args, kwargs = tree_map_only(_Lazy, lambda tensor: tensor.value.get().detach(), (args, kwargs))
        return func(*args, **kwargs)


def _plain(tensor: _Lazy) -> Tensor:
    return tensor.value.get()


def _guarded(tensor: _Lazy) -> Tensor:
    return guarded(tensor.value.get(), tensor.value.name)
