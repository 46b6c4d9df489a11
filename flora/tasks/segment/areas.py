"""What an evaluation keeps of logits for each pixel: three counts a class, from which every score follows."""

import torch
from torch import Tensor


def areas(logits: Tensor, labels: Tensor) -> Tensor:
    """Pixels of each class in each image: those called rightly, those called so, and those that are so.

    A pixel whose greatest logit is not finite counts as wrong, and as called nothing.

    Args:
        logits: ``[B, C, H, W]``.
        labels: classes ``[B, H, W]``, negative where a pixel does not count.

    Returns:
        int64 ``[B, 3, C]``.
    """
    count, classes = logits.shape[:2]
    best, called = logits.max(dim=1)
    called = torch.where(best.isfinite(), called, classes)
    image = torch.arange(count, device=labels.device)[:, None, None].expand_as(labels)
    kept = labels >= 0
    image, called, true = image[kept], called[kept], labels[kept].long()
    right = called == true

    def counts(of: Tensor, images: Tensor) -> Tensor:
        # One more class, for what is called nothing.
        return torch.bincount(images * (classes + 1) + of, minlength=count * (classes + 1)).view(count, -1)[:, :classes]

    return torch.stack([counts(true[right], image[right]), counts(called, image), counts(true, image)], dim=1)
