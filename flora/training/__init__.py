"""Training: settings, the shared trainer, one run from data to metrics, loggers.

The names below are public, and the ones that configs use: they stay where they are, wherever their code moves.
"""

from typing import Any

from flora import names

_HOMES = {
    "Csv": "loggers",
    "NoLogger": "loggers",
    "Outcome": "run",
    "Paths": "settings",
    "Protocol": "settings",
    "Run": "run",
    "TensorBoard": "loggers",
    "Trainer": "trainer",
    "TrainerSettings": "settings",
    "Wandb": "loggers",
    "evaluate": "run",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    return names.public(__name__, _HOMES, name)
