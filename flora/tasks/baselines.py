"""What a test gives without a model: train's most frequent class, or its mean; and whether a model does more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_ONE_SIDED = 0.95  # share of one class among the answers from which it is said


def of_classes(
    train: np.ndarray, confusion: np.ndarray, names: Sequence[str], usual: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Always answering with the class that train has most of, as facts of a record and as lines for the user.

    Args:
        train: class indices of the training examples, int64 ``[N]``.
        confusion: counts ``[true, called]`` of the test.
        names: of the classes.
        usual: the class that train has most of, where ``train`` is not what was trained on.
    """
    most = int(np.bincount(train, minlength=len(names)).argmax())
    most = list(names).index(usual) if usual is not None and usual in names else most
    share = float(confusion[most].sum() / max(confusion.sum(), 1))
    lines = [f"always {names[most]}, the most frequent class in training, gives accuracy {share:.4f} on this test"]
    called = confusion.sum(axis=0) / max(confusion.sum(), 1)
    if called.max() >= _ONE_SIDED and confusion.sum(axis=1).max() < _ONE_SIDED * confusion.sum():
        lines.append(f"warning: {called.max():.0%} of the answers are {names[int(called.argmax())]}: train longer")
    return {"class": names[most], "accuracy": share}, lines


def of_numbers(mean: float, called: np.ndarray, truth: np.ndarray) -> tuple[dict[str, Any], list[str]]:
    """Always answering with train's mean, as facts of a record and as lines for the user.

    Args:
        mean: of the training labels.
        called: what the model said of the test, ``[N]``.
        truth: its labels, ``[N]``.
    """
    error = np.abs(truth - mean)
    facts = {"mean": mean, "mae": float(error.mean()), "rmse": float(np.sqrt((error**2).mean()))}
    own = float(np.abs(truth - called).mean())
    lines = [
        f"mean absolute error {own:.4g}, {facts['mae']:.4g} by always saying {mean:.4g}, train's mean; answers lie in "
        f"{called.min():.4g} to {called.max():.4g}, labels in {truth.min():.4g} to {truth.max():.4g}"
    ]
    return facts, lines
