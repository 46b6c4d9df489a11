"""What a method trains, counted on torch's meta device: without weights, data or network."""

import torch
from omegaconf import DictConfig

from flora.config import instantiate, instantiate_method
from flora.errors import ConfigError
from flora.methods.heads import trained


def count(cfg: DictConfig) -> dict[str, int]:
    """Parameters trained outside the head, trained in the head, and of the base model with its head.

    Args:
        cfg: what train.py composes; ``model`` and ``adapter`` are read.

    Raises:
        ConfigError: a setting that does not fit the model.
    """
    model, method = instantiate(cfg.model), instantiate_method(cfg.adapter)
    base = model.skeleton()
    total = sum(p.numel() for p in base.parameters())
    try:
        with torch.device("meta"):
            adapted = method.apply(base, model.classifier)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"adapter: {error}") from error
    outside, inside = trained(adapted.model, model.classifier)
    return {"trainable_params": outside, "head_params": inside, "total_params": total}
