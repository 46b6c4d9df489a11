"""How cores and factors start: three published conventions and three of ours. The update is zero in all of them.

``zero_output``, the default, has a zero output factor, as LoRA has a zero B: it alone gets a gradient in the first
step, and the update moves the outputs at once. The published ones, ``orthogonal`` and ``hosvd`` have a zero core
instead, whose gradient is seen through factors on every side.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flora.adapters.tucker import leading_subspace


@torch.no_grad()
def init_factor(factor: Tensor, how: str, fan_in: int) -> None:
    """Fill a d x r factor in place by one of the drawn conventions.

    ``paper``: Kaiming normal with a = sqrt(3) whose fan-in is the rank, std sqrt(0.5 / r) (SJTU-DeepVisionLab/FLoRA).
    ``nlu``: normal, std 0.02 (Subspace-Tuning, loralib). ``llm``: Kaiming uniform with a = sqrt(5), bound
    1 / sqrt(fan_in) (Subspace-Tuning, commonsense). ``orthogonal``: orthonormal columns (rows where r > d).
    """
    if how == "paper":
        factor.normal_(std=math.sqrt(0.5 / factor.shape[1]))
    elif how == "nlu":
        factor.normal_(std=0.02)
    elif how == "llm":
        bound = 1 / math.sqrt(fan_in)
        factor.uniform_(-bound, bound)
    else:
        nn.init.orthogonal_(factor)


def orthonormal_rows(core: Tensor, mode: int) -> Tensor:
    """A random core of this shape whose unfolding along ``mode`` has orthonormal rows (columns where it is tall)."""
    shape = core.movedim(mode, 0).shape
    rows = nn.init.orthogonal_(core.new_empty(shape[0], core.numel() // shape[0], dtype=torch.float32))
    return rows.to(core.dtype).reshape(shape).movedim(0, mode)


@torch.no_grad()
def init_tucker(
    core: Tensor, factors: Sequence[Tensor | None], how: str, output_mode: int | None, weight: Tensor | None
) -> None:
    """Fill a core and its factors in place, so that the update is zero.

    Args:
        core: r_1 x ... x r_N.
        factors: d_n x r_n each, ``None`` for modes without one.
        how: a preset of ``FloraConfig.init``.
        output_mode: the mode that counts outputs, ``None`` where there is none. ``llm`` takes its rank as fan-in, as a
            linear layer B (d_out x r) does, and the mode size d_n for all other modes, as a linear layer A (r x d_in)
            does. ``zero_output`` sets its factor to zero and gives the core orthonormal rows along it; where there is
            no such factor, the core is zero and all factors are orthonormal.
        weight: the pretrained weight with the modes of the update, for ``hosvd``; ``None`` otherwise.
    """
    core.zero_()
    zero = output_mode if how == "zero_output" and output_mode is not None else None
    zero = None if zero is None or factors[zero] is None else zero
    if zero is not None and not core.is_meta:
        core.copy_(orthonormal_rows(core, zero))
    for mode, factor in enumerate(factors):
        if factor is None or factor.is_meta:
            continue
        if mode == zero:
            factor.zero_()
        elif how == "hosvd" and weight is not None and factor.shape[1] <= factor.shape[0]:
            factor.copy_(leading_subspace(weight, mode, factor.shape[1]))
        else:
            init_factor(factor, how, fan_in=factor.shape[1] if mode == output_mode else factor.shape[0])
