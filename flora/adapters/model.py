"""The PEFT tuner of FLoRA: which adapted layer stands in for which module or bare parameter of a model."""

from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import torch
from peft.tuners.tuners_utils import _ExcludedModule
from torch import nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from flora.adapters import combine, parameters, passes
from flora.adapters.composite import MultiheadAttention, Recurrent
from flora.adapters.conv import ConvNd, ConvTransposeNd
from flora.adapters.layer import FloraLayer
from flora.adapters.linear import Embedding, Linear
from flora.adapters.parameters import Parameters
from flora.replaced import tied
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
        if Parameters.child_name in target._modules:
            raise ValueError(
                f"target_modules: {current_key} has parameters that another adapter adapts through target_parameters; "
                "name it once"
            )
        self._check_tokens(peft_config, current_key)
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key)
        if self._check_tied_module_exists(peft_config, current_key):
            layer: Any = self.model.get_submodule(current_key)
            tied.share_adapter(layer, self.model.get_input_embeddings(), adapter_name, current_key)

    def _check_tokens(self, config: Any, name: str) -> None:
        """Refuse to adapt an embedding of which trainable_token_indices replaces rows, or a layer tied to one."""
        tokens = config.trainable_token_indices
        if tokens is None:
            return
        embedding = self.model.get_input_embeddings() if hasattr(self.model, "get_input_embeddings") else None
        source = next((key for key, module in self.model.named_modules() if module is embedding), "embed_tokens")
        names = [*tokens] if isinstance(tokens, dict) else [source]
        if any(source.endswith(key) for key in names):
            names += [source, *self._get_module_names_tied_with_embedding()]
        if any(name.endswith(key) for key in names):
            raise ValueError(
                f"trainable_token_indices: {name} is also adapted (or tied to what is); leave it out of target_modules"
            )

    @override
    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        tied.add_modules_to_save(self, peft_config, tied_weight_keys)

    @override
    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        tied.add_targets(self, peft_config, tied_weight_keys)

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
        def excluded(name: str) -> bool:
            return isinstance(self._check_target_module_exists(peft_config, name), _ExcludedModule)

        found = parameters.find(model, peft_config, excluded)
        active = adapter_name in self.active_adapters
        parameters.inject(found, adapter_name, peft_config, active=active, empty=low_cpu_mem_usage)
        parameters.warn_of_ties(model, found)
        matched = [f"{name}.{key}".lstrip(".") for name, _, keys in found for key in keys]
        if matched:
            self.warn_of_missed("target_parameters", sorted(set(peft_config.target_parameters)), matched)
        return matched

    @override
    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, Parameters):
            child.detach_from(parent)
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
