"""A tensor that is computed anew each time that it is asked for, so that writing to it is a mistake."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from flora.replaced.lazy import SAME_MEMORY, written


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
        value.refuse()


_SHARING = SAME_MEMORY | {Tensor.__getitem__}  # what gives the memory of a whole tensor or of a part of it


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

    def refuse(self) -> NoReturn:
        raise RuntimeError(
            f"{self.of_parameter}: the parameter reads as W + update, computed anew each time: what is written to it "
            "would be lost; write to W while the adapter is disabled (disable_adapter) or merged"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for target in written(func, args, kwargs):
            if isinstance(target, cls):
                target.refuse()
        if len(types) > 1:  # another kind has to know its own among the arguments
            with torch._C.DisableTorchFunctionSubclass():
                args, kwargs = tree_map_only(cls, lambda tensor: tensor.as_subclass(Tensor), (args, kwargs))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if func in _SHARING and isinstance(args[0], cls):
            part = func is Tensor.__getitem__
            if not part or (args[0].parts and result._is_view()):
                return cls.of(result, args[0].of_parameter, True)
        return result
