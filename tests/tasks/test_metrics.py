"""Accuracy and its mean over classes, without a hub."""

import socket

import numpy as np
import pytest

from flora.tasks.metrics import Classification


def test_accuracy_counts_samples_and_the_mean_counts_classes():
    scores = Classification().compute(predictions=[0, 0, 1, 1], references=[0, 0, 0, 1])
    assert scores == {"accuracy": 0.75, "mean_per_class_accuracy": pytest.approx((2 / 3 + 1) / 2)}


def test_a_class_that_is_predicted_but_never_asked_for_does_not_enter_the_mean():
    scores = Classification().compute(predictions=[0, 5], references=[0, 1])
    assert scores == {"accuracy": 0.5, "mean_per_class_accuracy": 0.5}


def test_logits_and_their_argmax_score_alike():
    logits = np.random.RandomState(0).randn(50, 4)
    references = np.arange(50) % 4
    metric = Classification()
    assert metric.compute(predictions=logits, references=references) == metric.compute(
        predictions=logits.argmax(1), references=references
    )


def test_logits_that_are_not_finite_are_wrong_even_for_class_0():
    logits = np.array([[np.nan, np.nan], [np.inf, 0.0], [2.0, 1.0]])
    assert Classification().compute(predictions=logits, references=[0, 0, 0])["accuracy"] == pytest.approx(1 / 3)


def test_no_network_is_touched(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    assert Classification().compute(predictions=[1], references=[1])["accuracy"] == 1
