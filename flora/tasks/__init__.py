"""Datasets and their protocols: what to train on, how to split it and how to score it."""

from flora.tasks.base import Splits, Task
from flora.tasks.commonsense.task import Commonsense
from flora.tasks.digits import Digits
from flora.tasks.glue.task import Glue
from flora.tasks.imagefolder.task import ImageFolder
from flora.tasks.images.dataset import ImageDataset
from flora.tasks.images.task import ImageTask
from flora.tasks.vqa.task import Instruct
from flora.tasks.vtab.task import Vtab

__all__ = [
    "Commonsense",
    "Digits",
    "Glue",
    "ImageDataset",
    "ImageFolder",
    "ImageTask",
    "Instruct",
    "Splits",
    "Task",
    "Vtab",
]
