"""An evaluation by windows that slide over an image, as published UPerNets are tested (MMSegmentation's ``slide``)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora.errors import ConfigError


def check_windows(window: int | None, stride: int | None, least: int) -> None:
    """Refuse windows that cannot be slid.

    Raises:
        ConfigError: a side below ``least``, or a stride that leaves pixels out.
    """
    if window is None:
        if stride is not None:
            raise ConfigError(f"task.stride={stride} is that of windows: set task.window as well")
        return
    if type(window) is not int or window < least:
        raise ConfigError(f"task.window={window} must be a whole number of at least {least} pixels, or null")
    if stride is not None and (type(stride) is not int or not 0 < stride <= window):
        raise ConfigError(f"task.stride={stride} must be a whole number between 1 and task.window={window}")


def starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side of an image; the last ends where the image does."""
    count = -(-max(side - window, 0) // stride) + 1
    return [min(i * stride, max(side - window, 0)) for i in range(count)]


def slid(module: nn.Module, images: Tensor, window: int, stride: int) -> Tensor:
    """The mean of the logits of all windows that see a pixel.

    Args:
        module: the network, in evaluation.
        images: floats ``[B, 3, H, W]``; where a side is shorter than the window, the window is as short.
        window: side in pixels.
        stride: pixels from one window to the next; one that leaves no pixel out.

    Returns:
        Logits ``[B, C, H, W]``, those of each window interpolated to its pixels.
    """
    height, width = images.shape[-2:]
    total: Tensor | None = None
    seen = torch.zeros(height, width, device=images.device)
    for top in starts(height, window, stride):
        for left in starts(width, window, stride):
            place = (..., slice(top, top + window), slice(left, left + window))
            part = images[place]
            logits = module(part).float()
            logits = F.interpolate(logits, size=part.shape[-2:], mode="bilinear", align_corners=False)
            if total is None:
                total = logits.new_zeros(len(images), logits.shape[1], height, width)
            total[place] += logits
            seen[place] += 1
    assert total is not None
    return total / seen
