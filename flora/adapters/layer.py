"""The base of FLoRA's layers: cores and factors per adapter, and the update that they make."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from flora.adapters.config import FloraConfig
from flora.adapters.init import init_tucker
from flora.adapters.tucker import add_tensor, factor_modes, to_tensor
from flora.adapters.weights import fold, ranks_of
from flora.replaced import passes
from flora.replaced.containers import AdapterParameters, at_hand
from flora.replaced.layer import ReplacedLayer
from flora.replaced.precision import full_precision
from flora.replaced.weights import AdaptedWeight


class FloraLayer(ReplacedLayer):
    """A base layer whose weights are adapted by Tucker updates, one set per adapter name; see ``ReplacedLayer``.

    Within ``flora.batched``, it runs with what was built for it together with other layers: its weight (and perhaps
    bias) in the merged form, its two thin matrices in the factored one.
    """

    adapter_layer_names: tuple[str, ...] = ("tucker_core", "tucker_factors", *ReplacedLayer.adapter_layer_names)
    other_param_names: tuple[str, ...] = (*ReplacedLayer.other_param_names, "tucker_dropout")
    stackable = False  # whether its only weight can be built together with those of other layers
    tucker_core: Any  # ModuleDict: adapter -> ParameterDict: weight -> core
    tucker_factors: Any  # ModuleDict: adapter -> ParameterDict: weight_mode -> factor
    tucker_dropout: Any  # ModuleDict: adapter -> Dropout or Identity

    # ------------------------------------------------------------------ cores and factors

    @override
    def create_containers(self) -> None:
        self.tucker_core = nn.ModuleDict()
        self.tucker_factors = nn.ModuleDict()
        self.tucker_dropout = nn.ModuleDict()

    @override
    def modes(self, weight: AdaptedWeight, config: FloraConfig, name: str) -> AdaptedWeight:
        return fold(weight, config, name)

    @override
    def create_parameters(self, adapter_name: str, config: FloraConfig, name: str) -> None:
        weights = self.weights[adapter_name]
        self.effective_ranks[adapter_name] = {key: ranks_of(weight, config, name) for key, weight in weights.items()}
        self.tucker_dropout[adapter_name] = nn.Dropout(config.flora_dropout) if config.flora_dropout else nn.Identity()
        if config.flora_dropout and self.apart(adapter_name) is None:
            kind = type(self.get_base_layer()).__name__
            raise ValueError(f"flora_dropout: {name} ({kind}) cannot drop its adapter's input; set it to 0")
        cores, factors = AdapterParameters(), AdapterParameters()
        for weight in weights.values():
            ranks = self.effective_ranks[adapter_name][weight.name]
            cores[weight.key] = nn.Parameter(torch.empty(ranks))
            for mode in factor_modes(weight.shape, ranks):
                factors[f"{weight.key}_{mode}"] = nn.Parameter(torch.empty(weight.shape[mode], ranks[mode]))
        self.tucker_core[adapter_name] = cores
        self.tucker_factors[adapter_name] = factors

    @override
    def reset_adapter(self, adapter_name: str, config: FloraConfig) -> None:
        for weight in self.weights[adapter_name].values():
            base = None
            if config.init == "hosvd" and not self.core(adapter_name, weight.name).is_meta:
                if (kind := self.quantised_as(weight.name)) is not None:
                    raise ValueError(
                        f"init: hosvd needs a floating-point weight, {self.full_name(weight.name)} is {kind}"
                    )
                base = self.base_weight(weight.name)
                base = base.full_tensor() if isinstance(base, DTensor) else base
                if not base.is_meta:
                    base = base.detach().reshape(weight.shape).to(torch.promote_types(base.dtype, torch.float32))
            core = self.core(adapter_name, weight.name)
            factors = self.factors(adapter_name, weight.name)
            init_tucker(core.data, factors, config.init, weight.output_mode, base)
            if not config.init_weights:
                for zero in (part for part in (core, *factors) if part is not None and not part.is_meta):
                    if not zero.any():
                        zero.data.normal_(std=0.1)

    def core(self, adapter_name: str, weight_name: str = "weight") -> Tensor:
        """Core of one adapted weight, r_1 x ... x r_N."""
        return at_hand(self.tucker_core[adapter_name])[self.weights[adapter_name][weight_name].key]

    def factors(self, adapter_name: str, weight_name: str = "weight") -> list[Tensor | None]:
        """Factors of one adapted weight, d_n x r_n per mode; ``None`` for modes without one."""
        weight = self.weights[adapter_name][weight_name]
        factors = at_hand(self.tucker_factors[adapter_name])
        return [factors.get(f"{weight.key}_{mode}") for mode in range(len(weight.shape))]

    @override
    def get_delta_weight(self, adapter: str, weight: str | None = None) -> Tensor:
        """The update of an adapter, scale * (G x_1 A_1 ... x_N A_N), in the shape of the stored weight.

        Args:
            adapter: its name.
            weight: name of the adapted weight; may be left out where the layer has only one.

        Raises:
            ValueError: if the layer has several adapted weights and none is named.
        """
        names = list(self.weights[adapter])
        if weight is None and len(names) > 1:
            raise ValueError(f"weight: this layer adapts several, name one of {', '.join(names)}")
        described = self.weights[adapter][weight or names[0]]
        core = self.core(adapter, described.name) * self.scale_of(adapter, described.name)
        return to_tensor(core, self.factors(adapter, described.name)).reshape(described.weight_shape)

    @override
    def add_delta(self, weight: Tensor, adapter: str, name: str) -> Tensor:
        described = self.weights[adapter][name]
        if not self.is_tucker() or isinstance(weight, DTensor):
            return super().add_delta(weight, adapter, name)
        core, factors = self.core(adapter, name), self.factors(adapter, name)
        with full_precision(weight.device):
            total = add_tensor(weight.reshape(described.shape), core, factors, self.scale_of(adapter, name))
        return total.reshape(described.weight_shape)

    @classmethod
    def is_tucker(cls) -> bool:
        """Whether the update is the Tucker form itself, which may be computed in other orders too."""
        return cls.get_delta_weight is FloraLayer.get_delta_weight

    @override
    def drops(self, adapter_name: str) -> bool:
        return self.training and isinstance(self.tucker_dropout[adapter_name], nn.Dropout)

    @override
    def drop(self, adapter_name: str, input: Tensor) -> Tensor:
        return self.tucker_dropout[adapter_name](input)

    # ------------------------------------------------------------------ what is built for many layers at once

    @override
    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # There and back again (half, float), other numbers may lie where those were that something was built from.
        self.revision += 1
        return super()._apply(*args, **kwargs)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base layer with its adapted weights; within ``flora.batched``, with what was built there."""
        shared = None if "adapter_names" in kwargs else passes.running()
        if shared is not None and (prepared := shared.prepared_for(self)) is not None:
            return self.run_prepared(shared, prepared, *args, **kwargs)
        return super().forward(*args, **kwargs)

    def run_prepared(self, shared: Any, prepared: Any, *args: Any, **kwargs: Any) -> Any:
        """Run with what the pass ``shared`` built for the layer."""
        return self.run_base(prepared, *args, **kwargs)

    def thin_core_side(self, adapter_name: str) -> str | None:
        """Where the layer's two thin matrices can be built with those of others, the side that takes the core."""
        return None
