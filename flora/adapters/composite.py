"""Adapted layers with several weights: multi-head attention and recurrent layers."""

from torch import Tensor
from torch.nn.utils import parametrize
from typing_extensions import override

from flora.adapters.config import FloraConfig
from flora.adapters.layer import FloraLayer
from flora.replaced.weights import AdaptedWeight, ModeKind, plain


def _stacked(name: str, weight: Tensor, parts: int) -> AdaptedWeight:
    """A matrix of ``parts`` equal blocks of rows, seen as [parts, rows, columns]."""
    rows, columns = weight.shape
    kinds: tuple[ModeKind, ...] = ("stack", "channel", "channel")
    if parts == 1:
        return plain(name, (rows, columns), kinds[1:])
    return AdaptedWeight(name, (rows, columns), (parts, rows // parts, columns), kinds)


class MultiheadAttention(FloraLayer):
    """nn.MultiheadAttention: the fused projection of query, key and value as [3, d, d], and the output projection.

    Where query, key and value have sizes of their own, torch keeps three matrices, and each is adapted for itself.
    """

    @override
    def describe_weights(self, config: FloraConfig, name: str) -> list[AdaptedWeight]:
        base = self.get_base_layer()
        matrix: tuple[ModeKind, ...] = ("channel", "channel")
        if base.in_proj_weight is not None:
            inputs = [_stacked("in_proj_weight", base.in_proj_weight, 3)]
        else:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            inputs = [plain(name, getattr(base, name).shape, matrix) for name in names]
        return [*inputs, plain("out_proj.weight", base.out_proj.weight.shape, matrix)]

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # nn.TransformerEncoderLayer asks this before it takes the weights for its fused kernel, past this layer.
        return False


class Recurrent(FloraLayer):
    """nn.LSTM, nn.GRU, nn.RNN and their cells: every weight as [gates, hidden, in]; projections as [out, in]."""

    @override
    def describe_weights(self, config: FloraConfig, name: str) -> list[AdaptedWeight]:
        base = self.get_base_layer()
        names = [key for key, _ in base.named_parameters(recurse=False)]
        if parametrize.is_parametrized(base):
            names += base.parametrizations
        weights = [(key, getattr(base, key)) for key in names if key.startswith("weight_")]
        # A projection (weight_hr) has no gates.
        return [
            _stacked(key, value, 1 if key.startswith("weight_hr") else value.shape[0] // base.hidden_size)
            for key, value in weights
        ]
