"""A GPU kernel that adds the updates of a stack of layers to their frozen weights in one launch."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_products(
    base, offsets, left, right, out, rows, columns, rank: tl.constexpr, scale, padded: tl.constexpr,
    aligned: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * tile_rows + tl.arange(0, tile_rows)
    j = tl.program_id(2) * tile_columns + tl.arange(0, tile_columns)
    k = tl.arange(0, padded)
    a = tl.load(left + layer * rows * rank + i[:, None] * rank + k, mask=(i[:, None] < rows) & (k < rank), other=0.0)
    b = tl.load(
        right + layer * rank * columns + k[:, None] * columns + j,
        mask=(k[:, None] < rank) & (j < columns),
        other=0.0,
    )
    product = tl.dot(a, b, input_precision="ieee")
    start = tl.load(offsets + layer)
    if aligned:
        start = tl.multiple_of(start, 16)
    inside = (i[:, None] < rows) & (j < columns)
    place = i[:, None].to(tl.int64) * columns + j
    total = tl.load(base + start + place, mask=inside, other=0.0).to(tl.float32) + scale * product
    tl.store(out + layer * rows * columns + place, total.to(out.dtype.element_ty), mask=inside)


def add_products(bases: list[Tensor], left: Tensor, right: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``bases[i] + scale * left[i] @ right[i]`` for all i, computed in fp32 and rounded once.

    Args:
        bases: n tensors of rows x columns numbers each, dense, of one dtype on one device; read in memory order.
        left: fp32 [n, rows, r], contiguous.
        right: fp32 [n, r, columns], contiguous.
        scale: factor of the products.
        dtype: of the result.

    Returns:
        [n, rows, columns].
    """
    n, rows, rank = left.shape
    columns = right.shape[2]
    first, itemsize = bases[0].data_ptr(), bases[0].element_size()
    # One pointer and offsets from it reach tensors of separate allocations.
    starts = tuple((base.data_ptr() - first) // itemsize for base in bases)
    out = torch.empty(n, rows, columns, dtype=dtype, device=left.device)
    tile_rows, tile_columns = (32, 128) if columns > 64 else (128, 32 if columns <= 32 else 64)
    padded = max(16, triton.next_power_of_2(rank))
    grid = (n, triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_columns))
    aligned = columns % 16 == 0 and all(start % 16 == 0 for start in starts)
    _add_products[grid](
        bases[0], _on(left.device, starts), left, right, out, rows, columns, rank, scale, padded, aligned, tile_rows,
        tile_columns,
    )  # fmt: skip
    return out


@lru_cache(maxsize=4096)
def _on(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    # Kept, so that only the first step copies them to the device, which a CUDA graph could not capture.
    return torch.tensor(numbers, device=device)
