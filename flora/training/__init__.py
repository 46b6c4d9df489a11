"""Training: settings, the shared trainer, one run from data to metrics, loggers."""

from flora.training.experiment import Experiment, Outcome, evaluate
from flora.training.loggers import Csv, NoLogger, TensorBoard, Wandb
from flora.training.settings import Paths, Protocol, TrainerSettings
from flora.training.trainer import Trainer

__all__ = [
    "Csv",
    "Experiment",
    "NoLogger",
    "Outcome",
    "Paths",
    "Protocol",
    "TensorBoard",
    "Trainer",
    "TrainerSettings",
    "Wandb",
    "evaluate",
]
