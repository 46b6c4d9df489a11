"""A tensor that is computed anew each time that it is asked for, so that writing to it is a mistake."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_T: Any = Tensor
SAME_MEMORY = {_T.data.__get__, _T.detach, torch.detach}  # of a stored tensor, a write to these would reach it
_VIEWS = {"__getitem__", "view", "view_as", "reshape", "flatten", "ravel", "t", "transpose", "swapaxes", "movedim"} | {
    *("permute", "squeeze", "unsqueeze", "unbind", "chunk", "split", "select", "narrow", "expand", "unflatten"),
    *("__iter__", "diagonal", "unfold", "adjoint", "tensor_split", "as_strided", "expand_as"),
}
_TURNED = {getattr(_T, name).__get__ for name in ("T", "mT", "H", "mH")}


_TRAINS = {_T.requires_grad_, _T.requires_grad.__set__}  # of a tensor without a gradient, that writes nothing


def shares(func: Any) -> bool:
    """Whether a function of torch gives the memory of a tensor, or of a part of it."""
    return func in SAME_MEMORY or func in _TURNED or getattr(func, "__name__", "") in _VIEWS


def refuse(name: str) -> NoReturn:
    """Raise RuntimeError: what reads as W + update was to be written to."""
    raise RuntimeError(
        f"{name}: reads as W + update, computed anew each time: what is written to it would be lost; write to W itself "
        "(that of get_base_layer(), where a layer is adapted) or while the adapter is disabled or merged"
    )


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


def guarded(value: Any, name: str, parts: bool = True) -> Any:
    """The same values as a tensor that cannot be written to.

    Left as it is where others look on: torch.jit, functorch and dispatch modes know tensors by their identity.

    Args:
        value: the tensor.
        name: what a refusal names.
        parts: whether its parts (``tensor[index]``) are guarded too, which costs some microseconds at each use of one;
            else ``check`` tells afterwards.
    """
    watched = torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.maybe_current_level() is not None
    if type(value) is not Tensor or watched or torch._C._get_tracing_state() is not None:
        return value
    return _Guarded.of(value, name, parts)


def check(value: Any) -> None:
    """Raise RuntimeError if parts of a guarded tensor have been written to."""
    if isinstance(value, _Guarded) and not value.is_inference() and value._version != value.made:
        refuse(value.of_parameter)


class _Guarded(Tensor):
    """W + update. Operations on it give plain tensors; those that would write to it are refused."""

    of_parameter: str
    parts: bool
    made: int

    @classmethod
    def of(cls, value: Tensor, name: str, parts: bool) -> Tensor:
        made = value.as_subclass(cls)
        made.of_parameter, made.parts = name, parts
        made.made = 0 if value.is_inference() else value._version
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__deepcopy__:
            return func(args[0].as_subclass(Tensor), *args[1:])
        for target in written(func, args, kwargs) if func not in _TRAINS or args[0].requires_grad else ():
            if isinstance(target, cls):
                refuse(target.of_parameter)
        if len(types) > 1:  # another kind has to know its own among the arguments
            with torch._C.DisableTorchFunctionSubclass():
                args, kwargs = tree_map_only(cls, lambda tensor: tensor.as_subclass(Tensor), (args, kwargs))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if not shares(func) or not isinstance(args[0], cls):
            return result
        whole = args[0]
        if func in SAME_MEMORY:
            return cls.of(result, whole.of_parameter, True)
        if not whole.parts:
            return result
        return tree_map_only(
            Tensor, lambda part: cls.of(part, whole.of_parameter, True) if part._is_view() else part, result
        )
