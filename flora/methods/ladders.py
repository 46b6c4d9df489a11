"""Which ranks a weight can have under a method, and how many parameters each takes: the ladder of a weight."""

import copy
import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer, factorization
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from flora.adapters.config import FloraConfig
from flora.adapters.tucker import parameter_count
from flora.adapters.weights import ranks_of
from flora.methods.rivals.base import Parametrization, RivalLayer
from flora.replaced.config import ReplacedConfig
from flora.replaced.layer import ReplacedLayer
from flora.replaced.weights import AdaptedWeight


@dataclass(frozen=True)
class Rung:
    """One rank that a weight can have.

    Attributes:
        rank: as asked for, one integer.
        pattern: the entry in ``rank_pattern``: that integer, or FLoRA's effective rank per mode.
        params: trained parameters of the weight at this rank.
    """

    rank: int
    pattern: int | list[int]
    params: int


@dataclass(frozen=True)
class Ladder:
    """An adapted weight and the ranks it can have, growing in parameters.

    Attributes:
        name: of the layer, followed by the weight's where a layer has several.
        weight: path of the weight in the base model.
        shape: mode sizes as the method sees them.
        modes: those whose spectra say how much a rank keeps.
        rungs: at least one.
    """

    name: str
    weight: str
    shape: tuple[int, ...]
    modes: tuple[int, ...]
    rungs: tuple[Rung, ...]


def has_ranks(config_class: type) -> bool:
    """Whether the ladders of a method are known: it has a rank per weight, independent of the others' and fixed."""
    if issubclass(config_class, ReplacedConfig):
        return not config_class.shares_factors
    return config_class in (peft.LoraConfig, peft.LoHaConfig, peft.LoKrConfig)


def ladders_of(config: Any, model: nn.Module) -> list[Ladder]:
    """The weights that a PEFT config adapts in a model, each with its possible ranks; nothing is changed."""
    probe = copy.deepcopy(config)
    probe.rank_pattern = {".*": 1}
    ladders: list[Ladder] = []
    tucker_rungs = functools.cache(functools.partial(_tucker_rungs, config))
    for name, layer in wrapped_on_meta(probe, model).base_model.model.named_modules():
        if isinstance(layer, ReplacedLayer):
            name = name.removesuffix(layer.child_name).removesuffix(".")
            ladders += [
                _ladder_of_ours(config, name, layer, weight, tucker_rungs)
                for weight in layer.weights["default"].values()
            ]
        elif isinstance(layer, LoraLayer | LoHaLayer | LoKrLayer):
            ladders.append(_ladder_of_peft(config, name, layer))
    return ladders


def _ladder_of_ours(
    config: Any, name: str, layer: ReplacedLayer, weight: AdaptedWeight, tucker_rungs: Callable[..., Any]
) -> Ladder:
    outputs = math.prod(weight.weight_shape) if weight.output_dim is None else weight.weight_shape[weight.output_dim]
    magnitudes = outputs if config.use_dora else 0
    modes: tuple[int, ...] = ()
    if isinstance(layer, RivalLayer):
        groups = getattr(layer.get_base_layer(), "groups", 1)
        rungs = _rival_rungs(config.parametrization, weight.shape, groups, magnitudes)
    else:
        rungs = tucker_rungs(weight.shape, weight.kinds, magnitudes)
        modes = tuple(mode for mode, kind in enumerate(weight.kinds) if kind == "channel" and weight.shape[mode] > 1)
    several = len(layer.weights["default"]) > 1 or weight.name != "weight"
    path = f"{name}.{weight.name}".lstrip(".")
    return Ladder(path if several else name, path, weight.shape, modes or (0,), rungs)


def _tucker_rungs(
    config: FloraConfig, shape: tuple[int, ...], kinds: tuple[Any, ...], magnitudes: int
) -> tuple[Rung, ...]:
    probe = copy.copy(config)
    probe.rank_pattern = {}
    probe.clip_ranks = "mode" if config.clip_ranks == "none" else config.clip_ranks
    weight = AdaptedWeight("weight", shape, shape, kinds)
    rungs: list[Rung] = []
    for rank in range(1, max(shape) + 1):
        probe.r = rank
        ranks = list(ranks_of(weight, probe, ""))
        if rungs and ranks == rungs[-1].pattern:
            break
        rungs.append(Rung(rank, ranks, parameter_count(shape, ranks) + magnitudes))
    return tuple(rungs)


@functools.cache
def _rival_rungs(
    parametrization: type[Parametrization], shape: tuple[int, ...], groups: int, magnitudes: int
) -> tuple[Rung, ...]:
    def params(rank: int) -> int:
        return sum(math.prod(size) for size in parametrization(shape, rank, groups).shapes().values()) + magnitudes

    return tuple(Rung(rank, rank, params(rank)) for rank in range(1, parametrization.highest_rank(shape, groups) + 1))


def _ladder_of_peft(config: Any, name: str, layer: Any) -> Ladder:
    base = layer.get_base_layer()
    shape = tuple(base.weight.shape)
    if isinstance(layer, LoraLayer):
        rungs = _lora_rungs(shape, getattr(base, "groups", 1), shape[0] if config.use_dora else 0)
    else:
        pointwise = all(size == 1 for size in shape[2:])
        tucker = config.use_effective_conv2d and not pointwise
        if isinstance(layer, LoHaLayer):
            rungs = _loha_rungs(shape, tucker)
        else:
            rungs = _lokr_rungs(shape, tucker, config.decompose_both, config.decompose_factor)
    return Ladder(name, f"{name}.weight", shape, (0,), rungs)


@functools.cache
def _lora_rungs(shape: tuple[int, ...], groups: int, magnitudes: int) -> tuple[Rung, ...]:
    # PEFT: A [r, in, k...] over all groups, B [out, r / groups]; the rank is a multiple of the groups.
    inputs, outputs = math.prod(shape[1:]) * groups, shape[0] // groups
    highest = max(groups, min(shape[0], math.prod(shape[1:])))
    ranks = range(groups, highest + 1, groups)
    return tuple(Rung(r, r, r * (inputs + outputs) + magnitudes) for r in ranks)


@functools.cache
def _loha_rungs(shape: tuple[int, ...], tucker: bool) -> tuple[Rung, ...]:
    rows, kernel = shape[0], math.prod(shape[2:])
    columns = shape[1] if tucker else shape[1] * kernel
    ranks = range(1, min(rows, columns) + 1)
    return tuple(Rung(r, r, 2 * (r * (rows + columns) + (r * r * kernel if tucker else 0))) for r in ranks)


@functools.cache
def _lokr_rungs(shape: tuple[int, ...], tucker: bool, decompose_both: bool, factor: int) -> tuple[Rung, ...]:
    kernel = math.prod(shape[2:])
    (in_small, in_large), (out_small, out_large) = factorization(shape[1], factor), factorization(shape[0], factor)

    def params(r: int) -> int:
        small, large = out_small * in_small, out_large * in_large * kernel
        if decompose_both and r < max(out_small, in_small) / 2:
            small = r * (out_small + in_small)
        if r < max(out_large, in_large) / 2:
            large = r * r * kernel + r * (out_large + in_large) if tucker else r * (out_large + in_large * kernel)
        return small + large

    highest = max(1, math.ceil(max(out_large, in_large) / 2), math.ceil(max(out_small, in_small) / 2))
    rungs: list[Rung] = []
    for rank in range(highest, 0, -1):  # from the full matrices down: a product that takes more than they do is no use
        if not rungs or params(rank) < rungs[-1].params:
            rungs.append(Rung(rank, rank, params(rank)))
    return tuple(reversed(rungs))


def wrapped_on_meta(config: Any, model: nn.Module) -> Any:
    """What PEFT makes of a model, on the meta device; the given one stays as it is."""
    config = copy.deepcopy(config)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # some starts decompose the weight, which has no values here
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return peft.get_peft_model(skeleton(model), config)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model's structure, with its parameters and buffers on the meta device."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    memo |= {id(b): b.detach().to("meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)
