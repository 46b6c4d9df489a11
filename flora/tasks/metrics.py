"""Metrics as evaluate.Metric classes over scikit-learn, built directly: ``evaluate.load`` would ask a hub."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, recall_score

_NEVER_RIGHT = -1


class Classification(evaluate.Metric):
    """``accuracy`` and ``mean_per_class_accuracy`` (macro recall over the classes that occur), both in [0, 1]."""

    greater_is_better = True

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__class__.__doc__,
            citation="",
            features=datasets.Features(predictions=datasets.Value("int64"), references=datasets.Value("int64")),
        )

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        """Score ``predictions``, logits ``[N, C]`` or class indices ``[N]``, against class indices ``[N]``.

        A row of logits that is not finite counts as wrong, whatever its label.
        """
        if predictions is not None:
            predictions = _to_classes(np.asarray(predictions))
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        present = np.unique(references)
        recall = recall_score(references, predictions, labels=present, average="macro", zero_division=0)
        return {"accuracy": float(accuracy_score(references, predictions)), "mean_per_class_accuracy": float(recall)}


def _to_classes(predictions: np.ndarray) -> np.ndarray:
    if predictions.ndim == 1:
        return predictions
    return np.where(np.isfinite(predictions).all(axis=1), predictions.argmax(axis=1), _NEVER_RIGHT)
