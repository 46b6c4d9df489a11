"""Ranks from a budget: given how many parameters a method may train, which rank each layer gets.

Every adapted weight has a ladder of ranks with their parameter counts, up to the sizes of its modes. An allocation
gives every rung a level, and rungs are climbed in the order of their levels while the budget pays for them:

- ``uniform``: the level is the rank, so all layers have one rank, and the remainder is given layer by layer;
- ``proportional``: parameters of the rung per entry of the weight, so every layer gets the same share of its size;
- ``spectral``: the energy that the rank below keeps of the pretrained weight (the squared singular values of its
  unfoldings along the channel modes), so every layer keeps about the same energy.
"""

import contextlib
import copy
import functools
import heapq
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer, factorization
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from flora.adapters.config import FloraConfig
from flora.adapters.tucker import parameter_count, unfold
from flora.adapters.weights import ranks_of
from flora.methods.heads import in_head, trained
from flora.methods.rivals.base import Parametrization, RivalLayer
from flora.replaced.config import ReplacedConfig
from flora.replaced.layer import ReplacedLayer
from flora.replaced.weights import AdaptedWeight

ALLOCATIONS = ("uniform", "proportional", "spectral")
TOLERANCE = 0.01
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
_SIZE = re.compile(r"(?P<number>\d+(\.\d*)?([eE][+-]?\d+)?)\s*(?P<unit>%|[kMG]?)")
_MATCH = re.compile(r"match:(?P<method>\w+)(:(?P<rank>[1-9]\d*))?")


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


class Budget:
    """A number of trainable parameters outside the head, and how layers share it.

    Args:
        size: ``2%`` of the backbone (the model without its head), a number with or without unit (``1330000``,
            ``1.33M``, ``500k``), or ``match:METHOD[:RANK]``: what the config of that name in configs/adapter trains on
            the same model at that rank.
        allocation: ``uniform`` (also None), ``proportional`` or ``spectral``.

    Raises:
        ValueError: a size or an allocation that cannot be read.
    """

    def __init__(self, size: str | int | float, allocation: str | None = None) -> None:
        self.size = size
        self.allocation = check_allocation(allocation)
        text = "" if isinstance(size, bool) else str(size).strip()
        self._match, number = _MATCH.fullmatch(text), _SIZE.fullmatch(text)
        self._percent = number is not None and number["unit"] == "%"
        self._number = float(number["number"]) * _UNITS.get(number["unit"], 1) if number else 0.0
        if self._match is None and not 0 < self._number < math.inf:
            raise ValueError(
                f"adapter.budget must be a share of the backbone (2%), a number of parameters (1.33M) or "
                f"match:METHOD:RANK (match:lora:8), got {size!r}"
            )

    def parameters(self, model: nn.Module, head: Sequence[str], targets: str | Sequence[str]) -> int:
        """The budget on a model, in parameters; ``targets`` are the layers that a matched method adapts."""
        if self._match is not None:
            return _trained_by(self._match["method"], self._match["rank"], model, head, targets)
        if self._percent:
            backbone = sum(p.numel() for name, p in model.named_parameters() if not in_head(name, head))
            return math.floor(backbone * self._number / 100)
        return math.floor(self._number)

    def solve(self, config: Any, model: nn.Module, head: Sequence[str], targets: str | Sequence[str]) -> None:
        """Write the ranks to ``config.rank_pattern`` and print them on stderr, layer by layer.

        Args:
            config: PEFT config of the method, ready but for its ranks.
            model: the base model, on any device.
            head: names of its head's modules.
            targets: the configured targets, for a matched method.

        Raises:
            ValueError: the budget is out of the method's reach on this model, the message names what is possible; ranks
                that are given besides; ``spectral`` on a model without values.
        """
        if config.rank_pattern:
            raise ValueError("adapter.rank_pattern: adapter.budget sets the rank of every layer; give one of the two")
        budget = self.parameters(model, head, targets)
        rows = ladders(config, model)
        for factor in (16, 8, 4, 2) if getattr(config, "decompose_factor", 0) == -1 else ():
            if sum(row.rungs[-1].params for row in rows) >= budget:
                break
            config.decompose_factor = (
                factor  # LoKr's sizes end where its automatic factors do; smaller ones reach further
            )
            rows = ladders(config, model)
        chosen = climb(rows, self._levels(rows, model), budget)
        total = sum(rung.params for rung in chosen)
        self._check_landing(rows, total, budget)
        # Patterns match endings of names, so the longest come first.
        named = sorted(zip(rows, chosen, strict=True), key=lambda pair: (-len(pair[0].name), pair[0].name))
        config.rank_pattern = {re.escape(ladder.name): rung.pattern for ladder, rung in named}
        with _wrapped(config, model) as wrapped:
            found = trained(wrapped, head)[0]
        if found != total:
            raise ValueError(
                f"adapter.budget: an option of the adapter trains {found - total:+,} parameters that no rank decides "
                "(bias?); leave it out"
            )
        lines = [f"budget {self.size} = {budget:,} parameters, {self.allocation}: {total:,} used, {total / budget:.2%}"]
        for ladder, rung in zip(rows, chosen, strict=True):
            lines.append(f"  {ladder.name} {list(ladder.shape)}: rank {rung.pattern}, {rung.params:,} parameters")
        _print_once("\n".join(lines))

    def _levels(self, rows: Sequence[Ladder], model: nn.Module) -> Callable[[int, int], float]:
        """The level of a rung, by the number of its ladder and its own."""
        if self.allocation == "uniform":
            return lambda row, rung: rows[row].rungs[rung].rank
        if self.allocation == "proportional":
            return lambda row, rung: rows[row].rungs[rung].params / math.prod(rows[row].shape)
        energies = [_energies(ladder, model) for ladder in rows]

        def kept_below(row: int, rung: int) -> float:
            rank = rows[row].rungs[rung - 1].rank
            return min(float(kept[min(rank, len(kept)) - 1]) for kept in energies[row])

        return kept_below

    def _check_landing(self, rows: Sequence[Ladder], total: int, budget: int) -> None:
        if total > budget:
            reach = f"below the smallest adapter, rank 1 everywhere, of {total:,}"
        elif total >= (1 - TOLERANCE) * budget:
            return
        elif total == sum(row.rungs[-1].params for row in rows):
            reach = f"above the largest adapter, of {total:,}: no rank exceeds the size of its mode"
        else:
            reach = f"between two possible sizes, the smaller of {total:,}"
        raise ValueError(f"adapter.budget={self.size}, {budget:,} parameters on this model, is {reach}; choose {total}")


def check_allocation(allocation: str | None) -> str:
    """The name of an allocation, None being ``uniform``; raises ValueError for others than the three."""
    if allocation is not None and allocation not in ALLOCATIONS:
        raise ValueError(f"adapter.allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}")
    return allocation or "uniform"


def has_ranks(config_class: type) -> bool:
    """Whether the budget solver knows the ranks of a method: one per layer, independent of each other, fixed."""
    if issubclass(config_class, ReplacedConfig):
        return not config_class.shares_factors
    return config_class in (peft.LoraConfig, peft.LoHaConfig, peft.LoKrConfig)


def refuse(budget: Any, name: str) -> None:
    """Raise ValueError if a budget is asked of a method whose ranks cannot be solved for."""
    if budget is not None:
        raise ValueError(
            f"adapter.budget: {name} has no ranks that a budget could set layer by layer; leave the budget out"
        )


def climb(rows: Sequence[Ladder], level: Callable[[int, int], float], budget: int) -> list[Rung]:
    """Start all weights at their lowest rung; then raise the one whose next level is lowest, while the budget lasts.

    Args:
        rows: the weights.
        level: (number of the weight, number of the rung) -> level, which grows along a ladder.
        budget: total parameters; what the lowest rungs take is spent in any case.

    Returns:
        a rung per weight. No weight can be raised by one more rung; where that leaves more than the tolerance, rungs of
        one weight are traded for rungs of another, as long as that comes closer to the budget.
    """
    at = [0] * len(rows)
    left = budget - sum(row.rungs[0].params for row in rows)
    queue = [(level(i, 1), i) for i, row in enumerate(rows) if len(row.rungs) > 1]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        step = _step(rows[i], at[i])
        if step > left:
            continue
        left -= step
        at[i] += 1
        if at[i] + 1 < len(rows[i].rungs):
            heapq.heappush(queue, (level(i, at[i] + 1), i))
    while left > TOLERANCE * budget and (trade := _best_trade(rows, at, left)):
        lower, raised, gain = trade
        at[lower] -= 1
        at[raised] += 1
        left -= gain
    return [row.rungs[rung] for row, rung in zip(rows, at, strict=True)]


def _step(row: Ladder, rung: int) -> int:
    """What the next rung takes more."""
    return row.rungs[rung + 1].params - row.rungs[rung].params


def _best_trade(rows: Sequence[Ladder], at: Sequence[int], left: int) -> tuple[int, int, int] | None:
    """The weight to lower by a rung and the one to raise by a rung that leave least of ``left``, and what they take."""
    raises = sorted((_step(row, at[i]), i) for i, row in enumerate(rows) if at[i] + 1 < len(row.rungs))
    lowers = [(_step(row, at[i] - 1), i) for i, row in enumerate(rows) if at[i] > 0]
    found: tuple[int, int, int] | None = None
    for freed, i in lowers:
        for taken, j in reversed(raises):
            if i != j and freed < taken <= freed + left:
                if found is None or taken - freed > found[2]:
                    found = (i, j, taken - freed)
                break
    return found


def ladders(config: Any, model: nn.Module) -> list[Ladder]:
    """The weights that a PEFT config adapts in a model, each with its possible ranks; nothing is changed."""
    probe = copy.deepcopy(config)
    probe.rank_pattern = {".*": 1}
    found: list[Ladder] = []
    tucker_rungs = functools.cache(functools.partial(_tucker_rungs, config))
    with _wrapped(probe, model) as wrapped:
        tuner: Any = wrapped.base_model
        for name, layer in tuner.model.named_modules():
            if isinstance(layer, ReplacedLayer):
                name = name.removesuffix(layer.child_name).removesuffix(".")
                found += [
                    _flora_ladder(config, name, layer, weight, tucker_rungs)
                    for weight in layer.weights["default"].values()
                ]
            elif isinstance(layer, LoraLayer | LoHaLayer | LoKrLayer):
                found.append(_peft_ladder(config, name, layer))
    return found


def _flora_ladder(
    config: Any, name: str, layer: ReplacedLayer, weight: AdaptedWeight, tucker_rungs: Callable[..., Any]
) -> Ladder:
    outputs = math.prod(weight.weight_shape) if weight.output_dim is None else weight.weight_shape[weight.output_dim]
    magnitudes = outputs if config.use_dora else 0
    groups = getattr(layer.get_base_layer(), "groups", 1)
    if isinstance(layer, RivalLayer):
        rungs = _rival_rungs(config.parametrization, weight.shape, groups, magnitudes)
        modes: tuple[int, ...] = (0,)
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
    ranks = range(1, parametrization.highest_rank(shape, groups) + 1)
    sizes = [[math.prod(s) for s in parametrization(shape, rank, groups).shapes().values()] for rank in ranks]
    return tuple(Rung(rank, rank, sum(size) + magnitudes) for rank, size in enumerate(sizes, start=1))


def _peft_ladder(config: Any, name: str, layer: Any) -> Ladder:
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


def _energies(ladder: Ladder, model: nn.Module) -> list[Tensor]:
    """Share of a weight's squared norm kept by its first 1, 2, ... singular directions, per mode of the ladder."""
    weight = model.get_parameter(ladder.weight).detach()
    if weight.is_meta or not weight.is_floating_point():
        raise ValueError("adapter.allocation=spectral reads the pretrained weights, which are not loaded here")
    tensor = weight.reshape(ladder.shape).to(torch.promote_types(weight.dtype, torch.float32))
    found = []
    for mode in ladder.modes:
        matrix = unfold(tensor, mode)
        matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        squares = torch.linalg.eigvalsh(matrix @ matrix.T).flip(0).clamp(min=0).cumsum(0)
        found.append((squares / squares[-1].clamp(min=torch.finfo(squares.dtype).tiny)).cpu())
    return found


@contextlib.contextmanager
def _wrapped(config: Any, model: nn.Module):  # type: ignore[no-untyped-def]
    """The adapted model on the meta device; the given one stays as it is."""
    config = copy.deepcopy(config)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # some starts decompose the weight, which has no values here
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        yield peft.get_peft_model(_skeleton(model), config)


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model's structure, with its parameters and buffers on the meta device."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    memo |= {id(b): b.detach().to("meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)


def _trained_by(
    method: str, rank: str | None, model: nn.Module, head: Sequence[str], targets: str | Sequence[str]
) -> int:
    """Parameters outside the head that a method of configs/adapter trains on a model."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf, open_dict

    overrides = [f"adapter={method}", *([f"adapter.r={rank}"] if rank else [])]
    running = GlobalHydra.instance().is_initialized()
    context: Any = contextlib.nullcontext() if running else initialize_config_dir(str(CONFIGS), version_base="1.3")
    try:
        with context:
            cfg = compose("train", overrides)
    except HydraException as error:
        known = ", ".join(sorted(path.stem for path in (CONFIGS / "adapter").glob("*.yaml")))
        raise ValueError(
            f"adapter.budget: no method {method!r} with such a rank to match; there are {known}"
        ) from error
    with open_dict(cfg):
        cfg.model = {"adapter_targets": targets if isinstance(targets, str) else list(targets)}
    OmegaConf.resolve(cfg)
    rival = instantiate(cfg.adapter, _convert_="all")
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return trained(rival.apply(_skeleton(model), head).model, head)[0]


@functools.cache
def _print_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
