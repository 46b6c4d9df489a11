"""Datasets and their protocols: what to train on, how to split it and how to score it.

The names below are public, and the ones that configs use: they stay where they are, wherever their code moves.
"""

from typing import Any

from flora import names

_HOMES = {
    "Commonsense": "commonsense.task",
    "Detect": "detect.task",
    "Digits": "images.digits",
    "Glue": "glue.task",
    "ImageDataset": "images.dataset",
    "ImageFolder": "imagefolder.task",
    "ImageTask": "images.task",
    "Instruct": "vqa.task",
    "Oriented": "oriented.task",
    "Segment": "segment.task",
    "Splits": "base",
    "Task": "base",
    "Text": "text.own",
    "Vtab": "vtab.task",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    return names.public(__name__, _HOMES, name)
