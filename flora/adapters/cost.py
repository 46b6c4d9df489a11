"""What the factored and the merged form of a layer cost in a training step, estimated from shapes, dtype and device.

A roofline with a price per kernel launch: the larger of arithmetic and memory traffic. Only what the adapter adds to
the frozen layer counts. The rates are those of one kind of device each, rounded; their ratios decide, and these differ
little from one GPU, or one CPU, to the next. scripts/bench_step.py measures whether the choice was right.

It assumes that merged weights are built for many layers together (flora/adapters/fast), also where that folder is
absent: the two forms round differently, and no result may depend on how it was computed.

The batch is a nominal one, POSITIONS tokens or pixels. A choice that followed the actual batch would change the
rounding between training and evaluation, or before and after a resumed run, and no result could be reproduced exactly.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

POSITIONS = 4096


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        half, single: matrix arithmetic in 16 and in more bits, floating-point operations per second.
        bandwidth: memory traffic, bytes per second.
        launch: seconds per small kernel, with the Python and the dispatch around it, which a host may not hide.
    """

    half: float
    single: float
    bandwidth: float
    launch: float


DEVICES = {"cuda": Rates(4e14, 1e14, 2e12, 2e-5), "cpu": Rates(1e11, 1e11, 1e10, 2e-5)}


@dataclass(frozen=True)
class Work:
    """One layer: a linear layer, or an ungrouped convolution.

    Attributes:
        columns, rows: channels of a position going in and coming out.
        rank_in, rank_out: ranks of these two modes.
        kernel: positions under the kernel.
        inputs_per_output: positions going in per position coming out.
    """

    columns: int
    rows: int
    rank_in: int
    rank_out: int
    kernel: int = 1
    inputs_per_output: float = 1

    def activations(self) -> float:
        """Numbers going in and coming out, for one position coming out."""
        return self.inputs_per_output * self.columns + self.rows


def factored_seconds(work: Work, rates: Rates, itemsize: int) -> float:
    """Three thin products forward and six backward, which read or write every activation about four times more."""
    traffic = 4 * itemsize * POSITIONS * work.activations()
    thin = work.inputs_per_output * work.columns * work.rank_in + work.rows * work.rank_out
    products = 6 * POSITIONS * (thin + work.kernel * work.rank_in * work.rank_out)
    launches = 10 if work.kernel == 1 else 20
    return _seconds(traffic, products, rates, itemsize) + launches * rates.launch


def merged_seconds(work: Work, rates: Rates, itemsize: int) -> float:
    """The gradient of the weight, and building the weight together with those of other layers."""
    size = work.kernel * work.rows * work.columns
    gradient = _seconds(itemsize * POSITIONS * work.activations(), 2 * POSITIONS * size, rates, itemsize)
    # The update is written and read, the base read, the sum written; the gradient stacked and read twice.
    traffic = (12 + 5 * itemsize) * size
    return gradient + _seconds(traffic, 6 * size * work.rank_out, rates, itemsize) + 2 * rates.launch


def _seconds(traffic: float, products: float, rates: Rates, itemsize: int) -> float:
    arithmetic = products / (rates.half if itemsize == 2 else rates.single)
    return max(arithmetic, traffic / rates.bandwidth)


def factored_is_cheaper(work: Work, device: str, dtype: torch.dtype) -> bool:
    """Whether the factored form beats the merged one.

    Args:
        work: the layer.
        device: as in ``torch.device.type``; kinds without rates of their own count as GPUs.
        dtype: in which the layer computes.
    """
    # Asked in every forward pass; torch.compile cannot look into the cache.
    return (_cheaper if torch.compiler.is_compiling() else _remembered)(work, device, dtype)


def _cheaper(work: Work, device: str, dtype: torch.dtype) -> bool:
    rates = DEVICES.get(device, DEVICES["cuda"])
    return factored_seconds(work, rates, dtype.itemsize) < merged_seconds(work, rates, dtype.itemsize)


_remembered = lru_cache(maxsize=4096)(_cheaper)
