"""One GPU kernel for many small matrix products: all layers of a model in a launch, whatever their shapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from flora.adapters.fast.plan import capturing

INTERPRETED = triton.knobs.runtime.interpret  # on the CPU, for tests
# Columns of the table that the kernel reads, a row per product: what ``Product.numbers`` returns.
_M, _N, _K, _C_START = map(tl.constexpr, range(4))
_AM_OUTER, _AM_INNER, _AM_SPLIT = map(tl.constexpr, range(4, 7))
_CM_OUTER, _CM_INNER, _CM_SPLIT = map(tl.constexpr, range(7, 10))
_AK_OUTER, _AK_INNER, _AK_SPLIT = map(tl.constexpr, range(10, 13))
_BK_OUTER, _BK_INNER, _BK_SPLIT = map(tl.constexpr, range(13, 16))
_B_N, _C_N, _COLUMNS = map(tl.constexpr, range(16, 19))
# Columns of the list of tiles: the product's number, the tile's place among its rows and columns.
_NUMBER, _DOWN, _ACROSS, _TILE_COLUMNS = map(tl.constexpr, range(4))
_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Walk(NamedTuple):
    """How an index moves through a buffer: ``i`` to ``(i // split) * outer + (i % split) * inner``."""

    outer: int
    inner: int = 0
    split: int = 1


@dataclass(frozen=True)
class Product:
    """c = scale * einsum("mk,kn->mn", a, b).

    Attributes:
        m, n, k: sizes.
        a, b, c: where each begins, in elements of the flat buffer that holds it; 0 for a tensor of its own.
        a_m, a_k, b_k, c_m: how these indices move.
        b_n, c_n: strides.
        scale: factor of the product.
    """

    m: int
    n: int
    k: int
    a: int
    a_m: Walk
    a_k: Walk
    b: int
    b_k: Walk
    b_n: int
    c: int
    c_m: Walk
    c_n: int
    scale: float = 1.0

    def numbers(self) -> tuple[int, ...]:
        """What the kernel reads, in the order of the table's columns."""
        walks = [number for walk in (self.a_m, self.c_m, self.a_k, self.b_k) for number in walk]
        return self.m, self.n, self.k, self.c, *walks, self.b_n, self.c_n


@triton.jit
def _offset(index, outer, inner, split, splits: tl.constexpr, unit: tl.constexpr):
    if splits:
        parts = split.to(tl.int32)
        return (index // parts) * outer + (index % parts) * inner
    return index if unit else index * outer


@triton.jit
def _products(
    a, b, c, base, a_starts, b_starts, bases, table, scales, tiles,
    tile_m: tl.constexpr, tile_n: tl.constexpr, tile_k: tl.constexpr,
    m_splits: tl.constexpr, k_splits: tl.constexpr, am_unit: tl.constexpr, cm_unit: tl.constexpr,
    ak_unit: tl.constexpr, bk_unit: tl.constexpr, bn_unit: tl.constexpr, cn_unit: tl.constexpr,
    aligned: tl.constexpr, has_base: tl.constexpr, operand: tl.constexpr,
):  # fmt: skip
    # One tile of one product: c = base + scale * einsum("mk,kn->mn", a, b).
    tile = tiles + tl.program_id(0).to(tl.int64) * _TILE_COLUMNS
    number = tl.load(tile + _NUMBER).to(tl.int64)
    row = table + number * _COLUMNS
    m, n, k = tl.load(row + _M).to(tl.int32), tl.load(row + _N).to(tl.int32), tl.load(row + _K).to(tl.int32)
    a_start, b_start, c_start = tl.load(a_starts + number), tl.load(b_starts + number), tl.load(row + _C_START)
    am_outer, am_inner = tl.load(row + _AM_OUTER).to(tl.int32), tl.load(row + _AM_INNER).to(tl.int32)
    cm_outer, cm_inner = tl.load(row + _CM_OUTER).to(tl.int32), tl.load(row + _CM_INNER).to(tl.int32)
    ak_outer, ak_inner = tl.load(row + _AK_OUTER).to(tl.int32), tl.load(row + _AK_INNER).to(tl.int32)
    bk_outer, bk_inner = tl.load(row + _BK_OUTER).to(tl.int32), tl.load(row + _BK_INNER).to(tl.int32)
    am_split, cm_split = tl.load(row + _AM_SPLIT), tl.load(row + _CM_SPLIT)
    ak_split, bk_split = tl.load(row + _AK_SPLIT), tl.load(row + _BK_SPLIT)
    b_n, c_n = tl.load(row + _B_N).to(tl.int32), tl.load(row + _C_N).to(tl.int32)
    base_start = tl.load(bases + number) if has_base else c_start
    if aligned:  # so that several elements are moved at once
        m, n, k = tl.multiple_of(m, 8), tl.multiple_of(n, 8), tl.multiple_of(k, 8)
        a_start, b_start = tl.multiple_of(a_start, 8), tl.multiple_of(b_start, 8)
        c_start, base_start = tl.multiple_of(c_start, 8), tl.multiple_of(base_start, 8)
        am_outer, cm_outer = tl.multiple_of(am_outer, 8), tl.multiple_of(cm_outer, 8)
        ak_outer, bk_outer = tl.multiple_of(ak_outer, 8), tl.multiple_of(bk_outer, 8)
        b_n, c_n = tl.multiple_of(b_n, 8), tl.multiple_of(c_n, 8)
    i = tl.load(tile + _DOWN) * tile_m + tl.arange(0, tile_m)
    j = tl.load(tile + _ACROSS) * tile_n + tl.arange(0, tile_n)
    a_rows = _offset(i, am_outer, am_inner, am_split, m_splits, am_unit)[:, None]
    b_columns = (j if bn_unit else j * b_n)[None, :]
    inside_m, inside_n = (i < m)[:, None], (j < n)[None, :]
    total = tl.zeros((tile_m, tile_n), tl.float32)
    for start in range(0, k, tile_k):
        p = start + tl.arange(0, tile_k)
        from_a = a + a_start + a_rows + _offset(p, ak_outer, ak_inner, ak_split, k_splits, ak_unit)[None, :]
        from_b = b + b_start + b_columns + _offset(p, bk_outer, bk_inner, bk_split, k_splits, bk_unit)[:, None]
        left = tl.load(from_a, mask=inside_m & (p < k)[None, :], other=0.0).to(operand)
        right = tl.load(from_b, mask=inside_n & (p < k)[:, None], other=0.0).to(operand)
        total = tl.dot(left, right, total, input_precision="ieee")
    total *= tl.load(scales + number)
    rows = _offset(i, cm_outer, cm_inner, cm_split, m_splits, cm_unit)[:, None]
    place = rows + (j if cn_unit else j * c_n)[None, :]
    inside = inside_m & inside_n
    if has_base:
        total += tl.load(base + base_start + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(c + c_start + place, total.to(c.dtype.element_ty), mask=inside)


class Operand(NamedTuple):
    """What products read: a flat buffer, or tensors of their own, of one dtype and device.

    Attributes:
        tensors: the buffer, or one tensor per product; held until the products are launched.
        starts: per product, where its part begins, in elements from the first one of the first tensor.
        even: whether all starts divide by 8, and the first tensor's address by 16.
    """

    tensors: Sequence[Tensor]
    starts: Tensor
    even: bool


def scattered(tensors: Sequence[Tensor]) -> Operand:
    """An operand of one tensor per product: one pointer, and offsets from it, reach separate allocations."""
    first, addresses = tensors[0], tuple(tensor.data_ptr() for tensor in tensors)
    if not capturing(first):
        stream = torch.cuda.current_stream(first.device).cuda_stream if first.is_cuda else 0
        return Operand(tensors, *_starts(first.device, stream, addresses, first.element_size()))
    # Nothing can be copied from the host in a capture, and what a graph reads must stay: the offsets become arguments
    # of kernels of the graph.
    offsets, even = _offsets(addresses, first.element_size())
    starts = torch.zeros(len(offsets), dtype=torch.int64, device=first.device)
    torch._foreach_add_(list(starts.unbind(0)), offsets)
    return Operand(tensors, starts, even)


@lru_cache(maxsize=4096)
def _starts(device: torch.device, stream: int, addresses: tuple[int, ...], size: int) -> tuple[Tensor, bool]:
    # Kept: a training step finds most of its tensors where those of the step before were. For a stream: to another one
    # the copy may not have come yet.
    offsets, even = _offsets(addresses, size)
    return _on(device, offsets), even


def _offsets(addresses: tuple[int, ...], size: int) -> tuple[list[int], bool]:
    """In elements of ``size`` bytes, and whether all are as even as ``Operand`` says."""
    offsets = [(address - addresses[0]) // size for address in addresses]
    return offsets, addresses[0] % 16 == 0 and not any(offset % 8 for offset in offsets)


def _on(device: torch.device, numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers).to(device, non_blocking=True)  # so few that the device need not be waited for


class _Layout(NamedTuple):
    """What the kernel is compiled for: which indices split, which strides are 1, whether all else divides by 8."""

    m_splits: bool
    k_splits: bool
    am_unit: bool
    cm_unit: bool
    ak_unit: bool
    bk_unit: bool
    bn_unit: bool
    cn_unit: bool
    aligned: bool


class _Launch:
    """Products of one layout."""

    def __init__(
        self, products: dict[int, Product], layout: _Layout, tile: tuple[int, int, int], device: torch.device
    ) -> None:
        counts = {i: (-(-p.m // tile[0]), -(-p.n // tile[1])) for i, p in products.items()}
        numbers = np.repeat([*counts], [down * across for down, across in counts.values()])
        places = [np.divmod(np.arange(down * across), across) for down, across in counts.values()]
        tiles = np.stack([numbers, *np.concatenate(places, axis=1)], axis=1)
        self.tiles = torch.from_numpy(tiles.astype(np.int32)).to(device)
        self.grid = (len(self.tiles), 1, 1)
        self.layout = layout
        self._constants = (*tile, *layout[:-1])
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self, kind: tuple[Any, ...], tensors: dict[str, Tensor], even: bool, has_base: bool, operand: tl.dtype
    ) -> None:
        """Launch the kernel.

        Args:
            kind: what it is compiled for besides the layout.
            tensors: its first arguments by name, in their order.
            even: whether all starts are aligned.
            has_base: whether a base is added.
            operand: dtype in which factors are multiplied.
        """
        compiled = self.compiled.get(kind)
        aligned = self.layout.aligned and even
        if compiled is not None:  # past the look-up of the compiled kernel, which takes longer than the launch
            compiled[self.grid](*tensors.values(), self.tiles, *self._constants, aligned, has_base, operand)
            return
        tile_m, tile_n, tile_k = self._constants[:3]
        constants = self.layout._asdict() | {"aligned": aligned, "has_base": has_base, "operand": operand}
        self.compiled[kind] = _products[self.grid](
            **tensors, tiles=self.tiles, tile_m=tile_m, tile_n=tile_n, tile_k=tile_k, **constants
        )


class Products:
    """Products that are computed together, in as few launches as their layouts allow.

    Args:
        products: what is computed.
        tile: rows, columns and depth of a block of them; powers of two, 16 or more.
        device: of the buffers.
    """

    def __init__(self, products: Sequence[Product], tile: tuple[int, int, int], device: torch.device) -> None:
        groups: dict[_Layout, dict[int, Product]] = {}
        for i, product in enumerate(products):
            groups.setdefault(_layout(product), {})[i] = product
        self.launches = [_Launch(members, layout, tile, device) for layout, members in groups.items()]
        self._table = _on(device, [number for product in products for number in product.numbers()])
        in_flat = [product.a for product in products], [product.b for product in products]
        self._in_flat = [(_on(device, starts), not any(start % 8 for start in starts)) for starts in in_flat]
        # Last and waited for, so that all tables are there for any stream.
        self._scales = torch.tensor([product.scale for product in products], dtype=torch.float32).to(device)

    def __call__(self, a: Tensor | Operand, b: Tensor | Operand, c: Tensor, base: Operand | None = None) -> None:
        """Compute ``c``.

        Args:
            a, b: operands; a flat buffer holds each product's where the product says. Products are taken in the lower
                precision of the two and summed up in fp32.
            c: flat buffer.
            base: laid out in memory as the products' parts of ``c``: added to them.
        """
        a, b = (
            given if isinstance(given, Operand) else Operand([given], *starts)
            for given, starts in zip((a, b), self._in_flat, strict=True)
        )
        first = a.tensors[0], b.tensors[0], c, c if base is None else base.tensors[0]
        lower = _OPERANDS[min(first[0].dtype, first[1].dtype, key=lambda dtype: dtype.itemsize)]
        even = a.even and b.even and (base is None or base.even)
        kind = (even, base is None, *((tensor.dtype, tensor.data_ptr() % 16) for tensor in first))
        tensors = {
            "a": first[0], "b": first[1], "c": c, "base": first[3],
            "a_starts": a.starts, "b_starts": b.starts, "bases": (base or a).starts,
            "table": self._table, "scales": self._scales,
        }  # fmt: skip
        for launch in self.launches:
            launch(kind, tensors, even, base is not None, lower)


def _layout(product: Product) -> _Layout:
    rows, columns = (product.a_m, product.c_m), (product.a_k, product.b_k)
    m_splits, k_splits = (any(walk.split > 1 for walk in walks) for walks in (rows, columns))
    steps = *(walk.outer for walk in (*rows, *columns)), product.b_n, product.c_n
    even = not any(number % 8 for number in product.numbers()[:4]) and all(s == 1 or s % 8 == 0 for s in steps)
    aligned = even and not m_splits and not k_splits
    return _Layout._make([m_splits, k_splits, *(step == 1 for step in steps), aligned])
