"""Random layers of every adapted type, with inputs and configurations, drawn by hypothesis."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import flora

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass
class Case:
    """A base layer (float64), arguments to call it with, and the configuration of its adapter."""

    layer: nn.Module
    args: tuple[Any, ...]
    config: flora.FloraConfig
    target_parameters: bool = False


class Holder(nn.Module):
    """A model of one layer, so that PEFT has a parent to work on."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> torch.Tensor:
        output = self.layer(*args)
        return output[0] if isinstance(output, tuple) else output


class Mixture(nn.Module):
    """A module with a bare parameter of N modes that it contracts with its input."""

    def __init__(self, shape: list[int]):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tensordot(x, self.experts, dims=([-1], [self.experts.dim() - 1]))


def _size(draw: Callable, most: int = 9) -> int:
    return draw(st.integers(1, most))


def _ranks(draw: Callable) -> dict[str, Any]:
    return {"r": _size(draw), "kernel_rank": draw(st.integers(1, 4)), "scale": draw(st.sampled_from([1.0, 0.3, 4.0]))}


def linear(draw: Callable) -> Case:
    layer = nn.Linear(_size(draw), _size(draw), bias=draw(st.booleans()))
    batch = draw(st.lists(st.integers(1, 3), max_size=2))
    form = draw(st.sampled_from(["auto", "factored", "merged"]))
    return Case(layer, (torch.randn(*batch, layer.in_features),), flora.FloraConfig(**_ranks(draw), forward=form))


def folded_linear(draw: Callable) -> Case:
    d = _size(draw)
    layer = nn.Linear(d, 3 * d)
    form = draw(st.sampled_from(["auto", "factored", "merged"]))
    config = flora.FloraConfig(
        **_ranks(draw), forward=form, fold_pattern={"layer": [3, -1, d]}, stack_rank=draw(st.sampled_from([None, 1, 2]))
    )
    return Case(layer, (torch.randn(2, d),), config)


def conv1d_of_transformers(draw: Callable) -> Case:
    layer = Conv1D(_size(draw), _size(draw))
    nn.init.normal_(layer.weight)
    form = draw(st.sampled_from(["auto", "factored", "merged"]))
    return Case(layer, (torch.randn(3, layer.weight.shape[0]),), flora.FloraConfig(**_ranks(draw), forward=form))


def embedding(draw: Callable) -> Case:
    vocabulary, max_norm = _size(draw), draw(st.sampled_from([None, 1.0]))
    layer = nn.Embedding(vocabulary, _size(draw), padding_idx=draw(st.sampled_from([None, 0])), max_norm=max_norm)
    form = draw(st.sampled_from(["auto", "factored", "merged"]))
    return Case(layer, (torch.randint(vocabulary, (3, 4)),), flora.FloraConfig(**_ranks(draw), forward=form))


def _conv(draw: Callable, dims: int) -> Case:
    groups = draw(st.integers(1, 3))
    depthwise = draw(st.booleans())
    per_group = 1 if depthwise else draw(st.integers(1, 3))
    channels = groups * per_group
    out = groups * draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    same = draw(st.booleans())
    stride = 1 if same else draw(st.integers(1, 2))
    mode = draw(st.sampled_from(PADDING_MODES if dims < 3 else ("zeros", "replicate", "circular")))
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](
        channels,
        out,
        kernel,
        stride=stride,
        padding="same" if same else draw(st.integers(0, 2)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    form = draw(st.sampled_from(["auto", "factored", "merged"]))
    size = {1: (9,), 2: (7, 6), 3: (6, 5, 6)}[dims]
    return Case(layer, (torch.randn(2, channels, *size),), flora.FloraConfig(**_ranks(draw), forward=form))


def _conv_transpose(draw: Callable, dims: int) -> Case:
    groups = draw(st.integers(1, 3))
    stride = draw(st.integers(1, 3))
    channels, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    layer = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims](
        channels,
        out,
        [draw(st.integers(1, 3)) for _ in range(dims)],
        stride=stride,
        padding=draw(st.integers(0, 1)),
        output_padding=draw(st.integers(0, stride - 1)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
    )
    form = draw(st.sampled_from(["auto", "factored", "merged"]))
    size = {1: (5,), 2: (5, 4), 3: (4, 3, 4)}[dims]
    if min(layer(torch.randn(1, channels, *size)).shape) < 1:
        layer.padding = (0,) * dims
    return Case(layer, (torch.randn(2, channels, *size),), flora.FloraConfig(**_ranks(draw), forward=form))


def attention(draw: Callable) -> Case:
    heads, head_size, batch_first = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.booleans())
    d = heads * head_size
    kdim = draw(st.sampled_from([None, 3]))
    layer = nn.MultiheadAttention(d, heads, bias=draw(st.booleans()), kdim=kdim, vdim=kdim, batch_first=batch_first)
    query, key = torch.randn(3, 3, d), torch.randn(3, 3, kdim or d)
    return Case(layer, (query, key, key), flora.FloraConfig(**_ranks(draw)))


def recurrent(draw: Callable) -> Case:
    kind = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
    features, hidden = _size(draw, 5), draw(st.integers(2, 5))
    extra = {"proj_size": draw(st.integers(1, hidden - 1))} if kind is nn.LSTM and draw(st.booleans()) else {}
    layer = kind(
        features, hidden, num_layers=draw(st.integers(1, 2)), bidirectional=draw(st.booleans()), bias=True, **extra
    )
    return Case(layer, (torch.randn(4, 2, features),), flora.FloraConfig(**_ranks(draw)))


def recurrent_cell(draw: Callable) -> Case:
    layer = draw(st.sampled_from([nn.LSTMCell, nn.GRUCell, nn.RNNCell]))(_size(draw, 5), draw(st.integers(2, 5)))
    return Case(layer, (torch.randn(3, layer.input_size),), flora.FloraConfig(**_ranks(draw)))


def bare_parameter(draw: Callable) -> Case:
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=6))
    stack = draw(st.sampled_from([None, [], [0, 1]]))
    config = flora.FloraConfig(**_ranks(draw), stack_modes=stack, stack_rank=draw(st.sampled_from([None, 2])))
    return Case(Mixture(shape), (torch.randn(2, shape[-1]),), config, target_parameters=True)


LAYERS: dict[str, Callable[[Callable], Case]] = {
    "Linear": linear,
    "Linear folded": folded_linear,
    "Conv1D (transformers)": conv1d_of_transformers,
    "Embedding": embedding,
    "Conv1d": lambda draw: _conv(draw, 1),
    "Conv2d": lambda draw: _conv(draw, 2),
    "Conv3d": lambda draw: _conv(draw, 3),
    "ConvTranspose1d": lambda draw: _conv_transpose(draw, 1),
    "ConvTranspose2d": lambda draw: _conv_transpose(draw, 2),
    "ConvTranspose3d": lambda draw: _conv_transpose(draw, 3),
    "MultiheadAttention": attention,
    "LSTM, GRU, RNN": recurrent,
    "LSTMCell, GRUCell, RNNCell": recurrent_cell,
    "bare parameter": bare_parameter,
}
