"""Mixup, CutMix and random erasing of whole batches, on any device and without a word from Python's random numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def mix(images: Tensor, labels: Tensor, num_classes: int, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Each image with the one that mirrors it in the batch, blended (mixup) or patched (CutMix, half of the batches).

    Zhang et al. 2018 (arXiv 1710.09412), Yun et al. 2019 (arXiv 1905.04899).

    Args:
        images: float ``[B, C, H, W]``.
        labels: int64 ``[B]``.
        num_classes: how many there are.
        mixup, cutmix: parameters of the beta distributions that shares are drawn from; 0: not done.

    Returns:
        Images, and the share of each class in them, ``[B, num_classes]``.
    """
    soft = F.one_hot(labels, num_classes).float()
    if not mixup and not cutmix:
        return images, soft
    patched = torch.rand((), device=images.device) < (0.5 if mixup and cutmix else float(cutmix > 0))
    blend = _beta(mixup or cutmix, images.device)
    own = boxes(1 - _beta(cutmix or mixup, images.device)[None], torch.ones(1, device=images.device), images)
    own = torch.where(patched, (~own).float(), blend)
    share = torch.where(patched, own.mean(), blend)
    return own * images + (1 - own) * images.flip(0), share * soft + (1 - share) * soft.flip(0)


def erase(images: Tensor, probability: float) -> Tensor:
    """Noise in a rectangle of 2 to 33 % of an image, with a probability; Zhong et al. 2020 (arXiv 1708.04896).

    Args:
        images: normalised, ``[B, C, H, W]``.
        probability: of an image to lose a rectangle.
    """
    count, device = len(images), images.device
    area = torch.empty(count, device=device).uniform_(0.02, 1 / 3)
    ratio = torch.empty(count, device=device).uniform_(-1.2, 1.2).exp()
    hidden = boxes(area, ratio, images) & (torch.rand(count, 1, 1, 1, device=device) < probability)
    return torch.where(hidden, torch.randn_like(images), images)


def boxes(area: Tensor, ratio: Tensor, images: Tensor) -> Tensor:
    """Masks ``[N, 1, H, W]``, true in a rectangle at a random place that covers the share ``area`` ``[N]``.

    ``ratio`` is its height over its width, in shares of the sides; a rectangle is cut off at the border.
    """
    height, width = images.shape[-2:]
    count, device = len(area), images.device
    half = [(area * ratio).sqrt() / 2, (area / ratio).sqrt() / 2]
    centre = torch.rand(2, count, device=device)
    rows = (torch.arange(height, device=device) + 0.5) / height
    columns = (torch.arange(width, device=device) + 0.5) / width
    inside_rows = (rows - centre[0][:, None]).abs() < half[0][:, None]
    inside_columns = (columns - centre[1][:, None]).abs() < half[1][:, None]
    return (inside_rows[:, :, None] & inside_columns[:, None])[:, None]


def _beta(alpha: float, device: torch.device) -> Tensor:
    """A share drawn from Beta(alpha, alpha): a quotient of gamma variates."""
    gamma = torch._standard_gamma(torch.full((2,), float(alpha), device=device))
    return gamma[0] / gamma.sum()
