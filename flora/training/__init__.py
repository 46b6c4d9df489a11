"""Training: settings, the shared trainer, one run from data to metrics, loggers."""

from flora.training.experiment import Experiment, Outcome, evaluate
from flora.training.loggers import NoLogger, Wandb
from flora.training.settings import Paths, Protocol, TrainerSettings
from flora.training.trainer import Trainer

__all__ = [
    "Experiment",
    "NoLogger",
    "Outcome",
    "Paths",
    "Protocol",
    "Trainer",
    "TrainerSettings",
    "Wandb",
    "evaluate",
]
