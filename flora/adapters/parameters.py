"""Adapters of bare parameters, such as the experts of a mixture: which parameters are meant, and what adapts them."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from flora.adapters import owners
from flora.adapters.config import FloraConfig
from flora.adapters.layer import FloraLayer
from flora.adapters.weights import stacked_kinds
from flora.replaced.weights import AdaptedWeight, plain

Targets = list[tuple[str, nn.Module, list[str]]]  # name of an owner, the owner, its parameters


class Parameters(FloraLayer):
    """Bare parameters of a module, whatever it computes with them.

    Lives as a child of the module that owns them, so that the module keeps its place and its name: it may be the model
    itself, or hold other adapted layers. See ``flora.adapters.owners`` for how the owner comes to read W + update.
    """

    child_name = owners.CHILD
    supports_dora = False

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: FloraConfig, name: str, targets: list[str]):
        self._targets = targets
        super().__init__(base_layer, adapter_name, config, name)
        # The owner is the parent, not a child: it must not be registered as one.
        del self._modules["base_layer"]
        self.__dict__["base_layer"] = base_layer

    def target(self, names: list[str]) -> None:
        """Set which parameters the next adapter adapts."""
        self._targets = names

    @override
    def describe_weights(self, config: FloraConfig, name: str) -> list[AdaptedWeight]:
        described = []
        for key in self._targets:
            shape = self.base_weight(key).shape
            full_name = f"{name}.{key}".lstrip(".")
            if not 2 <= len(shape) <= 6:
                raise ValueError(f"target_parameters: {full_name} has {len(shape)} modes; 2 to 6 can be adapted")
            kinds = stacked_kinds(len(shape), config, full_name, default=(0,) if len(shape) > 2 else ())
            described.append(plain(key, shape, kinds, output_dim=None))
        return described

    def adapts(self, name: str) -> bool:
        """Whether any adapter, active or not, has an update of this parameter."""
        return any(name in weights for weights in self.weights.values())

    def adapting(self, name: str) -> list[str]:
        """The adapters whose updates a read of this parameter has to see now."""
        if self._disable_adapters or self.merged_adapters:  # plain attributes: a read is frequent
            if self._disable_adapters and self.merged:
                self.unmerge()
            return []
        return [adapter for adapter in self.active_adapters if name in self.weights.get(adapter, ())]

    def adapted(self, name: str, own: Tensor, adapters: list[str]) -> Tensor:
        """W + update of a parameter, W (``own``) being that of whichever copy of the owner is read.

        Raises:
            ValueError: if W has another shape than the update, or has been quantised.
        """
        if (kind := self.quantised_as(name)) is not None:
            raise ValueError(
                f"{self.full_name(name)}: is quantised now ({kind}), and cannot be added to; merge the adapter "
                "before, or leave this parameter out"
            )
        if own.is_meta and not self.core(adapters[0], name).is_meta:
            return own  # offloaded, and not brought back: like W itself, of no use in a computation
        weight = own
        for adapter in adapters:
            if own.shape != (shape := self.weights[adapter][name].weight_shape):
                raise ValueError(
                    f"{self.full_name(name)}: has shape {list(own.shape)} now, and had {list(shape)} when adapter "
                    f"{adapter} was made; unload the adapter before giving it another shape"
                )
            weight = self.add_delta(weight, adapter, name)
        return weight.to(own.dtype)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Pass the input through: an owner that calls all its children in turn (nn.Sequential) calls this one too."""
        return args[0]

    def attach(self, owner: nn.Module) -> None:
        """Become the owner's child, whose reads of the targeted parameters see the updates from now on."""
        owner.add_module(self.child_name, self)
        owners.adapt(owner, self._targets)

    def detach_from(self, owner: nn.Module) -> None:
        """Leave the owner as it was."""
        owners.release(owner)
        delattr(owner, self.child_name)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Merge if asked; PEFT calls this when it unloads adapters, and then has the layer replaced."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return nn.Identity()


def find(model: nn.Module, config: FloraConfig, excluded: Callable[[str], bool]) -> Targets:
    """What ``target_parameters`` of a configuration names in a model.

    Raises:
        ValueError: for a parameter that cannot be adapted as such; nothing is changed.
    """
    found: Targets = []
    modules = dict(model.named_modules())
    adapted = [f"{name}." for name, module in modules.items() if isinstance(module, FloraLayer)]
    for name, owner in modules.items():
        within = next((prefix for prefix in adapted if f"{name}.".startswith(prefix)), None)
        if within is not None and not name.startswith(f"{within}base_layer"):
            continue  # an adapter's own parameters
        if excluded(name):
            continue
        full_names = {key: f"{name.replace('.base_layer', '')}.{key}".lstrip(".") for key in _tensors(owner)}
        keys = [key for key, full_name in full_names.items() if _is_target(full_name, config)]
        for key in keys:
            if within is not None:
                raise ValueError(f"target_parameters: {within}{key} is adapted through target_modules; name it once")
            _check(owner, key, full_names[key])
        if keys:
            found.append((name, owner, keys))
    return found


def inject(found: Targets, adapter_name: str, config: FloraConfig, *, active: bool, empty: bool) -> None:
    """Give the parameters an adapter.

    Args:
        found: what to adapt.
        adapter_name: name of the adapter.
        config: its configuration.
        active: whether it is trained from now on.
        empty: whether its parameters are on the meta device, to be loaded.

    Raises:
        ValueError: for settings that do not fit; no owner is changed.
    """
    done: list[tuple[nn.Module, Parameters, bool]] = []
    try:
        for name, owner, keys in found:
            layer = owner._modules.get(Parameters.child_name)
            with init_empty_weights() if empty else nullcontext():
                if isinstance(layer, Parameters):
                    done.append((owner, layer, False))
                    layer.target(keys)
                    layer.update_layer(adapter_name, config, name)
                    owners.adapt(owner, keys)
                    continue
                layer = Parameters(owner, adapter_name, config, name, keys)
            layer.attach(owner)
            done.append((owner, layer, True))
            if not active:
                layer.requires_grad_(False)
    except BaseException:
        for owner, layer, new in done:
            if new:
                layer.detach_from(owner)
            else:
                layer.delete_adapter(adapter_name)
        raise


def warn_of_ties(model: nn.Module, found: Targets) -> None:
    """Warn of parameters that a module outside the targets shares, which reads W alone, and W + update once merged."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    for name, owner, keys in found:
        for key in keys:
            full_name = f"{name}.{key}".lstrip(".")
            others = [other for other in places[id(owner._parameters[key])] if other != full_name]
            if others:
                warnings.warn(
                    f"target_parameters: {full_name} is tied to {', '.join(others)}, which the update does not reach "
                    "before it is merged; give one of them a clone of the parameter before wrapping the model",
                    stacklevel=5,
                )


def _tensors(owner: nn.Module) -> Iterator[str]:
    """Names of what a module computes with that users may take for its parameters."""
    yield from (name for name, parameter in owner._parameters.items() if parameter is not None)
    if parametrize.is_parametrized(owner):
        yield from owner.parametrizations  # type: ignore[misc]
    yield from (name for name, value in vars(owner).items() if isinstance(value, Tensor))


def _check(owner: nn.Module, key: str, full_name: str) -> None:
    """Raise ValueError if a parameter cannot be adapted as such."""
    if key not in owner._parameters:
        raise ValueError(
            f"target_parameters: {full_name} is no parameter: it is computed from others (by a parametrization or a "
            "hook such as weight_norm), which an update would not survive; name those"
        )
    kind = type(owner).__name__
    if isinstance(owner, torch.jit.ScriptModule | torch.fx.GraphModule):
        raise ValueError(f"target_parameters: {full_name} belongs to a traced module ({kind}); adapt before tracing")
    if isinstance(owner, nn.RNNBase):
        raise ValueError(f"target_parameters: {full_name} belongs to a {kind}; name the {kind} in target_modules")
    if isinstance(owner, nn.ModuleList | nn.ModuleDict):
        raise ValueError(
            f"target_parameters: {full_name} belongs to a list of modules ({kind}), whose members would include the "
            "adapter; keep the parameter in another module"
        )


def _is_target(full_name: str, config: FloraConfig) -> bool:
    targets = config.target_parameters or ()
    named = any(full_name == target or full_name.endswith(f".{target}") for target in targets)
    return named and _in_layers(full_name, config)


def _in_layers(full_name: str, config: FloraConfig) -> bool:
    """Whether ``layers_to_transform`` lets a parameter be adapted; the first index counts, as others are of experts."""
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = config.layers_pattern or r"[^.]+"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if (match := re.search(rf"(?:^|\.)(?:{pattern})\.(\d+)(?:\.|$)", full_name)) is not None:
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False
