"""How layers share a budget: which weight's rank is raised next, and until when.

An allocation gives every rung of a ladder a level, and rungs are climbed in the order of their levels while the budget
pays for them:

- ``uniform``: the level is the rank, so all layers have one rank, and the remainder is given layer by layer;
- ``proportional``: parameters of the rung per entry of the weight, so every layer gets the same share of its size;
- ``spectral``: the energy that the rank below keeps of the pretrained weight (the squared singular values of its
  unfoldings along the channel modes), so every layer keeps about the same energy;
- ``gradient``: the energy that the rank below keeps of the gradients of a few batches, in the same modes. As with the
  weights it is a share of the layer's own: the step of AdamW does not grow with a layer's gradient, so energies of two
  layers cannot be compared as they are. EVA (arXiv 2410.07170) compares shares of a layer's activations likewise.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flora.adapters.gradients import EXACT, ModeSum, mode_sums
from flora.adapters.tucker import unfold
from flora.methods.ladders import Ladder, Rung

ALLOCATIONS = ("uniform", "proportional", "spectral", "gradient")
TOLERANCE = 0.01  # share of the budget that may be left

KNOWN = 64  # directions of a mode too large for a whole sum (``flora.adapters.gradients.EXACT``) that are looked at

Level = Callable[[int, int], float]  # (number of the weight, number of the rung) -> level, growing along a ladder
# (base model, ladders) -> by ladder and by mode of it, shares of the energy kept by the first 1, 2, ... directions
Spectra = Callable[[nn.Module, Sequence[Ladder]], list[list[Tensor]]]


def check_allocation(allocation: str | None) -> str:
    """The name of an allocation, None being ``uniform``; raises ValueError for others than the four."""
    if allocation is not None and allocation not in ALLOCATIONS:
        raise ValueError(f"adapter.allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}")
    return allocation or "uniform"


def levels(allocation: str, ladders: Sequence[Ladder], model: nn.Module, spectra: Spectra | None = None) -> Level:
    """The levels of all rungs under an allocation.

    Args:
        allocation: one of ``ALLOCATIONS``.
        ladders: of all adapted weights.
        model: the base model, whose weights ``spectral`` reads.
        spectra: of the gradients, for ``gradient``.

    Raises:
        ValueError: ``spectral`` on a model without values, ``gradient`` without spectra.
    """
    if allocation == "uniform":
        return lambda weight, rung: ladders[weight].rungs[rung].rank
    if allocation == "proportional":
        return lambda weight, rung: ladders[weight].rungs[rung].params / math.prod(ladders[weight].shape)
    if allocation == "spectral":
        energies = [_energies(ladder, model) for ladder in ladders]
    elif spectra is not None:
        energies = spectra(model, ladders)
    else:
        raise ValueError(
            "adapter.allocation=gradient reads gradients of training data, which there are only while a run trains; "
            "spectral reads the weights"
        )

    def kept_below(weight: int, rung: int) -> float:
        rank = ladders[weight].rungs[rung - 1].rank
        return min(float(kept[min(rank, len(kept)) - 1]) for kept in energies[weight])

    return kept_below


def _energies(ladder: Ladder, model: nn.Module) -> list[Tensor]:
    """Share of a weight's squared norm kept by its first 1, 2, ... singular directions, per mode of the ladder."""
    weight = model.get_parameter(ladder.weight).detach()
    if weight.is_meta or not weight.is_floating_point():
        raise ValueError("adapter.allocation=spectral reads the pretrained weights, which are not loaded here")
    tensor = weight.reshape(ladder.shape).to(torch.promote_types(weight.dtype, torch.float32))
    shares = []
    for mode in ladder.modes:
        matrix = unfold(tensor, mode)
        matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        squares = torch.linalg.eigvalsh(matrix @ matrix.T).flip(0).clamp(min=0).cumsum(0)
        shares.append((squares / squares[-1].clamp(min=torch.finfo(squares.dtype).tiny)).cpu())
    return shares


def gradient_spectra(
    ladders: Sequence[Ladder], model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> list[list[Tensor]]:
    """Shares of the gradients' squared norm kept by the first 1, 2, ... directions, by ladder and by mode of it.

    Of a mode larger than ``EXACT`` the first ``KNOWN`` are estimated from a sketch; from there the share is taken to
    grow evenly up to 1, which is the least that it can be, as further directions keep ever less.

    Args:
        ladders: of weights of ``model``.
        model: the base model, on the device of the batches.
        batches, loss: as of ``flora.init_from_gradients``.

    Raises:
        ValueError: a weight that is no floating-point parameter, or as of ``flora.adapters.gradients.mode_sums``.
    """
    weights: dict[nn.Parameter, list[tuple[Sequence[int], dict[int, int]]]] = {}
    places: list[tuple[nn.Parameter, int]] = []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for ladder in ladders:
        parameter = parameters.get(ladder.weight)
        if parameter is None or not parameter.is_floating_point():
            raise ValueError(
                f"adapter.allocation=gradient: {ladder.weight} is quantised or computed from others and has no "
                "gradient of its own; leave the layer out or take another allocation"
            )
        views = weights.setdefault(parameter, [])
        places.append((parameter, len(views)))
        sizes = {mode: ladder.shape[mode] for mode in ladder.modes}
        views.append((ladder.shape, {mode: d if d <= EXACT else min(d, KNOWN) for mode, d in sizes.items()}))
    sums = mode_sums(model, weights, batches, loss)
    return [
        [_kept(sums[parameter][view][mode], ladder.shape[mode]) for mode in ladder.modes]
        for ladder, (parameter, view) in zip(ladders, places, strict=True)
    ]


def _kept(mode_sum: ModeSum, size: int) -> Tensor:
    values, _ = mode_sum.leading()
    shares = (values.cpu().cumsum(0) / mode_sum.energy.cpu()).clamp(max=1)  # on a GPU no two sums need be equal
    rest = torch.arange(1, size - len(shares) + 1, dtype=shares.dtype) / max(size - len(shares), 1)
    return torch.cat([shares, shares[-1] + (1 - shares[-1]) * rest])


def climb(ladders: Sequence[Ladder], level: Level, budget: int) -> list[Rung]:
    """Start all weights at their lowest rung; then raise the one whose next level is lowest, while the budget lasts.

    Args:
        ladders: of the weights.
        level: of every rung, see ``levels``.
        budget: total parameters; what the lowest rungs take is spent in any case.

    Returns:
        a rung per weight. No weight can be raised by one more rung; where that leaves more than the tolerance, rungs of
        one weight are traded for rungs of another, as long as that comes closer to the budget.
    """
    at = [0] * len(ladders)
    left = budget - sum(ladder.rungs[0].params for ladder in ladders)
    queue = [(level(i, 1), i) for i, ladder in enumerate(ladders) if len(ladder.rungs) > 1]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        step = _step(ladders[i], at[i])
        if step > left:
            continue
        left -= step
        at[i] += 1
        if at[i] + 1 < len(ladders[i].rungs):
            heapq.heappush(queue, (level(i, at[i] + 1), i))
    while left > TOLERANCE * budget and (trade := _best_trade(ladders, at, left)):
        lowered, raised, gain = trade
        at[lowered] -= 1
        at[raised] += 1
        left -= gain
    return [ladder.rungs[rung] for ladder, rung in zip(ladders, at, strict=True)]


def _step(ladder: Ladder, rung: int) -> int:
    """What the next rung takes more."""
    return ladder.rungs[rung + 1].params - ladder.rungs[rung].params


def _best_trade(ladders: Sequence[Ladder], at: Sequence[int], left: int) -> tuple[int, int, int] | None:
    """The weight to lower by a rung and the one to raise by a rung that leave least of ``left``, and what they take."""
    raises = sorted((_step(ladder, at[i]), i) for i, ladder in enumerate(ladders) if at[i] + 1 < len(ladder.rungs))
    lowers = [(_step(ladder, at[i] - 1), i) for i, ladder in enumerate(ladders) if at[i] > 0]
    best: tuple[int, int, int] | None = None
    for freed, i in lowers:
        for taken, j in reversed(raises):
            if i != j and freed < taken <= freed + left:
                if best is None or taken - freed > best[2]:
                    best = (i, j, taken - freed)
                break
    return best
