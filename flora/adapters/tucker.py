"""The mathematics of FLoRA: tensors in Tucker form, without any framework around them.

A weight change of N modes is held as a core ``G`` (r_1 x ... x r_N) and one factor ``A_n`` (d_n x r_n) per mode,

    delta = scale * (G x_1 A_1 x_2 A_2 ... x_N A_N),        x_n = mode-n product

(arXiv 2405.14739; Kolda & Bader, "Tensor Decompositions and Applications", SIAM Review 2009, for the vocabulary). Modes
follow the order of PyTorch's weight. A mode without a factor (``None``) is left as it is: modes of size 1 need none.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

ClipRanks = Literal["multilinear", "mode", "none"]


def clip_ranks(shape: Sequence[int], ranks: Sequence[int], how: ClipRanks = "multilinear") -> tuple[int, ...]:
    """Ranks that are useful for a tensor of this shape.

    Args:
        shape: mode sizes d_1 .. d_N.
        ranks: requested ranks r_1 .. r_N, each at least 1.
        how: ``mode`` cuts r_n to d_n; ``multilinear`` also to the product of the other ranks, because the mode-n
            unfolding of the core has only that many columns; ``none`` leaves the ranks alone.

    Returns:
        The effective ranks. A core of these ranks reaches every tensor that the requested ranks reach.
    """
    if len(shape) != len(ranks):
        raise ValueError(f"ranks: {len(ranks)} given for a weight of {len(shape)} modes {tuple(shape)}")
    if any(rank < 1 for rank in ranks):
        raise ValueError(f"ranks: must be 1 or more, got {tuple(ranks)}")
    if how == "none":
        return tuple(ranks)
    clipped = [min(size, rank) for size, rank in zip(shape, ranks, strict=True)]
    if how == "multilinear" and len(clipped) > 1:
        # At most the largest rank can exceed the product of the others, and cutting it keeps the rest within bounds.
        largest = max(range(len(clipped)), key=clipped.__getitem__)
        clipped[largest] = min(clipped[largest], math.prod(clipped[:largest] + clipped[largest + 1 :]))
    return tuple(clipped)


def factor_modes(shape: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Modes that carry a factor: all but those of size 1 and rank 1."""
    return tuple(mode for mode, (size, rank) in enumerate(zip(shape, ranks, strict=True)) if size > 1 or rank > 1)


def parameter_count(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Number of entries of the core and the factors: prod r_n + sum d_n r_n over the modes that carry a factor."""
    return math.prod(ranks) + sum(shape[mode] * ranks[mode] for mode in factor_modes(shape, ranks))


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Mode-n unfolding, (d_1, ..., d_N) -> (d_n, product of the others, in their order)."""
    return tensor.movedim(mode, 0).flatten(1)


def mode_product(tensor: Tensor, factor: Tensor, mode: int) -> Tensor:
    """Mode-n product: contracts mode ``mode`` (size r) of ``tensor`` with the columns of ``factor`` (d x r).

    Leading batch dimensions of ``factor`` (... x d x r) must lead ``tensor`` too; ``mode`` counts after them.
    """
    batch = factor.shape[:-2]
    size, rank = factor.shape[-2:]
    shape = tensor.shape[len(batch) :]
    before, after = math.prod(shape[:mode]), math.prod(shape[mode + 1 :])
    if after == 1:  # one matrix product instead of `before` matrix-vector products
        product = tensor.reshape(*batch, before, rank) @ factor.transpose(-2, -1)
    elif before == 1:
        product = factor @ tensor.reshape(*batch, rank, after)
    else:
        # Broadcast matmul would take another route, with other rounding, for tensors that require gradients.
        product = torch.einsum("...dr,...lrx->...ldx", factor, tensor.reshape(*batch, before, rank, after))
    return product.reshape(*batch, *shape[:mode], size, *shape[mode + 1 :])


def to_tensor(core: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """The full tensor G x_1 A_1 ... x_N A_N, shape (d_1, ..., d_N).

    Small modes are contracted first, so that the last and largest contraction is one plain matrix product. Same-shaped
    tensors can be built together: with a leading batch dimension on the core and on every factor.
    """
    tensor = core
    order = sorted(range(len(factors)), key=lambda mode: (0 if (f := factors[mode]) is None else f.shape[-2], -mode))
    for mode in order:
        factor = factors[mode]
        if factor is not None:
            tensor = mode_product(tensor, factor, mode)
    return tensor


def add_tensor(weight: Tensor, core: Tensor, factors: Sequence[Tensor | None], scale: float) -> Tensor:
    """``weight + scale * to_tensor(core, factors)``, laid out in memory as ``weight``, in few operations.

    The factors of the small modes (kernel positions) become one matrix, their Kronecker product, and the last and
    largest product is added to the weight as it is computed.

    Args:
        weight: d_1 x ... x d_N.
        core: r_1 x ... x r_N.
        factors: d_n x r_n each, ``None`` for modes without one.
        scale: factor of the update.

    Returns:
        The sum, in the wider of the dtypes of the weight and the core.
    """
    if not weight.is_contiguous():
        strides = weight.stride()
        order = sorted(range(weight.dim()), key=lambda mode: -strides[mode])  # channels-last: 0, 2, 3, 1
        dense = weight.permute(order)
        if not dense.is_contiguous():
            return weight + scale * to_tensor(core, factors)
        total = add_tensor(dense, core.permute(order), [factors[mode] for mode in order], scale)
        return total.permute([order.index(mode) for mode in range(len(order))])
    rows, others = factors[0], [factor for factor in factors[1:] if factor is not None]
    left = any(factor is None and rank > 1 for factor, rank in zip(factors, core.shape, strict=True))
    if rows is None or not others or left or weight.numel() == 0:
        return weight + scale * to_tensor(core, factors)
    dtype = torch.promote_types(weight.dtype, core.dtype)
    rows, *others = (factor.to(dtype) for factor in (rows, *others))
    first, last = others[0], others[-1]
    columns = core.to(dtype)
    if len(others) == 1:
        columns = columns.reshape(rows.shape[1], -1) @ first.T
    elif len(first) >= len(last):  # rank of the rows x wide mode x small positions
        along = _kronecker(others[1:])
        columns = columns.reshape(-1, along.shape[1]) @ along.T
        columns = _in_each(first, columns.view(rows.shape[1], -1, len(along)))
    else:  # rank of the rows x small positions x wide mode
        along = _kronecker(others[:-1])
        columns = _in_each(along, columns.reshape(rows.shape[1], along.shape[1], -1))
        columns = columns.view(-1, last.shape[1]) @ last.T
    flat = weight.view(len(rows), -1).to(dtype)
    return torch.addmm(flat, rows, columns.reshape(rows.shape[1], -1), alpha=scale).view(weight.shape)


def _in_each(matrix: Tensor, batch: Tensor) -> Tensor:
    """``matrix @ batch``; torch.matmul would round otherwise where gradients are required, by another route."""
    return torch.bmm(matrix.expand(len(batch), -1, -1), batch)


def _kronecker(factors: Sequence[Tensor]) -> Tensor:
    """Matrix of all products of rows and of columns of the factors, those of the last changing fastest."""
    product = factors[0]
    for factor in factors[1:]:
        both = product[:, None, :, None] * factor[None, :, None, :]
        product = both.view(len(product) * len(factor), -1)
    return product


def leading_subspace(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """Orthonormal basis (d_n x rank) of the leading left singular subspace of the mode-n unfolding.

    Where the unfolding has fewer singular vectors than ``rank``, the basis is completed by directions orthogonal to
    them. Large unfoldings (both sides above 2048) use randomised subspace iteration (Halko et al., 2011).
    """
    matrix = unfold(tensor, mode)
    short = min(matrix.shape)
    if short > 2048 and 4 * rank < short:
        basis = torch.svd_lowrank(matrix, q=rank + 16, niter=4)[0]
    else:
        basis = torch.linalg.svd(matrix, full_matrices=False)[0]
    basis = basis[:, :rank]
    if basis.shape[1] < rank:
        noise = torch.randn(matrix.shape[0], rank - basis.shape[1], dtype=matrix.dtype, device=matrix.device)
        basis = torch.linalg.qr(torch.cat([basis, noise], dim=1))[0]
    return basis


def project(tensor: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """Core of ``tensor`` in the subspaces of orthonormal ``factors``: tensor x_1 A_1^T ... x_N A_N^T."""
    core = tensor
    for mode, factor in enumerate(factors):
        if factor is not None:
            core = mode_product(core, factor.mT, mode)
    return core


def hosvd(tensor: Tensor, ranks: Sequence[int]) -> tuple[Tensor, list[Tensor | None]]:
    """Truncated higher-order SVD (De Lathauwer et al., 2000): core and orthonormal factors of the given ranks."""
    factors: list[Tensor | None] = [None] * tensor.dim()
    for mode in factor_modes(tensor.shape, ranks):
        factors[mode] = leading_subspace(tensor, mode, ranks[mode])
    return project(tensor, factors), factors


def hooi(
    tensor: Tensor, ranks: Sequence[int], max_iterations: int = 50, tolerance: float = 1e-8
) -> tuple[Tensor, list[Tensor | None]]:
    """Higher-order orthogonal iteration (De Lathauwer et al., 2000), started from the HOSVD.

    Alternates over the modes until the norm of the core, which grows with the fit, changes by less than ``tolerance``
    relative to the norm of the tensor.
    """
    core, factors = hosvd(tensor, ranks)
    modes = factor_modes(tensor.shape, ranks)
    if len(modes) < 2:
        return core, factors
    scale = tensor.norm().clamp_min(torch.finfo(tensor.dtype).tiny)
    for _ in range(max_iterations):
        previous = core.norm()
        for mode in modes:
            others = [None if other == mode else factor for other, factor in enumerate(factors)]
            factors[mode] = leading_subspace(project(tensor, others), mode, ranks[mode])
        core = project(tensor, factors)
        if (core.norm() - previous).abs() < tolerance * scale:
            break
    return core, factors


def ranks_for_energy(tensor: Tensor, energy: float) -> tuple[int, ...]:
    """Smallest ranks whose modes each keep at least this share (0 to 1] of the squared norm of the tensor."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy: must be above 0 and at most 1, got {energy}")
    ranks = []
    for mode in range(tensor.dim()):
        kept = torch.linalg.svdvals(unfold(tensor, mode)).square().cumsum(0)
        # The factor keeps rounding from asking for a rank more when the energy is 1.
        threshold = energy * kept[-1] * (1 - 4 * torch.finfo(kept.dtype).eps)
        ranks.append(max(1, int((kept < threshold).sum()) + 1 if kept[-1] > 0 else 1))
    return tuple(ranks)


def concatenate(parts: Sequence[tuple[Tensor, Sequence[Tensor | None]]]) -> tuple[Tensor, list[Tensor | None]]:
    """Exact sum of several Tucker forms of one shape: superdiagonal blocks of the cores, factors side by side.

    Ranks add up. Where a summed rank exceeds what the mode can use (its size, or the product of the other ranks), a QR
    decomposition moves the surplus into the core, so the result has at most the ranks of a general tensor.
    """
    modes = parts[0][0].dim()
    columns = [[core.new_ones(1, 1) if f[mode] is None else f[mode] for core, f in parts] for mode in range(modes)]
    factors = [torch.cat(column, dim=1) for column in columns]  # type: ignore[arg-type]
    core = parts[0][0].new_zeros([factor.shape[1] for factor in factors])
    start = [0] * modes
    for part, _ in parts:
        block = tuple(slice(first, first + rank) for first, rank in zip(start, part.shape, strict=True))
        core[block] = part
        start = [first + rank for first, rank in zip(start, part.shape, strict=True)]
    return reduce_ranks(core, factors)


def reduce_ranks(core: Tensor, factors: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
    """The same tensor with ranks at most the mode sizes and the products of the other ranks; exact, by QR."""
    reduced: list[Tensor | None] = list(factors)
    for mode, factor in enumerate(reduced):
        if factor is not None and factor.shape[1] > factor.shape[0]:
            basis, rest = torch.linalg.qr(factor)
            reduced[mode], core = basis, mode_product(core, rest, mode)
    for mode, factor in enumerate(reduced):
        others = core.numel() // core.shape[mode]
        if factor is not None and core.shape[mode] > others:
            basis, rest = torch.linalg.qr(unfold(core, mode))
            reduced[mode] = factor @ basis
            core = rest.reshape(others, *core.shape[:mode], *core.shape[mode + 1 :]).movedim(0, mode).contiguous()
        if factor is not None and tuple(factor.shape) == (1, 1):
            core, reduced[mode] = core * factor, None
    return core, reduced


def truncate(
    core: Tensor, factors: Sequence[Tensor | None], ranks: Sequence[int]
) -> tuple[Tensor, list[Tensor | None]]:
    """Best-fit Tucker form of lower ranks by HOOI, computed on the core: the full tensor is never built."""
    bases: list[Tensor | None] = list(factors)
    for mode, factor in enumerate(factors):
        if factor is not None:
            bases[mode], rest = torch.linalg.qr(factor)
            core = mode_product(core, rest, mode)
    lower = [min(rank, size) for rank, size in zip(ranks, core.shape, strict=True)]
    small, inner = hooi(core, lower)
    outer = [
        basis if turn is None else basis @ turn if basis is not None else turn
        for basis, turn in zip(bases, inner, strict=True)
    ]
    return small, outer
