"""The base of adapted layers: runs a layer with an updated weight, shows that weight, and merges it."""

import warnings
from itertools import chain
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flora.replaced import bases, magnitude, merging, stand_in, tied
from flora.replaced.kept import Kept
from flora.replaced.lazy import lazy
from flora.replaced.mixed import run_mixed
from flora.replaced.weights import AdaptedWeight, scaling_of

Form = Literal["factored", "merged", "dense"]


class ReplacedLayer(nn.Module, Kept):
    """A base layer whose weights are updated, by one set of parameters per adapter name.

    Subclasses say which weights their layer has (``describe_weights``) and how to run it with others in their place
    (``run_base``). A method says what its parameters are (``create_parameters``, ``reset_adapter``) and which update
    they make (``get_delta_weight``).

    How a layer runs, W being its weight and delta the sum of its active adapters' updates, scales included:

    ========  ======================================  ============================================================
    form      what is computed                        where
    ========  ======================================  ============================================================
    factored  op(x, W) + thin products of x           linear layers, embeddings, ungrouped convolutions; delta is
                                                      never built
    merged    op(x, W + delta)                        every layer; the only form with magnitudes, and of layers
                                                      whose op is not known (attention, recurrent, bare parameters)
    dense     op(x, W) + op(x, delta)                 grouped and folded convolutions, and those that pad their
                                                      input themselves, where they cannot or shall not run merged
    ========  ======================================  ============================================================

    ``form_for`` chooses. Factored and dense keep the update *apart* from W: they serve quantised and offloaded weights,
    and dropout on the update's input.

    Reading ``weight`` gives the adapted weight while adapters are active, so that code which takes a layer's weight
    instead of calling the layer (torchvision's Swin, nn.TransformerEncoderLayer) sees the adapter too. It is built when
    its values are used, not to look at its dtype or shape, and cannot be written to.
    """

    # The prefix of all parameters is FLoRA's, as it was when adapters were first saved.
    adapter_layer_names: tuple[str, ...] = ("tucker_magnitude",)
    other_param_names: tuple[str, ...] = (
        "weights",
        "effective_ranks",
        "scaling",
        "_configured_scaling",
        "_relative_scaling",
        "configured_form",
    )
    supports_dora = True
    takes_adapter_names = False  # whether a call may name an adapter per example
    cast_input_dtype_enabled = True  # PEFT's disable_input_dtype_casting sets it; an update runs in its input's dtype
    child_name = ""  # under which the layer is a child of the module that it adapts, where it does not replace it
    base_layer: Any
    tucker_magnitude: Any  # ModuleDict: adapter -> ParameterDict: weight -> magnitude per output

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.create_containers()
        self.tucker_magnitude = nn.ModuleDict()
        self.layer_name = name
        self.weights: dict[str, dict[str, AdaptedWeight]] = {}
        self.effective_ranks: dict[str, dict[str, tuple[int, ...]]] = {}
        self.scaling: dict[str, float] = {}
        self.configured_form: dict[str, str] = {}  # auto, factored or merged
        self.revision = 0  # rises with every new or renewed adapter, and when the layer is moved or converted
        self._configured_scaling: dict[str, float] = {}
        self._relative_scaling: dict[str, dict[str, float]] = {}
        self.tied_weights: set[str] = set()  # those that other modules hold too
        self.shared_weights: dict[str, nn.Parameter] = {}  # what was held in their place before they were merged into
        self.tied_source: Any = None  # the layer whose adapters this one shares, if any
        self.merged_norm_ratio: dict[str, dict[str, Tensor]] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, name)

    # ------------------------------------------------------------------ what a method says

    def create_containers(self) -> None:
        """Create what holds the parameters of all adapters."""
        raise NotImplementedError

    def modes(self, weight: AdaptedWeight, config: Any, name: str) -> AdaptedWeight:
        """The weight with the modes that the method sees."""
        return weight

    def create_parameters(self, adapter_name: str, config: Any, name: str) -> None:
        """Create the parameters of an adapter and note its ``effective_ranks``; ``name`` is the layer's."""
        raise NotImplementedError

    def reset_adapter(self, adapter_name: str, config: Any) -> None:
        """Draw the parameters of an adapter anew; its update becomes zero."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str, weight: str | None = None) -> Tensor:
        """The update of an adapter, its scale included, in the shape of the stored weight.

        Args:
            adapter: its name.
            weight: name of the adapted weight; may be left out where the layer has only one.
        """
        raise NotImplementedError

    def add_delta(self, weight: Tensor, adapter: str, name: str) -> Tensor:
        """A weight plus the update that an adapter makes to the base weight of that name."""
        delta = self.get_delta_weight(adapter, name)
        return weight + (bases.spread_like(delta, weight) if isinstance(weight, DTensor) else delta)

    def drops(self, adapter_name: str) -> bool:
        """Whether the update's input is dropped out now."""
        return False

    def drop(self, adapter_name: str, input: Tensor) -> Tensor:
        """The update's input after dropout."""
        return input

    # ------------------------------------------------------------------ what a kind of layer says

    def describe_weights(self, config: Any, name: str) -> list[AdaptedWeight]:
        """The weights of the base layer to adapt."""
        raise NotImplementedError

    def run_base(self, weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The base layer's own forward, with the given weights (by name) in place of its own."""
        return stand_in.run(self.base_layer, weights, args, kwargs)

    def form_apart(self, adapter_name: str) -> Form | None:
        """The form in which the update's output is computed apart from the base layer's; None where it cannot be."""
        return None

    def cheaper_form(self, adapter_name: str) -> Form:
        """What ``forward='auto'`` takes: merged or the form apart; asked where there is one."""
        return "merged"

    def delta_output(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """The update's own output, without bias; defined where there is a form apart."""
        raise NotImplementedError

    # ------------------------------------------------------------------ adapters

    def update_layer(self, adapter_name: str, config: Any, name: str) -> None:
        """Create the parameters of a new adapter (or replace those of an old one)."""
        weights = {weight.name: self.modes(weight, config, name) for weight in self.describe_weights(config, name)}
        self.check_config(config, name)
        for key in weights:
            owner, attribute = stand_in.place(self.get_base_layer(), key)
            if isinstance(vars(owner).get(attribute), Tensor):
                raise ValueError(
                    f"{name}: its {key} is computed anew by a hook (torch.nn.utils.prune, weight_norm, spectral_norm), "
                    "which an update would not survive; call prune.remove, or use torch.nn.utils.parametrizations"
                )
        self.weights[adapter_name] = weights
        scales = {key: scaling_of(weight, config, name) for key, weight in weights.items()}
        # PEFT's own functions read and set one factor per adapter and layer; weights may differ in theirs.
        self.scaling[adapter_name] = largest = max(scales.values(), key=abs)
        self._configured_scaling[adapter_name] = largest
        self._relative_scaling[adapter_name] = {key: scale / largest if largest else 1 for key, scale in scales.items()}
        self.configured_form[adapter_name] = config.forward
        self.revision += 1
        self.create_parameters(adapter_name, config, name)
        if self.quantised() and self.apart(adapter_name) is None:
            kind = type(self.get_base_layer()).__name__
            raise ValueError(f"{name}: a quantised {kind} cannot be adapted; leave it out of the targets")
        self.reset_adapter(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        for weight in self._spread_weights(adapter_name):
            bases.make_same((p for n, p in self.named_parameters() if f".{adapter_name}." in n), weight)
        if config.use_dora:
            magnitude.create(self, adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def check_config(self, config: Any, name: str) -> None:
        """Raise ValueError for settings that the layer does not know."""
        if config.use_dora and not self.supports_dora:
            raise ValueError(f"use_dora: {name} ({type(self.get_base_layer()).__name__}) has no magnitude per output")

    # ------------------------------------------------------------------ weights

    def get_base_layer(self) -> Any:
        """The layer whose weights are adapted."""
        return self.base_layer

    def full_name(self, weight: str) -> str:
        """Name of a weight in the model, for messages."""
        return f"{self.layer_name}.{weight}".lstrip(".")

    def base_weight(self, name: str) -> Tensor:
        """The base layer's own weight of that name."""
        return stand_in.value(self.get_base_layer(), name)

    def quantised_as(self, name: str) -> str | None:
        """What the weight of that name is quantised to, in a word, if it is: now, as models are quantised in place."""
        base = self.get_base_layer()
        return None if bases.plain(base, name) else bases.quantised_as(*stand_in.place(base, name))

    def quantised(self) -> bool:
        """Whether an adapted weight is quantised: it is never added to, and the update runs apart from it."""
        return any(self.quantised_as(name) for weights in self.weights.values() for name in weights)

    def adapted_weight(self, name: str, adapters: list[str]) -> Tensor:
        """The base weight with the updates of the given active adapters, in the base weight's dtype.

        Raises:
            ValueError: if the weight is quantised, and so cannot be added to.
        """
        if (kind := self.quantised_as(name)) is not None:
            raise ValueError(
                f"{self.full_name(name)}: a quantised weight ({kind}), which this layer's adapter would be added to; "
                "keep this layer in full precision, or quantise the model before it is wrapped, without this layer"
            )
        if stand_in.set_by_hook(self.get_base_layer(), name):
            raise ValueError(
                f"{self.full_name(name)}: is computed anew by a hook since it was adapted (prune, weight_norm), which "
                "an update would not survive; make it a parameter again (torch.nn.utils.prune.remove)"
            )
        base = weight = self.base_weight(name)
        described = next(self.weights[adapter][name] for adapter in adapters if name in self.weights[adapter])
        if base.shape != described.weight_shape:
            raise ValueError(
                f"{self.full_name(name)}: {list(base.shape)} of its {list(described.weight_shape)} is here; have FSDP "
                "wrap whole blocks (peft.utils.other.fsdp_auto_wrap_policy), not single adapted layers"
            )
        for adapter in adapters:
            if name in self.weights[adapter]:
                weight = self.add_delta(weight, adapter, name)
                if adapter in self.tucker_magnitude:
                    weight = weight * magnitude.ratio(self, adapter, name, weight)
        return weight.to(base.dtype)

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
        if self.disable_adapters or self.merged or not adapters or self.quantised_as(name):
            return self.base_weight(name)
        base, full_name = self.base_weight(name), self.full_name(name)
        return lazy(full_name, base, lambda: self.adapted_weight(name, adapters), self.stamp, self.parameters())

    def stamp(self) -> Any:
        """What tells states of the layer apart in which its weights differ."""
        how = self.disable_adapters, *self.active_adapters, *self.merged_adapters, *self.scaling.items()
        return how, tuple([(id(p), 0 if p.is_inference() else p._version) for p in self.parameters()])

    # ------------------------------------------------------------------ forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base layer with its adapted weights; with ``adapter_names``, each example under its own adapter."""
        if (names := kwargs.pop("adapter_names", None)) is not None:
            return run_mixed(self, names, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self._present(self.active_adapters)
        if self.disable_adapters or self.merged or not adapters:
            return self.base_layer(*args, **kwargs)
        if self.form_for(adapters) != "merged":
            return self.run_apart(adapters, *args, **kwargs)
        names = dict.fromkeys(name for adapter in adapters for name in self.weights[adapter])
        return self.run_base({name: self.adapted_weight(name, adapters) for name in names}, *args, **kwargs)

    def run_apart(self, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        """The factored and the dense form: the base layer's output plus those of the updates."""
        result = self.base_layer(*args, **kwargs)
        for adapter in adapters:
            result = result + self.delta_output(adapter, *args, **kwargs).to(result.dtype)
        return result

    def form_for(self, adapters: list[str]) -> Form:
        """The form in which the layer runs now, with these adapters; see the table above.

        Magnitudes need W + delta. A weight that cannot be added to needs the update apart, as does dropout. Otherwise
        the configuration of the first adapter decides, whose ``auto`` is the cheaper form (``cheaper_form``).
        """
        if any(adapter in self.tucker_magnitude for adapter in adapters):
            return "merged"
        forms = [self.apart(adapter) for adapter in adapters]
        if None in forms:
            return "merged"
        apart: Form = "dense" if "dense" in forms else "factored"
        if self._weight_is_elsewhere() or any(self.drops(adapter) for adapter in adapters):
            return apart
        configured = self.configured_form[adapters[0]]
        if configured == "auto":
            return apart if self._hooked() else self.cheaper_form(adapters[0])
        return apart if configured == "factored" else "merged"

    def apart(self, adapter_name: str) -> Form | None:
        """``form_apart``; None where tensor parallelism lays out what comes in and what goes out for its own weight."""
        return None if self._spread_weights(adapter_name) else self.form_apart(adapter_name)

    def _spread_weights(self, adapter_name: str) -> list[DTensor]:
        base = self.get_base_layer()
        names = [name for name in self.weights[adapter_name] if not bases.plain(base, name)]
        kept = [bases.stored(*stand_in.place(base, name)) for name in names]
        return [weight for weight in kept if isinstance(weight, DTensor)]

    def _weight_is_elsewhere(self) -> bool:
        """Whether the weight cannot be added to: quantised, or brought in by a hook of the base layer's own forward.

        accelerate's hook brings it from where it is offloaded, diffusers' from the dtype in which it is stored.
        """
        base = self.base_layer
        if self.quantised() or "_hf_hook" in vars(base) or "_diffusers_hook" in vars(base):
            return True
        names = {name for weights in self.weights.values() for name in weights}
        return any(stand_in.set_by_hook(self.get_base_layer(), n) for n in names if not bases.plain(base, n))

    def _hooked(self) -> bool:
        """Whether calling the base layer may do more than its op: then ``auto`` calls it as it is, as LoRA does."""
        base = self.base_layer
        return bool(base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base))

    # ------------------------------------------------------------------ merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the given adapters (default: the active ones) to the base weights.

        Args:
            safe_merge: check the merged weights for NaN and infinity before storing them.
            adapter_names: adapters to merge, in this order.

        Raises:
            ValueError: if a base weight is quantised, sharded or otherwise cannot hold the sum, or a check fails.
        """
        for adapter in self._present(check_adapters_to_merge(self, adapter_names)):
            merging.merge(self, adapter, safe_merge)
            self.merged_adapters.append(adapter)
        tied.follow_source(self)

    def unmerge(self) -> None:
        """Take all merged updates out of the base weights again, up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            merging.unmerge(self, self.merged_adapters.pop())
        tied.tie_again(self)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        # PEFT's own looks for an attribute `weight` only, and has adapters follow an offloaded or a float8 one.
        base, name = self.get_base_layer(), next(iter(next(iter(self.weights.values()))))
        weight = bases.stored(*stand_in.place(base, name))
        if not isinstance(weight, Tensor):  # packed away: the device is that of whatever the layer holds
            weight = next(chain(base.parameters(), base.buffers()), torch.empty(0))
        runs_on = (hook.execution_device for module in base.modules() for hook in stand_in.offloading(module))
        dtype = getattr(base_layer, "compute_dtype", weight.dtype)
        return next(runs_on, weight.device), dtype if dtype in bases.FLOATS else None

    def extra_repr(self) -> str:
        """Effective ranks by adapter."""
        return ", ".join(f"{adapter}: ranks {ranks}" for adapter, ranks in self.effective_ranks.items())

    def __repr__(self) -> str:
        return "flora." + super().__repr__()
