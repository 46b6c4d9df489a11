"""Where the energy of a weight's change lies: how much of it each structure keeps at equal parameters."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.adapters.tucker import clip_ranks, hooi, parameter_count, to_tensor, unfold


@dataclass(frozen=True)
class Kept:
    """Shares of the squared norm of one layer's change.

    Attributes:
        layer, shape: the weight.
        params: of the Tucker form with these ranks, which the other structures may spend as well.
        tucker: kept by the best Tucker form (HOOI).
        flattened: kept by the best matrix [out, in k...] of as many parameters; between two ranks, interpolated.
        shuffled: as ``tucker``, kernel positions shuffled first; mean over shuffles. None without kernel modes.
        modes: kept by the ranks of each mode alone, the others whole.
    """

    layer: str
    shape: tuple[int, ...]
    params: int
    tucker: float
    flattened: float
    shuffled: float | None
    modes: tuple[float, ...]


def energy_kept(layer: str, delta: Tensor, r: int, kernel_rank: int, shuffles: int = 5) -> Kept:
    """Shares kept of a change ``[out, in, k...]`` by FLoRA's form with these ranks and its rivals.

    Args:
        layer: the weight's name.
        delta: its change; not zero.
        r, kernel_rank: as in ``FloraConfig``.
        shuffles: random orders of the kernel positions to average over.
    """
    delta = delta.detach().double().cpu()
    shape = tuple(delta.shape)
    ranks = clip_ranks(shape, (r, r, *[kernel_rank] * (delta.ndim - 2)))
    params = parameter_count(shape, ranks)
    shuffled = [tucker_energy(shuffle_kernel(delta, seed), ranks) for seed in range(shuffles)]
    return Kept(
        layer,
        shape,
        params,
        tucker_energy(delta, ranks),
        matrix_energy(delta.flatten(1), params),
        statistics.fmean(shuffled) if shape[2:] and max(shape[2:]) > 1 else None,
        tuple(_leading(unfold(delta, mode), rank) for mode, rank in enumerate(ranks)),
    )


def tucker_energy(delta: Tensor, ranks: Sequence[int]) -> float:
    """Share of the squared norm that a Tucker form with these ranks keeps."""
    core, factors = hooi(delta, ranks)
    return float(1 - (delta - to_tensor(core, factors)).square().sum() / delta.square().sum())


def matrix_energy(matrix: Tensor, params: int) -> float:
    """Share that the best matrix of ``params / (rows + columns)`` ranks keeps, linear between whole ranks."""
    squares = torch.linalg.svdvals(matrix).square()
    ranks = min(params / sum(matrix.shape), len(squares))
    whole = int(ranks)
    part = (ranks - whole) * squares[whole] if whole < len(squares) else 0.0
    return float((squares[:whole].sum() + part) / squares.sum())


def shuffle_kernel(delta: Tensor, seed: int) -> Tensor:
    """The same numbers with kernel positions in a random order, one for the whole layer."""
    order = torch.randperm(delta[0, 0].numel(), generator=torch.Generator().manual_seed(seed))
    return delta.flatten(2)[..., order].reshape(delta.shape) if delta.ndim > 2 else delta


def _leading(unfolded: Tensor, rank: int) -> float:
    squares = torch.linalg.svdvals(unfolded).square()
    return float(squares[:rank].sum() / squares.sum())
