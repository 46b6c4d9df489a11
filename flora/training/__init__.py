"""Training: settings, the shared trainer, one run from data to metrics, loggers.

The names below are public, and the ones that configs use: they stay where they are, wherever their code moves.
"""

from typing import Any

from flora import names

_HOMES = {
    "Csv": "loggers",
    "Experiment": "experiment",
    "NoLogger": "loggers",
    "Outcome": "experiment",
    "Paths": "paths",
    "Protocol": "settings",
    "TensorBoard": "loggers",
    "Trainer": "trainer",
    "TrainerSettings": "settings",
    "Wandb": "loggers",
    "evaluate": "experiment",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    return names.public(__name__, _HOMES, name)
