"""The PEFT tuner of FLoRA: which adapted layer stands in for which module or bare parameter of a model."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, NoReturn

import torch
from peft.tuners.tuners_utils import _ExcludedModule
from peft.utils.integrations import init_empty_weights
from torch import nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from flora.adapters import combine, passes
from flora.adapters.composite import MultiheadAttention, Parameters, Recurrent
from flora.adapters.config import FloraConfig
from flora.adapters.conv import ConvNd, ConvTransposeNd
from flora.adapters.layer import FloraLayer
from flora.adapters.linear import Embedding, Linear
from flora.replaced.model import Layers, ReplacedModel


class FloraModel(ReplacedModel):
    """A model whose targeted layers carry FLoRA adapters; made by ``peft.get_peft_model(model, FloraConfig(...))``."""

    tuner_layer_cls = FloraLayer
    layer_classes: ClassVar[Layers] = (
        ((nn.Linear, Conv1D), Linear),
        ((nn.Embedding,), Embedding),
        ((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvNd),
        ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ConvTransposeNd),
        ((nn.MultiheadAttention,), MultiheadAttention),
        ((nn.RNNBase, nn.RNNCellBase), Recurrent),
    )

    # ------------------------------------------------------------------ injection

    @override
    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules is None and peft_config.target_parameters:
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    @override
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        parameters = sorted(set(config.target_parameters or ()))
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.warn_of_missed("target_parameters", parameters, self.targeted_parameter_names)

    @override
    def refuse_layer(self, config: Any, name: str, kind: str, supported: str) -> NoReturn:
        raise ValueError(
            f"target_modules: {name} is a {kind}, which is not supported (supported: {supported}); "
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
            super()._replace_module(parent, child_name, new_module, child)

    # ------------------------------------------------------------------ inspection and combination

    @override
    def _together(self) -> Mapping[Any, int]:
        fast = passes.fast()
        return {} if fast is None else fast.together(self.model)

    @override
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
