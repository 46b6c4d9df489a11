"""A tensor that is computed when an operation needs its values."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_T: Any = Tensor
_KNOWN = {
    *(getattr(_T, name).__get__ for name in ("dtype", "device", "shape", "layout", "ndim", "is_cuda", "is_cpu")),
    *(getattr(_T, name).__get__ for name in ("is_meta", "is_sparse", "is_quantized", "itemsize")),
    *(_T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.element_size, _T.get_device, _T.__len__),
    *(_T.is_floating_point, _T.is_complex, _T.is_signed, torch.is_floating_point, torch.is_complex, torch.numel),
}  # what the base tells as well
SAME_MEMORY = {_T.data.__get__, _T.detach, torch.detach}  # of a stored tensor, a write to these would reach it


def lazy(base: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """What ``compute`` gives, as a tensor of the shape, dtype and device of ``base``, computed at its first use.

    It is computed at once for a base that is no plain tensor and where torch.compile, torch.jit or functorch look on.
    """
    plain = type(base) is Tensor or type(base) is nn.Parameter
    if torch.compiler.is_compiling() or not plain or torch._C._get_tracing_state() is not None:
        return compute()
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return compute()
    return _Lazy.of(base, compute)


class _Lazy(Tensor):
    """Stands for a tensor; its own memory, which nothing reads, is that of a tensor of the same shape."""

    _compute: Callable[[], Tensor]

    @classmethod
    def of(cls, base: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        made = Tensor._make_subclass(cls, base.detach())
        made._compute = compute
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in SAME_MEMORY:
            whole = args[0]
            with torch._C.DisableTorchFunctionSubclass():
                return _Lazy.of(whole.detach(), lambda: whole._compute().detach())
        if any(isinstance(target, _Lazy) for target in written(func, args, kwargs)):
            raise RuntimeError(
                "the weight of an adapted layer is W + update, computed anew each time: what is written to it would be "
                "lost; write to layer.get_base_layer().weight, or disable the adapter"
            )
        args, kwargs = tree_map_only(_Lazy, lambda tensor: tensor._compute(), (args, kwargs))
        return func(*args, **kwargs)


def written(func: Any, args: Any, kwargs: Any) -> Iterable[Any]:
    """The tensors that a function of torch writes to."""
    if not _in_place(func) and "out" not in kwargs:
        return ()
    targets = [kwargs.get("out")]
    if _in_place(func):
        targets.append(args[0] if args else next(iter(kwargs.values()), None))
    return [tensor for target in targets for tensor in (target if isinstance(target, tuple | list) else [target])]


@lru_cache(1024)
def _in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    return name in ("__set__", "__delete__", "__setitem__") or name in _IN_PLACE


_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow")} | {
    f"__i{name}__" for name in ("and", "or", "xor", "lshift", "rshift")
}
