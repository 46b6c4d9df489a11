"""Count what a method trains, without weights or data: `python scripts/count_params.py model=llama_7b adapter=lora`.

Takes the overrides of train.py. The network exists on torch's meta device only, so any size fits.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach flora.config.main, which prints one line

import hydra
import torch
from omegaconf import DictConfig

from flora.adapters.heads import trained
from flora.config import instantiate, main, quietly
from flora.errors import ConfigError


def count(cfg: DictConfig) -> dict[str, int]:
    """Parameters trained outside the head, trained in the head, and of the base model with its head."""
    model, method = instantiate(cfg.model), instantiate(cfg.adapter)
    base = model.skeleton()
    total = sum(p.numel() for p in base.parameters())
    try:
        with torch.device("meta"):
            adapted = method.apply(base, model.classifier)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"adapter: {error}") from error
    outside, inside = trained(adapted.model, model.classifier)
    return {"trainable_params": outside, "head_params": inside, "total_params": total}


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parents[1] / "configs"), config_name="train")
def job(cfg: DictConfig) -> None:
    """Print the counts as one JSON line."""
    with quietly():
        print(json.dumps(count(cfg)), flush=True)


if __name__ == "__main__":
    main(job, trace=lambda: any(a == "debug=trace" for a in sys.argv))
