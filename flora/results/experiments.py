"""The cells of a table: experiments/TABLE.yaml expanded to runs, each with its overrides and run id."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from flora.config import run_id
from flora.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Cell:
    """One run of a table.

    Attributes:
        overrides: what to type after ``python train.py``.
        run_id: names its record.
    """

    overrides: tuple[str, ...]
    run_id: str


def load(table: str) -> dict[str, Any]:
    """The definition of a table: ``title``, ``scales`` and what else its YAML says.

    Raises:
        ConfigError: no such table; the message lists those that exist.
    """
    path = ROOT / "experiments" / f"{table}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise ConfigError(f"no table {table!r} in experiments/: choose one of {known}")
    return yaml.safe_load(path.read_text())


def cells(definition: dict[str, Any], scale: str) -> list[Cell]:
    """Every cell of a table at a scale: ``common`` overrides times the product of ``grid``, in the YAML's order."""
    if scale not in definition["scales"]:
        raise ConfigError(f"this table has no scale {scale!r}: choose one of {', '.join(definition['scales'])}")
    chosen = definition["scales"][scale]
    axes = [[f"{key}={value}" for value in values] for key, values in chosen["grid"].items()]
    found = []
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        for combination in itertools.product(*axes):
            overrides = (*chosen.get("common", []), *combination)
            found.append(Cell(overrides, run_id(_composed(overrides))))
    return found


def _composed(overrides: tuple[str, ...]) -> DictConfig:
    return compose("train", overrides=list(overrides))
