"""Count what a method trains, without weights or data: `python scripts/count_params.py model=llama_7b adapter=lora`.

Takes the overrides of train.py. The network exists on torch's meta device only, so any size fits.
"""

import json
import os
import sys
from pathlib import Path

import flora.launch.installed  # noqa: F401

os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach flora.launch.entry.main, which prints one line

import hydra
from omegaconf import DictConfig

from flora.launch.entry import main, quietly
from flora.results.counts import count


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parents[1] / "configs"), config_name="train")
def job(cfg: DictConfig) -> None:
    """Print the counts as one JSON line."""
    with quietly():
        print(json.dumps(count(cfg)), flush=True)


if __name__ == "__main__":
    main(job, trace=lambda: any(a == "debug=trace" for a in sys.argv))
