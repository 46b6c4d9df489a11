"""The modes and ranks that a configuration gives the weights of a layer."""

import math
from collections.abc import Sequence
from dataclasses import replace

from flora.adapters.config import FloraConfig
from flora.adapters.tucker import clip_ranks
from flora.replaced.weights import AdaptedWeight, ModeKind, configured, matching_pattern


def fold(weight: AdaptedWeight, config: FloraConfig, layer_name: str) -> AdaptedWeight:
    """Apply ``fold_pattern`` and ``stack_modes`` of the configuration, where they match the layer's name."""
    shape = configured(config.fold_pattern, layer_name, weight)
    if shape is None:
        return weight
    size = math.prod(weight.weight_shape)
    given = math.prod(s for s in shape if s != -1)
    sizes = tuple(size // given if s == -1 else s for s in shape)
    if math.prod(sizes) != size:
        raise ValueError(
            f"fold_pattern: cannot fold the weight of {layer_name}, shape {list(weight.weight_shape)}, to {list(shape)}"
        )
    return replace(weight, shape=sizes, kinds=stacked_kinds(len(sizes), config, layer_name, default=(0,)))


def stacked_kinds(modes: int, config: FloraConfig, layer_name: str, default: Sequence[int]) -> tuple[ModeKind, ...]:
    """Kinds of the modes of a folded or bare weight: channel modes, but for those that count parts."""
    stack = config.stack_modes
    if isinstance(stack, dict):
        stack = matching_pattern(stack, layer_name)
    chosen = list(default if stack is None else stack)
    if any(not -modes <= mode < modes for mode in chosen):
        raise ValueError(f"stack_modes: {chosen} names a mode that {layer_name} does not have; it has {modes} modes")
    counted = {mode % modes for mode in chosen}
    return tuple("stack" if mode in counted else "channel" for mode in range(modes))


def ranks_of(weight: AdaptedWeight, config: FloraConfig, layer_name: str) -> tuple[int, ...]:
    """Effective rank per mode that the configuration gives a weight of the named layer."""
    explicit = configured(config.rank_pattern, layer_name, weight)
    r = config.r if explicit is None else explicit
    channels = [mode for mode, kind in enumerate(weight.kinds) if kind == "channel"]
    kernels = [mode for mode, kind in enumerate(weight.kinds) if kind == "kernel"]
    modes = len(weight.shape)

    ranks = [0] * modes
    for mode, kind in enumerate(weight.kinds):
        if kind == "stack":
            ranks[mode] = weight.shape[mode] if config.stack_rank is None else config.stack_rank
    _spread(ranks, kernels, config.kernel_rank, f"kernel_rank for {layer_name}")
    field = "r" if explicit is None else "rank_pattern"
    if isinstance(r, list | tuple) and len(r) == modes:
        ranks = list(r)
    else:
        _spread(ranks, channels, r, f"{field} for {layer_name} (modes {list(weight.shape)})")

    if explicit is not None and config.clip_ranks != "none":
        asked = range(modes) if isinstance(r, list | tuple) and len(r) == modes else channels
        for mode in asked:
            # One integer for several modes is meant for those that have a rank; modes of size 1 have none.
            size_one = weight.shape[mode] == 1 and not isinstance(r, list | tuple)
            if ranks[mode] > weight.shape[mode] and not size_one:
                raise ValueError(
                    f"rank_pattern: rank {ranks[mode]} for mode {mode} of {layer_name} is above its size "
                    f"{weight.shape[mode]} (modes {list(weight.shape)}); lower it or give one rank per mode"
                )
    return clip_ranks(weight.shape, ranks, config.clip_ranks)


def _spread(ranks: list[int], modes: Sequence[int], value: int | Sequence[int], field: str) -> None:
    if isinstance(value, int):
        value = [value] * len(modes)
    if len(value) != len(modes) and modes:
        raise ValueError(f"{field}: {len(value)} ranks given for {len(modes)} modes; give one integer or one per mode")
    for mode, rank in zip(modes, value, strict=False):
        ranks[mode] = rank
