"""What saved runs say of new inputs: ``flora.load`` in Python, and ``mode=predict`` of train.py."""

from typing import Any

from flora import names

_HOMES = {"Prediction": "predictor", "Predictor": "predictor", "load": "predictor"}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    return names.public(__name__, _HOMES, name)
