"""A tensor that is computed anew each time that it is asked for, so that writing to it is a mistake."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from flora.replaced.lazy import SAME_MEMORY, written


def guarded(value: Any, name: str) -> Any:
    """The same values as a tensor that cannot be written to; ``name`` is what the refusal names.

    Left as it is where others look on: torch.jit, functorch and dispatch modes know tensors by their identity.
    """
    watched = torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.maybe_current_level() is not None
    if type(value) is not Tensor or watched or torch._C._get_tracing_state() is not None:
        return value
    return _Guarded.of(value, name)


class _Guarded(Tensor):
    """W + update. Operations on it give plain tensors; those that would write to it are refused."""

    of_parameter: str

    @classmethod
    def of(cls, value: Tensor, name: str) -> Tensor:
        made = value.as_subclass(cls)
        made.of_parameter = name
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for target in written(func, args, kwargs):
            if isinstance(target, cls):
                raise RuntimeError(
                    f"{target.of_parameter}: the parameter reads as W + update, computed anew each time: what is "
                    "written to it would be lost; write to W while the adapter is disabled (disable_adapter) or merged"
                )
        if any(kind is not cls for kind in types):  # another kind has to know its own among the arguments
            with torch._C.DisableTorchFunctionSubclass():
                args, kwargs = tree_map_only(cls, lambda tensor: tensor.as_subclass(Tensor), (args, kwargs))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if func in SAME_MEMORY or (func is Tensor.__getitem__ and result._is_view() and isinstance(args[0], cls)):
            return cls.of(result, args[0].of_parameter)
        return result
