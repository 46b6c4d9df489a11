"""DeBERTa's relative positions, kept: transformers computes them in every forward pass and waits for the GPU to."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_ENCODER = "DebertaV2Encoder"


@contextlib.contextmanager
def positions_kept(model: nn.Module) -> Iterator[None]:
    """Inside, each DeBERTa in a network takes the positions of a length from those that were computed before.

    They depend on how far two tokens are apart alone, so that those of a longer text hold those of a shorter one.
    """
    encoders: list[Any] = [module for module in model.modules() if type(module).__name__ == _ENCODER]
    handles = [encoder.register_forward_pre_hook(_Kept(), with_kwargs=True) for encoder in encoders]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Kept:
    """A hook; what it has given stays where it is, as a CUDA graph may read it."""

    def __init__(self) -> None:
        self.positions: dict[Any, Tensor] = {}

    def __call__(self, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if len(args) != 2 or {"relative_pos", "query_states"} & kwargs.keys() or not encoder.relative_attention:
            return None
        hidden, length = args[0], args[0].size(-2)
        size = 1 << (length - 1).bit_length()
        if (hidden.device, size) not in self.positions:
            self.positions[hidden.device, size] = encoder.get_rel_pos(hidden.new_empty(1, size, 1))
        return args, kwargs | {"relative_pos": self.positions[hidden.device, size][:, :length, :length]}
