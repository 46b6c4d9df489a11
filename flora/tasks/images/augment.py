"""Random crop and flip of whole uint8 batches on any device, each sample with its own numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Augment(nn.Module):
    """Pad and crop back to the old size at a random place; flip left to right with probability 1/2.

    The usual augmentation of small images (He et al. 2016, arXiv 1512.03385, section 4.2), batched. Draws from torch's
    generator of the images' device; the identity after ``.eval()``.

    Args:
        crop: whether to crop; the padding is an eighth of the smaller side.
        flip: whether to flip.
        reflect: pad with the mirrored image instead of zeros.
    """

    def __init__(self, crop: bool = True, flip: bool = True, reflect: bool = True):
        super().__init__()
        self.crop = crop
        self.flip = flip
        self.reflect = reflect

    def forward(self, images: Tensor) -> Tensor:
        """Uint8 ``[B, C, H, W]`` in and out."""
        if not self.training:
            return images
        padding = min(images.shape[-2:]) // 8 if self.crop else 0
        count, device = len(images), images.device
        top, left = torch.randint(0, 2 * padding + 1, (2, count), device=device)
        flip = torch.rand(count, device=device) < (0.5 if self.flip else 0.0)
        return crop_flip(images, top, left, flip, padding, self.reflect)


def crop_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int, reflect: bool) -> Tensor:
    """Pad each image, cut ``[H, W]`` out of it at its own place, then flip the cut-out where asked.

    Args:
        images: ``[B, C, H, W]``.
        top: int64 ``[B]`` in ``[0, 2 * padding]``, first row of the cut-out in the padded image.
        left: int64 ``[B]``, its first column.
        flip: bool ``[B]``.
        padding: pixels on every side, below H and W.
        reflect: mirror the image at its border pixel; otherwise zeros.
    """
    count, channels, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device) + (top - padding)[:, None]
    columns = torch.arange(width, device=device).expand(count, width)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + (left - padding)[:, None]
    inside = None
    if not reflect:
        inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None]
    rows, columns = _mirror(rows, height), _mirror(columns, width)
    # One gather for rows and columns together: flat positions within an image, the same for its channels.
    flat = (rows[:, :, None] * width + columns[:, None]).reshape(count, 1, -1).expand(-1, channels, -1)
    cut = images.reshape(count, channels, -1).gather(2, flat).reshape(images.shape)
    return cut if inside is None else cut * inside


def _mirror(position: Tensor, size: int) -> Tensor:
    position = position.abs()
    return torch.where(position >= size, 2 * (size - 1) - position, position)
