"""Layers run with other weights than their own, and where their own are kept.

``torch.func.functional_call`` puts weights into the layer for one call. A parametrised weight undoes that (it is set
through the inverse of its parametrization, without a gradient), and so does accelerate's offloading (its hook loads the
layer's own again): such a layer is stood in for by a copy that shares all else.
"""

import contextlib
import threading
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flora.replaced.bases import parametrised


def place(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a parameter or buffer of that name, and its name there."""
    owner, _, attribute = name.rpartition(".")
    return root.get_submodule(owner) if owner else root, attribute


def value(root: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a module, by its full name; of an offloaded one a copy where the module runs."""
    owner, attribute = place(root, name)
    with _swapping():
        tensor = getattr(owner, attribute)
    if isinstance(tensor, Tensor) and tensor.is_meta:
        for _, hook, key in _kept_by(root, name):
            return hook.weights_map[key].to(hook.execution_device)
    return tensor


def set_by_hook(root: nn.Module, name: str) -> bool:
    """Whether a hook computes a weight anew for each call (torch.nn.utils.prune, the first weight_norm)."""
    owner, attribute = place(root, name)
    made_of = (f"{attribute}_{end}" in owner._parameters for end in ("orig", "g", "v"))
    return isinstance(vars(owner).get(attribute), Tensor) and any(made_of)  # FSDP keeps plain tensors there too


def store(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Put new numbers into a plain parameter of a module, and into what keeps them while it is offloaded."""
    parameter = getattr(*place(root, name))
    if not parameter.is_meta or tensor.is_meta:
        parameter.data = tensor
    for module, hook, key in _kept_by(root, name):
        everything = [name for name, _ in module.named_parameters()] + [name for name, _ in module.named_buffers()]
        others = {name: hook.weights_map[name] for name in everything if name != key and name in hook.weights_map}
        hook.weights_map = others | {key: tensor.detach().cpu()}


def _kept_by(root: nn.Module, name: str) -> Iterator[tuple[nn.Module, Any, str]]:
    """The hooks that offload the tensor of that name, with the module that they hook and the name that they know."""
    parts = name.split(".")
    for depth in range(len(parts)):
        module, key = root.get_submodule(".".join(parts[:depth])), ".".join(parts[depth:])
        yield from ((module, h, key) for h in offloading(module) if h.place_submodules or depth == len(parts) - 1)


def offloading(module: nn.Module) -> list[Any]:
    """The hooks with which accelerate keeps a module's tensors elsewhere until its forward runs."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return []
    return [part for part in (hook, *getattr(hook, "hooks", ())) if getattr(part, "offload", False)]


def run(root: nn.Module, weights: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
    """What the module gives with these weights (by name) in place of its own; its hooks run too."""
    modules = root.modules() if root._modules else (root,)
    needs_copy = any(parametrised(*place(root, name)) for name in weights) or any(map(offloading, modules))
    if not needs_copy and torch._C._get_tracing_state() is None:  # functional_call refuses a traced module
        with _swapping():
            return torch.func.functional_call(root, weights, args, kwargs)
    for hook in offloading(root):
        args, kwargs = send_to_device((args, kwargs), hook.execution_device)
    return _copy(root, root, "", weights)(*args, **kwargs)


def run_alone(root: nn.Module, weights: dict[str, Tensor], *args: Any) -> Any:
    """The module's own forward with these weights, without its hooks."""
    return _copy(root, root, "", weights).forward(*args)


_SWAPS = threading.RLock()  # held while a layer bears other weights than its own, which no thread must read


def _swapping() -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if torch.compiler.is_dynamo_compiling() else _SWAPS


def _copy(root: nn.Module, module: nn.Module, prefix: str, weights: dict[str, Tensor]) -> nn.Module:
    copy: Any = object.__new__(parametrize.type_before_parametrizations(module))
    state = dict(vars(module))
    hooked = state.pop("_hf_hook", None) is not None
    forward = state.pop("_old_forward", None) if hooked else state.get("forward")
    state.pop("forward", None)
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        own = isinstance(forward, MethodType) and forward.__self__ is module
        state["forward"] = MethodType(forward.__func__, copy) if own else forward
    for kind in ("_parameters", "_buffers"):
        state[kind] = {
            name: tensor if tensor is None else weights.get(prefix + name, value(root, prefix + name))
            for name, tensor in state[kind].items()
        }
    children = dict(state["_modules"])
    if parametrize.is_parametrized(module):
        for name in children.pop("parametrizations"):
            state[name] = weights[prefix + name] if prefix + name in weights else getattr(module, name)
    state["_modules"] = {
        name: child if child is None else _copy(root, child, f"{prefix}{name}.", weights)
        for name, child in children.items()
    }
    vars(copy).update(state)
    return copy
