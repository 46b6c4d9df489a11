"""Modules that own adapted bare parameters: reading such a parameter gives W + update, while the module keeps W.

The class of an owner becomes one derived from it, of the same name, with a property for each adapted parameter. Nothing
is put in the parameters' place, so nothing can be left there by an interrupt, or be seen by a copy, a state dict, an
optimizer or another thread; and parameters are adapted whoever reads them: the owner's forward, another method of it,
or its parent (nn.ParameterList). What is computed is kept for one call of the owner, in a context variable.
"""

import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from typing_extensions import override

from flora.replaced.guarded import check, guarded

CHILD = "adapted_parameters"  # under which the adapter is a child of the owner

# The calls of owners that run now: id of the owner -> where the call began, what it has computed.
_CALLS: ContextVar[dict[int, tuple[Any, dict[Any, Any]]]] = ContextVar("flora_calls_of_owners", default={})  # noqa: B039
_CLASSES: WeakValueDictionary[Any, type] = WeakValueDictionary()
# Code that takes tensors out of modules to move or list them, rather than to compute: it gets W, as from a state dict.
_HANDLERS = ("accelerate.", "flora.replaced.", "torch.nn.modules.module")


class Owner(nn.Module):
    """The base of derived classes; ``_derived_from`` of each is the owner's own class, and the adapted names."""

    _derived_from: tuple[type[nn.Module], tuple[str, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the owner's class from taking a derived one for one of the user's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; a parameter that it reads several times is computed once."""
        if torch.compiler.is_compiling():  # finds what is computed twice by itself
            return super().__call__(*args, **kwargs)
        outer = _CALLS.get()
        computed: dict[Any, Any] = {}
        try:
            _CALLS.set({**outer, id(self): (_place(), computed)})
            result = super().__call__(*args, **kwargs)
        finally:
            _CALLS.set(outer)
        for _, value in computed.values():
            check(value)
        return result

    @override
    def __delattr__(self, name: str) -> None:
        layer: Any = self._modules.get(CHILD)
        if name in self._parameters and layer is not None and layer.adapts(name):
            raise ValueError(
                f"{layer.full_name(name)}: an adapted parameter cannot be deleted or parametrised; unload the adapter "
                "first"
            )
        super().__delattr__(name)

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = type(self)
        made, args, *state = super().__reduce_ex__(protocol)  # type: ignore[misc,str-unpack]
        if "_derived_from" not in vars(kind):
            return (made, args, *state)
        original, names = kind._derived_from
        made, *args = (original if part is kind else part for part in (made, *args))
        return (_remade, (names, made, *args), *state)


def adapt(owner: nn.Module, names: list[str]) -> None:
    """Have reads of these parameters of the owner, and of those named before, ask its adapter."""
    kind = type(owner)
    own, known = vars(kind).get("_derived_from", (kind, ()))
    key = own, tuple(sorted({*known, *names}))
    if (derived := _CLASSES.get(key)) is None:
        about = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
        properties = {name: _property(name) for name in key[1]}
        bases = (own,) if issubclass(own, Owner) else (Owner, own)
        derived = _CLASSES[key] = type(own)(own.__name__, bases, {**about, **properties, "_derived_from": key})
    owner.__class__ = derived


def release(owner: nn.Module) -> None:
    """Give the owner its own class back.

    Where a class was derived from ours in the meantime, it stays, and its properties give the parameters themselves.
    """
    owner.__class__ = vars(type(owner)).get("_derived_from", (type(owner),))[0]


def _remade(names: tuple[str, ...], made: Callable[..., nn.Module], *args: Any) -> nn.Module:
    owner = made(*args)
    adapt(owner, list(names))
    return owner


def _property(name: str) -> property:
    def read(self: nn.Module) -> Any:
        w = self.__dict__[name] if name in self.__dict__ else self.__getattr__(name)  # as Python would without us
        if (layer := self._modules.get(CHILD)) is None:
            return w
        # torch.compile cannot look at its caller; `is_compiling` would hold in all threads while one compiles.
        if not torch.compiler.is_dynamo_compiling() and _reader().startswith(_HANDLERS):
            return w
        return _read(self, layer, name, w)

    def write(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value  # what is no parameter, as in the replicas of nn.DataParallel

    def delete(self: nn.Module) -> None:
        del self.__dict__[name]

    return property(read, write, delete)


def _reader() -> str:
    return sys._getframe(2).f_globals.get("__name__", "")


def _read(owner: nn.Module, layer: Any, name: str, w: Any) -> Any:
    try:
        adapters = layer.adapting(name)
        if w is None or not adapters:
            return w
        if torch.compiler.is_compiling():
            return layer.adapted(name, w, adapters)
        began, computed = _CALLS.get().get(id(owner), (None, {}))
        if began != _place():
            return guarded(layer.adapted(name, w, adapters), layer.full_name(name))
        key = name, layer.stamp()
        of, value = computed.get(key, (None, None))
        if of is not w:
            value = guarded(layer.adapted(name, w, adapters), layer.full_name(name), parts=False)
            computed[key] = w, value
        return value
    except AttributeError as error:  # would have Python ask nn.Module.__getattr__, which knows W
        raise RuntimeError(f"{layer.full_name(name)}: {error}") from error


def _place() -> Any:
    """What must be the same for a value to be used again.

    Saved-tensor hooks tell a checkpointed part of the call, which the backward pass repeats without the call around it
    (the number of the pass tells that): it must compute there what it computed before.
    """
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch._C._current_graph_task_id(),
        torch._C._functorch.maybe_current_level(),
        torch._C._len_torch_dispatch_stack(),
    )
