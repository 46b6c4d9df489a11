"""Watches, in Triton's interpreter, what each lane of the GPU kernel reads and writes."""

from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

from flora.adapters.fast import triton_kernel as kernels
from flora.adapters.fast import triton_plan


class Watch:
    """Fails where a lane leaves its product's part of a tensor, or a number is less divisible than promised.

    Attributes:
        calls: the products of each call.
    """

    def __init__(self, monkeypatch) -> None:
        self.calls: list[list[kernels.Product]] = []
        self.parts: dict[str, list[list[range]]] = {}  # addresses that each product may read and write
        self.tables: list[range] = []
        self.tiles: Tensor
        self.written = 0
        launch, read, write = (
            kernels._Launch.__call__,
            InterpreterBuilder.create_masked_load,
            InterpreterBuilder.create_masked_store,
        )

        class Watched(kernels.Products):
            def __init__(together, products, *settings) -> None:
                super().__init__(products, *settings)
                together.products = products

            def __call__(together, *operands) -> None:
                self.begin(together.products, *operands)
                super().__call__(*operands)
                assert self.written == sum(product.m * product.n for product in together.products)

        def launched(call, kind, tensors, *settings):
            self.tiles = call.tiles
            tables = [table for name, table in tensors.items() if name not in ("a", "b", "c", "base")]
            self.tables = [addresses(table) for table in (*tables, call.tiles)]
            launch(call, kind, tensors, *settings)

        def reads(builder, pointers, mask, *rest):
            self.check("read", pointers, mask)
            return read(builder, pointers, mask, *rest)

        def writes(builder, pointers, value, mask, *rest):
            self.written += self.check("write", pointers, mask)
            return write(builder, pointers, value, mask, *rest)

        monkeypatch.setattr(kernels, "Products", Watched)
        monkeypatch.setattr(triton_plan, "Products", Watched)
        monkeypatch.setattr(kernels._Launch, "__call__", launched)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", reads)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", writes)
        monkeypatch.setattr(TensorHandle, "set_attr", promised)

    def begin(self, products, a, b, c, base=None) -> None:
        """Note what each product may read and write."""
        self.calls.append(products)
        self.parts, self.written = {"read": [], "write": []}, 0
        for i, product in enumerate(products):
            read = [part(a, i, product.a, product.m * product.k), part(b, i, product.b, product.k * product.n)]
            self.parts["read"].append(read if base is None else [*read, part(base, i, 0, product.m * product.n)])
            self.parts["write"].append([part(c, i, product.c, product.m * product.n)])

    def check(self, what: str, pointers: TensorHandle, mask: TensorHandle) -> int:
        """How many lanes there are, all in one part of their product, or of a table where there is one lane."""
        lanes = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        first, last = int(lanes.min()), int(lanes.max()) + pointers.dtype.element_ty.primitive_bitwidth // 8 - 1
        number = int(self.tiles[interpreter_builder.grid_idx[0], 0])
        parts = self.parts[what][number] if pointers.data.ndim == 2 else self.tables
        assert any(first in part and last in part for part in parts), f"a {what} leaves its part"
        return lanes.size


def part(given: Tensor | kernels.Operand, number: int, start: int, size: int) -> range:
    """What a product takes of an operand: its own tensor, or ``size`` elements of a flat buffer."""
    if isinstance(given, kernels.Operand):
        given, start = given.tensors[number], 0
    taken = addresses(given)[start * given.itemsize :][: size * given.itemsize]
    assert len(taken) == size * given.itemsize
    return taken


def addresses(tensor: Tensor) -> range:
    """The addresses of a dense tensor's bytes."""
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


def promised(handle: TensorHandle, name: str, values: list[int]) -> None:
    """In place of a promise to the compiler: a check of it. Strides of 1 are the kernel's to leave out."""
    value: Any = np.asarray(handle.data).item()
    assert value == 1 or value % values[0] == 0, f"{name}: {value} is no multiple of {values[0]}"
