"""How layers share a budget: which weight's rank is raised next, and until when.

An allocation gives every rung of a ladder a level, and rungs are climbed in the order of their levels while the budget
pays for them:

- ``uniform``: the level is the rank, so all layers have one rank, and the remainder is given layer by layer;
- ``proportional``: parameters of the rung per entry of the weight, so every layer gets the same share of its size;
- ``spectral``: the energy that the rank below keeps of the pretrained weight (the squared singular values of its
  unfoldings along the channel modes), so every layer keeps about the same energy.
"""

import heapq
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flora.adapters.tucker import unfold
from flora.methods.ladders import Ladder, Rung

ALLOCATIONS = ("uniform", "proportional", "spectral")
TOLERANCE = 0.01  # share of the budget that may be left

Level = Callable[[int, int], float]  # (number of the weight, number of the rung) -> level, growing along a ladder


def check_allocation(allocation: str | None) -> str:
    """The name of an allocation, None being ``uniform``; raises ValueError for others than the three."""
    if allocation is not None and allocation not in ALLOCATIONS:
        raise ValueError(f"adapter.allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}")
    return allocation or "uniform"


def levels(allocation: str, ladders: Sequence[Ladder], model: nn.Module) -> Level:
    """The levels of all rungs under an allocation.

    Args:
        allocation: one of ``ALLOCATIONS``.
        ladders: of all adapted weights.
        model: the base model, whose weights ``spectral`` reads.

    Raises:
        ValueError: ``spectral`` on a model without values.
    """
    if allocation == "uniform":
        return lambda weight, rung: ladders[weight].rungs[rung].rank
    if allocation == "proportional":
        return lambda weight, rung: ladders[weight].rungs[rung].params / math.prod(ladders[weight].shape)
    energies = [_energies(ladder, model) for ladder in ladders]

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
