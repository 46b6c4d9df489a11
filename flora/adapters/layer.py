"""The base of all adapted layers: holds cores and factors, builds updates, merges them and runs the adapted layer."""

import math
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flora.adapters.config import FloraConfig
from flora.adapters.init import init_tucker
from flora.adapters.tucker import factor_modes, to_tensor
from flora.adapters.weights import AdaptedWeight, fold, ranks_of, scaling_of


class FloraLayer(nn.Module, BaseTunerLayer):
    """A base layer whose weights are adapted by Tucker updates, one set per adapter name.

    Subclasses say which weights their layer has (``describe_weights``) and how to run it: ``run_base`` with other
    weights in place of its own (the merged form), and where the op is known ``delta_output``, the update's own output
    (the additive form, factored where the op allows).

    Reading ``weight`` gives the adapted weight while adapters are active, so that code which takes a layer's weight
    instead of calling the layer (torchvision's Swin, nn.TransformerEncoderLayer) sees the adapter too.
    """

    adapter_layer_names: tuple[str, ...] = ("tucker_core", "tucker_factors", "tucker_magnitude")
    other_param_names: tuple[str, ...] = (
        "weights",
        "effective_ranks",
        "scaling",
        "_configured_scaling",
        "_relative_scaling",
        "form",
        "tucker_dropout",
    )
    supports_dora = True
    stackable = False  # whether its only weight can be built together with those of other layers
    batched: Any = None  # a weak reference to the model's flora.adapters.fast.builder.BatchedWeights, if any
    base_layer: Any
    tucker_core: Any  # ModuleDict: adapter -> ParameterDict: weight -> core
    tucker_factors: Any  # ModuleDict: adapter -> ParameterDict: weight_mode -> factor
    tucker_magnitude: Any  # ModuleDict: adapter -> ParameterDict: weight -> magnitude per output
    tucker_dropout: Any  # ModuleDict: adapter -> Dropout or Identity

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: FloraConfig, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.tucker_core = nn.ModuleDict()
        self.tucker_factors = nn.ModuleDict()
        self.tucker_magnitude = nn.ModuleDict()
        self.tucker_dropout = nn.ModuleDict()
        self.weights: dict[str, dict[str, AdaptedWeight]] = {}
        self.effective_ranks: dict[str, dict[str, tuple[int, ...]]] = {}
        self.scaling: dict[str, float] = {}
        self.form: dict[str, str] = {}
        self.revision = 0  # rises with every new or renewed adapter
        self._configured_scaling: dict[str, float] = {}
        self._relative_scaling: dict[str, dict[str, float]] = {}
        self._quantised = False
        self._merged_norm_ratio: dict[str, dict[str, Tensor]] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, name)

    # ------------------------------------------------------------------ what a subclass says about its layer

    def describe_weights(self, config: FloraConfig, name: str) -> list[AdaptedWeight]:
        """The weights of the base layer to adapt."""
        raise NotImplementedError

    def run_base(self, weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The base layer's own forward, with the given weights (by name) in place of its own."""
        return torch.func.functional_call(self.base_layer, weights, args, kwargs)

    def can_add(self, adapter_name: str) -> bool:
        """Whether the update's output can be computed apart from the base layer's and added to it."""
        return False

    def delta_output(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """The update's own output, without bias; defined where ``can_add``."""
        raise NotImplementedError

    def prefers_adding(self, adapter_name: str) -> bool:
        """Whether ``forward='auto'`` takes the additive form; asked where ``can_add``."""
        return False

    # ------------------------------------------------------------------ adapters

    def update_layer(self, adapter_name: str, config: FloraConfig, name: str) -> None:
        """Create the parameters of a new adapter (or replace those of an old one)."""
        weights = {weight.name: fold(weight, config, name) for weight in self.describe_weights(config, name)}
        self._check_config(config, name)
        for key in weights:
            owner, _, attribute = key.rpartition(".")
            if isinstance(vars(self.get_base_layer().get_submodule(owner)).get(attribute), Tensor):
                raise ValueError(
                    f"{name}: its {key} is computed anew by a hook (torch.nn.utils.weight_norm, spectral_norm), which "
                    "an update would not survive; use torch.nn.utils.parametrizations"
                )
        self.weights[adapter_name] = weights
        self.effective_ranks[adapter_name] = {key: ranks_of(weight, config, name) for key, weight in weights.items()}
        scales = {key: scaling_of(weight, config, name) for key, weight in weights.items()}
        # PEFT's own functions read and set one factor per adapter and layer; weights may differ in theirs.
        self.scaling[adapter_name] = largest = max(scales.values(), key=abs)
        self._configured_scaling[adapter_name] = largest
        self._relative_scaling[adapter_name] = {key: scale / largest if largest else 1 for key, scale in scales.items()}
        self.form[adapter_name] = config.forward
        self.revision += 1
        self.tucker_dropout[adapter_name] = nn.Dropout(config.flora_dropout) if config.flora_dropout else nn.Identity()
        self._quantised = not all(self.base_weight(weight).is_floating_point() for weight in weights)
        if not self.can_add(adapter_name):
            kind = type(self.get_base_layer()).__name__
            if config.flora_dropout:
                raise ValueError(f"flora_dropout: {name} ({kind}) cannot drop its adapter's input; set it to 0")
            if self._quantised:
                raise ValueError(f"{name}: a quantised {kind} cannot be adapted; leave it out of the targets")

        cores, factors = nn.ParameterDict(), nn.ParameterDict()
        for weight in weights.values():
            ranks = self.effective_ranks[adapter_name][weight.name]
            cores[weight.key] = nn.Parameter(torch.empty(ranks))
            for mode in factor_modes(weight.shape, ranks):
                factors[f"{weight.key}_{mode}"] = nn.Parameter(torch.empty(weight.shape[mode], ranks[mode]))
        self.tucker_core[adapter_name] = cores
        self.tucker_factors[adapter_name] = factors
        self.reset_adapter(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.use_dora:
            self._init_magnitude(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_adapter(self, adapter_name: str, config: FloraConfig) -> None:
        """Draw the parameters of an adapter anew by the configuration's preset; its update becomes zero."""
        for weight in self.weights[adapter_name].values():
            base = None
            if config.init == "hosvd" and not self.core(adapter_name, weight.name).is_meta:
                base = self.base_weight(weight.name)
                if not base.is_floating_point():
                    raise ValueError(f"init: hosvd needs a floating-point weight, {weight.name} is {base.dtype}")
                if not base.is_meta:
                    base = base.detach().reshape(weight.shape).to(torch.promote_types(base.dtype, torch.float32))
            core = self.core(adapter_name, weight.name)
            output_mode = None if weight.folded else weight.output_dim
            init_tucker(core.data, self.factors(adapter_name, weight.name), config.init, output_mode, base)
            if not config.init_weights and not core.is_meta:
                core.data.normal_(std=0.1)

    def _check_config(self, config: FloraConfig, name: str) -> None:
        if config.use_dora and not self.supports_dora:
            raise ValueError(f"use_dora: {name} ({type(self.get_base_layer()).__name__}) has no magnitude per output")

    def core(self, adapter_name: str, weight_name: str = "weight") -> nn.Parameter:
        """Core of one adapted weight, r_1 x ... x r_N."""
        return self.tucker_core[adapter_name][self.weights[adapter_name][weight_name].key]

    def factors(self, adapter_name: str, weight_name: str = "weight") -> list[nn.Parameter | None]:
        """Factors of one adapted weight, d_n x r_n per mode; ``None`` for modes without one."""
        weight = self.weights[adapter_name][weight_name]
        held = self.tucker_factors[adapter_name]
        names = [f"{weight.key}_{mode}" for mode in range(len(weight.shape))]
        return [held.get(name) for name in names]

    def scale_of(self, adapter_name: str, weight_name: str = "weight") -> float:
        """Factor of the update of one adapted weight."""
        return self.scaling[adapter_name] * self._relative_scaling.get(adapter_name, {}).get(weight_name, 1.0)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the factor of an adapter's update to ``scale`` times the configured one."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._configured_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the factor of the active adapters' updates."""
        for adapter in self._present(self.active_adapters):
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factor of the active adapters' updates, or restore the configured one (``None``)."""
        for adapter in self._present(self.active_adapters):
            self.scaling[adapter] = (
                self._configured_scaling[adapter] if scale is None else self.scaling[adapter] / scale
            )

    def _present(self, adapters: list[str]) -> list[str]:
        return [adapter for adapter in adapters if adapter in self.weights]

    # ------------------------------------------------------------------ weights and updates

    def get_base_layer(self) -> Any:
        """The layer whose weights are adapted."""
        return self.base_layer

    def base_weight(self, name: str) -> Tensor:
        """The base layer's own weight of that name."""
        owner, _, attribute = name.rpartition(".")
        return getattr(self.get_base_layer().get_submodule(owner), attribute)

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

    def adapted_weight(self, name: str, adapters: list[str]) -> Tensor:
        """The base weight with the updates of the given active adapters.

        In the base weight's dtype; where it was built together with those of other layers, in the dtype in which the
        layer computes.
        """
        if isinstance(built := self._built_together(), dict):
            return built["weight"]
        base = self.base_weight(name)
        weight = base
        for adapter in adapters:
            if name in self.weights[adapter]:
                weight = weight + self.get_delta_weight(adapter, name)
                if adapter in self.tucker_magnitude:
                    weight = weight * self._norm_ratio(adapter, name, weight)
        return weight.to(base.dtype)

    def _norm_ratio(self, adapter: str, name: str, weight: Tensor) -> Tensor:
        # DoRA treats the norm as a constant in the gradient (arXiv 2402.09353, section 4.3).
        described = self.weights[adapter][name]
        magnitude = self.tucker_magnitude[adapter][described.key]
        norm = _output_norm(weight, described).detach()
        return magnitude.view(norm.shape) / torch.where(norm == 0, torch.ones_like(norm), norm)

    @torch.no_grad()
    def _init_magnitude(self, adapter: str) -> None:
        magnitudes = nn.ParameterDict()
        for described in self.weights[adapter].values():
            base = self.base_weight(described.name)
            if not base.is_floating_point():
                raise ValueError(f"use_dora: needs a floating-point weight, {described.name} is {base.dtype}")
            magnitudes[described.key] = nn.Parameter(_output_norm(base, described).flatten().to(base.dtype))
        self.tucker_magnitude[adapter] = magnitudes

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Models read public attributes of their layers (in_features, stride, hidden_size, bare parameters).
            if name.startswith("_") or name == "base_layer":
                raise
            if any(name in weights for weights in self.__dict__.get("weights", {}).values()):
                return self._visible_weight(name)
            return getattr(self.base_layer, name)

    @property
    def weight(self) -> Tensor:
        """The adapted weight while adapters are active, else the base layer's own."""
        return self._visible_weight("weight")

    @property
    def bias(self) -> Any:
        """The base layer's bias; ``None`` where it has no tensor of that name."""
        bias = getattr(self.get_base_layer(), "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def in_features(self) -> int:
        """Size of the input, under the name that PEFT asks for."""
        return self._size_named("in_features", "in_channels", "num_embeddings", "input_size", "nx", "embed_dim")

    @property
    def out_features(self) -> int:
        """Size of the output, under the name that PEFT asks for."""
        return self._size_named("out_features", "out_channels", "embedding_dim", "hidden_size", "nf", "embed_dim")

    def _size_named(self, *names: str) -> int:
        for name in names:
            if hasattr(self.base_layer, name):
                return getattr(self.base_layer, name)
        raise AttributeError(names[0])

    def _visible_weight(self, name: str) -> Tensor:
        adapters = [a for a in self._present(self.active_adapters) if name in self.weights[a]]
        if self.disable_adapters or self.merged or not adapters:
            return self.base_weight(name)
        return self.adapted_weight(name, adapters)

    # ------------------------------------------------------------------ forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base layer with its adapted weights."""
        if (built := self._built_together()) is not None:
            return self.run_built(built, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self._present(self.active_adapters)
        if self.disable_adapters or self.merged or not adapters:
            return self.base_layer(*args, **kwargs)
        if self.adds(adapters):
            return self.run_additive(adapters, *args, **kwargs)
        names = dict.fromkeys(name for adapter in adapters for name in self.weights[adapter])
        return self.run_base({name: self.adapted_weight(name, adapters) for name in names}, *args, **kwargs)

    def _built_together(self) -> Any:
        """What was built for the layer together with others, if anything."""
        owner = None if self.batched is None else self.batched()
        return None if owner is None else owner.built_for(self)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "batched"}  # set by who is copied with it

    def run_built(self, built: Any, *args: Any, **kwargs: Any) -> Any:
        """Run with what was built for the layer together with others."""
        return self.run_base(built, *args, **kwargs)

    def thin_side(self, adapter_name: str) -> str | None:
        """Where the layer's two thin matrices can be built together with others, the side that takes the core."""
        return None

    def run_additive(self, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        """The base layer's output plus those of the updates."""
        result = self.base_layer(*args, **kwargs)
        for adapter in adapters:
            result = result + self.delta_output(adapter, *args, **kwargs).to(result.dtype)
        return result

    def adds(self, adapters: list[str]) -> bool:
        """Whether the layer now runs in the additive form, rather than with W + update."""
        if any(adapter in self.tucker_magnitude for adapter in adapters):
            return False
        if not all(self.can_add(adapter) for adapter in adapters):
            return False
        if self._weight_is_elsewhere():
            return True
        dropping = self.training and any(isinstance(self.tucker_dropout[a], nn.Dropout) for a in adapters)
        form = self.form[adapters[0]]
        if dropping or form != "auto":
            return dropping or form == "factored"
        return self.prefers_adding(adapters[0])

    def _weight_is_elsewhere(self) -> bool:
        """Whether the weight cannot be added to: quantised, or offloaded until the base layer's own forward."""
        return self._quantised or hasattr(self.base_layer, "_hf_hook")

    # ------------------------------------------------------------------ merging

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the given adapters (default: the active ones) to the base weights.

        Args:
            safe_merge: check the merged weights for NaN and infinity before storing them.
            adapter_names: adapters to merge, in this order.

        Raises:
            ValueError: if a base weight is quantised, sharded or otherwise cannot hold the sum, or a check fails.
        """
        for adapter in self._present(check_adapters_to_merge(self, adapter_names)):
            merged = {}
            ratios = {}
            for name in self.weights[adapter]:
                base = self.base_weight(name)
                _check_mergeable(base, name)
                weight = base + self.get_delta_weight(adapter, name)
                if adapter in self.tucker_magnitude:
                    ratios[name] = self._norm_ratio(adapter, name, weight)
                    weight = weight * ratios[name]
                merged[name] = weight.to(base.dtype)
                if safe_merge and not torch.isfinite(merged[name]).all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            for name, weight in merged.items():
                self._set_base_weight(name, weight)
            self._merged_norm_ratio[adapter] = ratios
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged updates out of the base weights again, up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            ratios = self._merged_norm_ratio.pop(adapter, {})
            for name in self.weights.get(adapter, {}):
                base = self.base_weight(name)
                weight = base / ratios[name] if name in ratios else base
                self._set_base_weight(name, (weight - self.get_delta_weight(adapter, name)).to(base.dtype))

    def _set_base_weight(self, name: str, value: Tensor) -> None:
        owner_name, _, attribute = name.rpartition(".")
        owner = self.get_base_layer().get_submodule(owner_name)
        if not parametrize.is_parametrized(owner, attribute):
            getattr(owner, attribute).data = value
            return
        try:
            setattr(owner, attribute, value)  # through the parametrization's inverse, e.g. weight_norm's
        except NotImplementedError:
            raise ValueError(f"{name}: its parametrization has no inverse; the adapter cannot be merged") from None

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        # PEFT's own looks for an attribute `weight` only.
        weights = next(iter(self.weights.values()))
        weight = self.base_weight(next(iter(weights)))
        return weight.device, getattr(base_layer, "compute_dtype", weight.dtype)

    def extra_repr(self) -> str:
        """Effective ranks by adapter."""
        return ", ".join(f"{adapter}: ranks {ranks}" for adapter, ranks in self.effective_ranks.items())

    def __repr__(self) -> str:
        return "flora." + super().__repr__()


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a matrix product or convolution with this weight runs now."""
    device = weight.device.type
    if device == "meta":
        return weight.dtype
    casts = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else weight.dtype


def in_transform() -> bool:
    """Whether torch.compile traces, or a functorch transform runs: our own autograd functions stay out of these."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def _output_norm(weight: Tensor, described: AdaptedWeight) -> Tensor:
    """Euclidean norm per output, with size 1 in place of the other dimensions of the stored weight."""
    dims = [dim for dim in range(weight.dim()) if dim != described.output_dim]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=dims, keepdim=True, dtype=dtype)


def _check_mergeable(weight: Tensor, name: str) -> None:
    if not weight.is_floating_point() or math.prod(weight.shape) == 0:
        raise ValueError(
            f"{name}: a quantised or partitioned weight ({weight.dtype}) cannot be merged into; merge into a full one"
        )
    if isinstance(weight, torch.distributed.tensor.DTensor):
        raise ValueError(f"{name}: a sharded weight (DTensor) cannot be merged into; gather the model first")
