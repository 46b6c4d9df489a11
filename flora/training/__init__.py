"""Training: settings, the shared trainer, one run from data to metrics, loggers."""

from flora.training.loggers import Csv, NoLogger, TensorBoard, Wandb
from flora.training.run import Outcome, Run, evaluate
from flora.training.settings import Paths, Protocol, TrainerSettings
from flora.training.trainer import Trainer

__all__ = [
    "Csv",
    "NoLogger",
    "Outcome",
    "Paths",
    "Protocol",
    "Run",
    "TensorBoard",
    "Trainer",
    "TrainerSettings",
    "Wandb",
    "evaluate",
]
