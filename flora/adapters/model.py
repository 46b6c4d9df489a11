"""The PEFT tuner: which adapted layer stands in for which module of a model."""

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from flora.adapters.config import FLORA, FloraConfig
from flora.adapters.conv import ConvNd, ConvTransposeNd
from flora.adapters.layer import FloraLayer
from flora.adapters.linear import Embedding, Linear

LAYERS: list[tuple[tuple[type[nn.Module], ...], type[FloraLayer]]] = [
    ((nn.Linear, Conv1D), Linear),
    ((nn.Embedding,), Embedding),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvNd),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ConvTransposeNd),
]


class FloraModel(BaseTuner):
    """A model whose targeted layers carry FLoRA adapters; made by ``peft.get_peft_model(model, FloraConfig(...))``."""

    prefix = "tucker_"
    tuner_layer_cls = FloraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(self, peft_config: FloraConfig, model_config: dict) -> FloraConfig:
        if peft_config.target_modules is None and peft_config.target_parameters:
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Replace the targeted layers; warns of target names that match nothing while others do."""
        config = self.peft_config[adapter_name]
        asked = set(config.target_modules) if isinstance(config.target_modules, list | set | tuple) else set()
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        found = self.targeted_module_names
        untrained = sorted(t for t in asked if not any(name == t or name.endswith(f".{t}") for name in found))
        if untrained:
            warnings.warn(f"target_modules: {', '.join(untrained)} match nothing and stay untrained", stacklevel=2)

    def _create_and_replace(
        self,
        peft_config: FloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(parent, FloraLayer):
            return  # a part of an adapted layer, such as the output projection of an attention
        if isinstance(target, FloraLayer):
            target.update_layer(adapter_name, peft_config, current_key)
            return
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
            f"target_modules: {name} is a {type(target).__name__}, which is not supported; supported are {supported}. "
            "Name its parameters in target_parameters instead"
        )

    def effective_ranks(self, adapter_name: str | None = None) -> dict[str, list[int]]:
        """Clipped ranks per mode of every adapted weight.

        Args:
            adapter_name: which adapter; the first active one by default.

        Returns:
            Name of the layer (followed by the name of the weight where a layer has several) -> rank per mode.
        """
        adapter_name = adapter_name or self.active_adapters[0]
        listed: dict[str, list[int]] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, FloraLayer) and adapter_name in module.ranks:
                ranks = module.ranks[adapter_name]
                for weight, values in ranks.items():
                    listed[name if len(ranks) == 1 else f"{name}.{weight}"] = list(values)
        return listed
