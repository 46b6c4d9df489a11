"""Augmentation of a whole batch on its device, for pretraining: warping, recolouring, erasing, mixup and cutmix."""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 64
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)


def uniform(n: int, low: float, high: float, device: torch.device) -> Tensor:
    """Draw n numbers from [low, high)."""
    return torch.rand(n, device=device) * (high - low) + low


def box_mask(area: Tensor) -> Tensor:
    """Boxes of the given share of the image at random places, clipped at its edges: bool ``[n, 1, 64, 64]``."""
    n, device = len(area), area.device
    ratio = torch.exp(uniform(n, -0.5, 0.5, device))
    grid = (torch.arange(SIZE, device=device) + 0.5) / SIZE
    inside_y = (grid - torch.rand(n, 1, device=device)).abs() < ((area * ratio).sqrt() / 2)[:, None]
    inside_x = (grid - torch.rand(n, 1, device=device)).abs() < ((area / ratio).sqrt() / 2)[:, None]
    return (inside_y[:, :, None] & inside_x[:, None, :])[:, None]


def warp(x: Tensor, smallest: float, degrees: float) -> Tensor:
    """Random resized crop, rotation and flip, one draw per image."""
    n, device = len(x), x.device
    area = uniform(n, smallest, 1.0, device)
    ratio = torch.exp(uniform(n, -0.25, 0.25, device))
    width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
    center_x, center_y = uniform(n, -1, 1, device) * (1 - width), uniform(n, -1, 1, device) * (1 - height)
    flip = torch.where(torch.rand(n, device=device) < 0.5, -1.0, 1.0)
    angle = torch.randn(n, device=device) * math.radians(degrees)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [width * cos * flip, -height * sin, center_x, width * sin * flip, height * cos, center_y], dim=1
    ).view(n, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)


def recolor(x: Tensor, strength: float) -> Tensor:
    """Jitter brightness, contrast and saturation and normalise: all linear in the colours, so one 3x3 map an image."""
    n, device = len(x), x.device
    brightness, contrast, saturation = (uniform(n, 1 - strength, 1 + strength, device)[:, None, None] for _ in range(3))
    luma, std = torch.tensor(LUMA, device=device), torch.tensor(STD, device=device)
    gray = luma.expand(3, 3)
    mixer = brightness * contrast * (saturation * torch.eye(3, device=device) + (1 - saturation) * gray)
    mean_gray = (x.mean((2, 3)) @ luma)[:, None, None]
    shift = brightness * (1 - contrast) * mean_gray - torch.tensor(MEAN, device=device)[:, None]
    return torch.baddbmm(shift / std[:, None], mixer / std[:, None], x.flatten(2)).view_as(x)


def augment(images: Tensor, args: argparse.Namespace, tail: bool) -> tuple[Tensor, Tensor]:
    """Augment a uint8 batch; returns it normalised and mixed with its neighbour, and each image's own share ``[n]``."""
    n, device = len(images), images.device
    x = warp(images.float() / 255, max(args.crop_scale, 0.6) if tail else args.crop_scale, args.rotate)
    x = recolor(x, args.color)
    if tail:
        return x, torch.ones(n, device=device)
    erased = box_mask(uniform(n, 0.02, 0.25, device)) & (torch.rand(n, 1, 1, 1, device=device) < args.erase)
    x = x.masked_fill(erased, 0.0)
    alpha = torch.tensor(args.mixup, device=device)
    blend = torch.distributions.Beta(alpha, alpha).sample((n,))[:, None, None, None]
    kept = (~box_mask(torch.rand(n, device=device))).float()
    choice = torch.rand(n, 1, 1, 1, device=device)
    whole = torch.ones((), device=device)
    share = torch.where(choice < args.mixup_prob + args.cutmix_prob, kept, whole)
    share = torch.where(choice < args.mixup_prob, blend, share)
    return share * x + (1 - share) * x.roll(1, 0), share.mean((1, 2, 3))
