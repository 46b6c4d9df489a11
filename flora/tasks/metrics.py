"""Metrics as evaluate.Metric classes over scikit-learn, built directly: ``evaluate.load`` would ask a hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, recall_score

from flora.errors import DataError

_NEVER_RIGHT = -1


class Scored(evaluate.Metric):
    """A metric that keeps what it compares in memory.

    Attributes:
        kind: of predictions and references, as Arrow calls it.
    """

    greater_is_better = True
    kind = "int64"

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Value(self.kind)
        return evaluate.MetricInfo(
            description=self.__class__.__doc__,
            citation="",
            features=datasets.Features(predictions=kind, references=kind),
        )


class Classification(Scored):
    """``accuracy`` and ``mean_per_class_accuracy`` (macro recall over the classes that occur), both in [0, 1]."""

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        """Score ``predictions``, logits ``[N, C]`` or class indices ``[N]``, against class indices ``[N]``.

        A row of logits that is not finite counts as wrong, whatever its label.
        """
        if predictions is not None:
            predictions = _to_classes(np.asarray(predictions))
        if predictions is not None and references is not None and self.writer is None and not kwargs:
            return self._compute(predictions, np.asarray(references))  # evaluate would go through an Arrow table
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        present = np.unique(references)
        recall = recall_score(references, predictions, labels=present, average="macro", zero_division=0)
        return {"accuracy": float(accuracy_score(references, predictions)), "mean_per_class_accuracy": float(recall)}


class SetsOfQuestions(Classification):
    """``NAME_accuracy`` of each set that occurs, and ``accuracy``, the mean of theirs.

    References are ``[N, 2]``, the right answers and the numbers of their sets. Where the numbers are negative, no set
    is known, and ``accuracy`` is over all questions.

    Args:
        names: of the sets.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__()

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        right, sets = predictions == references[:, 0], references[:, 1]
        if sets.min() < 0:
            return {"accuracy": float(right.mean())}
        each = {f"{name}_accuracy": float(right[sets == i].mean()) for i, name in enumerate(self.names) if i in sets}
        return {"accuracy": float(np.mean(list(each.values()))), **each}


class TextClasses(Classification):
    """``macro_f1`` over the classes that occur beside the metrics of Classification, and the confusion matrix.

    Attributes:
        confusion: counts ``[true, called]`` of the last ``compute`` of logits, int64 ``[C, C]``.
    """

    confusion: np.ndarray

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        """Score logits ``[N, C]`` or predicted indices ``[N]``."""
        if np.ndim(predictions) == 2:
            self.confusion = _confusion(np.asarray(predictions), np.asarray(references))
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        present = np.unique(references)
        score = f1_score(references, predictions, labels=present, average="macro", zero_division=0)
        return super()._compute(predictions, references) | {"macro_f1": float(score)}


class TopFive(Classification):
    """``top5_accuracy`` beside those of Classification, and the confusion matrix of the last ``compute``.

    Attributes:
        confusion: counts ``[true, called]``, int64 ``[C, C]``.
    """

    confusion: np.ndarray

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        """Score logits ``[N, C]`` against class indices ``[N]``; predicted indices ``[N]`` have no five."""
        if np.ndim(predictions) == 1:
            return super().compute(predictions=predictions, references=references, **kwargs)
        logits, truth = np.asarray(predictions, np.float64), np.asarray(references)
        classes = logits.shape[1]
        called = _to_classes(logits)
        kept = called >= 0
        self.confusion = _confusion(logits, truth)
        five = np.argpartition(-np.nan_to_num(logits, nan=-np.inf), min(5, classes) - 1, axis=1)[:, :5]
        scores = super().compute(predictions=called, references=truth, **kwargs)
        return scores | {"top5_accuracy": float(((five == truth[:, None]).any(axis=1) & kept).mean())}


class Numbers(Scored):
    """Of numbers: Pearson's and Spearman's correlation, and errors in the unit of the labels: ``mae`` and ``rmse``.

    A correlation with a constant is 0.

    Attributes:
        called, truth: of the last ``compute``, float64 ``[N]``.
    """

    kind = "float32"
    called: np.ndarray
    truth: np.ndarray

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        """Score numbers ``[N]`` or ``[N, 1]``."""
        if predictions is not None:
            predictions = np.asarray(predictions).reshape(-1)
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        self.called, self.truth = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
        error = self.called - self.truth
        return {
            "pearson": _correlation(pearsonr, self.called, self.truth),
            "spearmanr": _correlation(spearmanr, self.called, self.truth),
            "mae": float(np.abs(error).mean()),
            "rmse": float(np.sqrt((error**2).mean())),
        }


class Regions(Scored):
    """Of regions of pixels: ``mIoU``, ``mean_accuracy``, ``pixel_accuracy``, and ``IoU_NAME`` of each class.

    The pixels of all images count together, as on ADE20K's and CamVid's boards. Means are over the classes that occur:
    for IoU among pixels or predictions, for the accuracy among pixels. All lie in [0, 1].

    Args:
        names: of the classes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__()

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        """Score ``flora.tasks.segment.areas`` of images ``[N, 3, C]``; they hold the truth, references are not read.

        Raises:
            DataError: no pixel counts.
        """
        right, called, true = np.asarray(predictions, np.int64).sum(axis=0)
        if not true.any():
            raise DataError(
                f"none of the {len(predictions)} images that are evaluated has a pixel that counts: check their masks, "
                "or raise trainer.max_eval_examples"
            )
        union = called + true - right
        iou = right / np.maximum(union, 1)
        there = true > 0
        each = {f"IoU_{name}": float(iou[i]) for i, name in enumerate(self.names) if union[i]}
        return {
            "mIoU": float(iou[union > 0].mean()),
            "mean_accuracy": float((right[there] / true[there]).mean()),
            "pixel_accuracy": float(right.sum() / true.sum()),
            **each,
        }


class Glue(Scored):
    """What GLUE reports of a task: Matthews' correlation (cola), Pearson's and Spearman's (stsb), accuracy (others).

    STS-B has the mean of its two as well, which is its score on GLUE's board; ``pearson`` is what selects and is shown.
    MRPC and QQP have the F1 of their positive class as well. A correlation with a constant is 0. All but the
    correlations lie in [0, 1].

    Args:
        task: ``cola``, ``rte`` and so on.
    """

    def __init__(self, task: str) -> None:
        self.task, self.kind = task, "float32" if task == "stsb" else "int64"
        super().__init__()

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        """Score logits ``[N, C]``, class indices or numbers ``[N]``; outputs that are not finite count as wrong."""
        if predictions is not None:
            outputs = np.asarray(predictions)
            predictions = outputs.reshape(-1) if self.task == "stsb" else _to_classes(outputs)
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        if self.task == "stsb":
            pearson, spearman = (_correlation(of, predictions, references) for of in (pearsonr, spearmanr))
            return {"pearson": pearson, "spearmanr": spearman, "mean_correlation": (pearson + spearman) / 2}
        if self.task == "cola":
            return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
        scores = {"accuracy": float(accuracy_score(references, predictions))}
        if self.task in ("mrpc", "qqp"):
            scores["f1"] = float(f1_score(references == 1, predictions == 1, zero_division=0))
        return scores


def _correlation(measure: Any, predictions: np.ndarray, references: np.ndarray) -> float:
    if len(references) < 2 or not np.isfinite(predictions).all() or not predictions.std() or not references.std():
        return 0.0
    return float(measure(predictions, references)[0])


def _confusion(logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Counts ``[true, called]`` without the rows that are not finite."""
    called = _to_classes(logits)
    kept = called >= 0
    counts = np.zeros((logits.shape[1], logits.shape[1]), np.int64)
    np.add.at(counts, (truth[kept], called[kept]), 1)
    return counts


def _to_classes(predictions: np.ndarray) -> np.ndarray:
    if predictions.ndim == 1:
        return predictions
    return np.where(np.isfinite(predictions).all(axis=1), predictions.argmax(axis=1), _NEVER_RIGHT)
