"""The PEFT tuner: which adapted layer stands in for which module of a model."""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from flora.adapters import combine
from flora.adapters.composite import MultiheadAttention, Parameters, Recurrent
from flora.adapters.config import FloraConfig
from flora.adapters.conv import ConvNd, ConvTransposeNd
from flora.adapters.fast.builder import BatchedWeights
from flora.adapters.fast.factored_plan import thin_stacks
from flora.adapters.fast.plan import stacks
from flora.adapters.layer import FloraLayer
from flora.adapters.linear import Embedding, Linear
from flora.adapters.weights import matching_pattern

LAYERS: tuple[tuple[tuple[type[nn.Module], ...], type[FloraLayer]], ...] = (
    ((nn.Linear, Conv1D), Linear),
    ((nn.Embedding,), Embedding),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvNd),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ConvTransposeNd),
    ((nn.MultiheadAttention,), MultiheadAttention),
    ((nn.RNNBase, nn.RNNCellBase), Recurrent),
)


class FloraModel(BaseTuner):
    """A model whose targeted layers carry FLoRA adapters; made by ``peft.get_peft_model(model, FloraConfig(...))``."""

    prefix = "tucker_"
    tuner_layer_cls = FloraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    # ------------------------------------------------------------------ injection

    @override
    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules is None and peft_config.target_parameters:
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    @override
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        named = config.target_modules if isinstance(config.target_modules, list | set | tuple) else ()
        asked = {"target_modules": set(named), "target_parameters": set(config.target_parameters or ())}
        with warnings.catch_warnings():
            # PEFT compares rank_pattern with modules only; names of parameters are checked below.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        found = {"target_modules": self.targeted_module_names, "target_parameters": self.targeted_parameter_names}
        for field, targets in asked.items():
            missed = [t for t in sorted(targets) if not any(n == t or n.endswith(f".{t}") for n in found[field])]
            if missed:
                warnings.warn(f"{field}: {', '.join(missed)} match nothing and stay untrained", stacklevel=2)
        adapted = [name for name, _, _ in self._adapted_weights(adapter_name)]
        adapted += [name.rpartition(".")[0] for name in adapted] + found["target_modules"]
        for field in ("rank_pattern", "scale_pattern", "alpha_pattern", "fold_pattern"):
            for pattern in getattr(config, field):
                if not any(matching_pattern({pattern: True}, name) for name in adapted):
                    warnings.warn(f"{field}[{pattern!r}] matches no adapted layer", stacklevel=2)
        if "batched" not in self.__dict__:
            self.batched = BatchedWeights()
        self.batched.attach(model)

    @override
    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(parent, FloraLayer):
            return  # part of an adapted layer, such as the output projection of an attention
        if isinstance(target, FloraLayer):
            target.update_layer(adapter_name, peft_config, current_key)
        else:
            new_module = self._create_new_module(peft_config, adapter_name, target, current_key)
            if adapter_name not in self.active_adapters:
                new_module.requires_grad_(False)  # a further adapter is not trained before it is made active
            self._replace_module(parent, target_name, new_module, target)

    @staticmethod
    def _create_new_module(config: FloraConfig, adapter_name: str, target: nn.Module, name: str) -> FloraLayer:
        if isinstance(target, BaseTunerLayer):
            raise ValueError(f"target_modules: {name} already carries an adapter of another method")
        for kinds, layer in LAYERS:
            if isinstance(target, kinds):
                return layer(target, adapter_name, config, name)
        supported = ", ".join(kind.__name__ for kinds, _ in LAYERS for kind in kinds)
        raise ValueError(
            f"target_modules: {name} is a {type(target).__name__}, which is not supported (supported: {supported}); "
            "name its parameters in target_parameters instead"
        )

    @override
    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        matched: list[str] = []
        modules = dict(model.named_modules())
        adapted = [f"{name}." for name, module in modules.items() if isinstance(module, FloraLayer)]
        for name, owner in modules.items():
            within = next((prefix for prefix in adapted if f"{name}.".startswith(prefix)), None)
            if within is not None and not name.startswith(f"{within}base_layer"):
                continue  # an adapter's own parameters
            if isinstance(self._check_target_module_exists(peft_config, name), _ExcludedModule):
                continue
            keys = [
                key
                for key, _ in owner.named_parameters(recurse=False)
                if _is_target(name.replace(".base_layer", ""), key, peft_config)
            ]
            if not keys:
                continue
            if within is not None:
                raise ValueError(
                    f"target_parameters: {within}{keys[0]} is adapted through target_modules; name it once"
                )
            matched += [f"{name}.{key}".lstrip(".") for key in keys]
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._adapt_parameters(owner, name, keys, adapter_name, peft_config)
        return matched

    def _adapt_parameters(
        self, owner: nn.Module, name: str, keys: list[str], adapter_name: str, config: FloraConfig
    ) -> None:
        layer = owner._modules.get(Parameters.child_name)
        if isinstance(layer, Parameters):
            layer.target(keys)
            layer.update_layer(adapter_name, config, name)
            return
        layer = Parameters(owner, adapter_name, config, name, keys)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        owner.add_module(Parameters.child_name, layer)

    @override
    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, Parameters):
            delattr(parent, child_name)
        else:
            setattr(parent, child_name, new_module)  # an adapter is created on its base layer's device

    @override
    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        self.batched.detach(self.model)
        return super()._unload_and_optionally_merge(*args, **kwargs)

    # ------------------------------------------------------------------ loading

    @classmethod
    @override
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = model.state_dict()
        for key, value in remapped.items():
            if f".{cls.prefix}" not in f".{key}":
                continue
            key = key if key in own else key.removeprefix("base_model.model.")
            if key not in own:
                raise ValueError(f"adapter does not fit the model: the model has no adapted weight for {key}")
            if own[key].shape != value.shape:
                raise ValueError(
                    f"adapter does not fit the model: {key} is {list(value.shape)} in the file, {list(own[key].shape)} "
                    "in the model; load it onto the architecture and with the ranks it was trained with"
                )
        return remapped

    # ------------------------------------------------------------------ inspection and combination

    def _adapted_weights(self, adapter_name: str) -> Iterator[tuple[str, FloraLayer, str]]:
        """Full name (layer.weight), layer and weight name of everything an adapter adapts."""
        for name, module in self.model.named_modules():
            if isinstance(module, FloraLayer) and adapter_name in module.weights:
                layer = name.removesuffix(Parameters.child_name) if isinstance(module, Parameters) else name
                for weight in module.weights[adapter_name]:
                    yield f"{layer.rstrip('.')}.{weight}".lstrip("."), module, weight

    def effective_ranks(self, adapter_name: str | None = None) -> dict[str, list[int]]:
        """Clipped ranks per mode of every adapted weight; 1 for a mode of size 1, which has no factor.

        Args:
            adapter_name: which adapter; the first active one by default.

        Returns:
            Name of the layer (followed by the name of the weight where a layer has several) -> rank per mode.
        """
        adapter_name = adapter_name or self.active_adapters[0]
        listed = {}
        for name, layer, weight in self._adapted_weights(adapter_name):
            short = name.removesuffix(f".{weight}") if weight == "weight" else name
            listed[short] = list(layer.effective_ranks[adapter_name][weight])
        return listed

    def explain(self, adapter_name: str | None = None) -> list[str]:
        """How the layers run now, a line for each shape: form, ranks, and how many weights are built together.

        The choice of ``forward='auto'`` depends on the device and on autocast: ask where the model trains.

        Args:
            adapter_name: which adapter; the first active one by default.
        """
        adapter_name = adapter_name or self.active_adapters[0]
        found: list[Any] = [*stacks(self.batched.layers), *thin_stacks(self.batched.layers)]
        together = {layer: len(stack.layers) for stack in found for layer in stack.layers}
        lines: dict[tuple[Any, ...], list[str]] = {}
        for name, layer, weight in self._adapted_weights(adapter_name):
            form = "factored" if layer.adds([adapter_name]) else "merged"
            ranks = layer.effective_ranks[adapter_name][weight]
            shape = layer.weights[adapter_name][weight].shape
            lines.setdefault((form, shape, ranks, together.get(layer, 1)), []).append(name)
        return [
            f"{form} {list(shape)} ranks {list(ranks)}: {len(names)} weight{'s' * (len(names) > 1)}"
            f"{f', {count} built together' if count > 1 else ''} ({names[0]}{', ...' if len(names) > 1 else ''})"
            for (form, shape, ranks, count), names in lines.items()
        ]

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        r: int | list[int] | None = None,
        kernel_rank: int | list[int] | None = None,
    ) -> None:
        """Add an adapter whose update is the weighted sum of the updates of others.

        Args:
            adapters: names of the adapters to combine.
            weights: one factor per adapter.
            adapter_name: name of the new adapter.
            combination_type: ``cat`` is exact, ranks add up (at most to what each mode can use); ``hooi`` recompresses
                the exact sum to the ranks below.
            r: channel rank for ``hooi``; that of the first adapter by default.
            kernel_rank: kernel rank for ``hooi``; that of the first adapter by default.

        Raises:
            ValueError: for unknown names, unequal lengths, adapters with use_dora (whose updates do not add up) or
                with different folds, and where more than one has modules_to_save.
        """
        combine.add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, r, kernel_rank)


def _is_target(module_name: str, key: str, config: FloraConfig) -> bool:
    full_name = f"{module_name}.{key}".lstrip(".")
    return any(full_name == target or full_name.endswith(f".{target}") for target in config.target_parameters or ())
