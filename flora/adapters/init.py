"""How cores and factors start: three published conventions and two of ours. The core is zero, so the update is too."""

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


@torch.no_grad()
def init_tucker(
    core: Tensor, factors: Sequence[Tensor | None], how: str, output_mode: int | None, weight: Tensor | None
) -> None:
    """Fill a core (with zeros) and its factors in place.

    Args:
        core: r_1 x ... x r_N.
        factors: d_n x r_n each, ``None`` for modes without one.
        how: a preset of ``FloraConfig.init``.
        output_mode: the mode that counts outputs; ``llm`` takes its rank as fan-in, as a linear layer B (d_out x r)
            does, and the mode size d_n for all other modes, as a linear layer A (r x d_in) does.
        weight: the pretrained weight with the modes of the update, for ``hosvd``; ``None`` otherwise.
    """
    core.zero_()
    for mode, factor in enumerate(factors):
        if factor is None or factor.is_meta:
            continue
        if how == "hosvd" and weight is not None and factor.shape[1] <= factor.shape[0]:
            factor.copy_(leading_subspace(weight, mode, factor.shape[1]))
        else:
            init_factor(factor, how, fan_in=factor.shape[1] if mode == output_mode else factor.shape[0])
