"""Marks of the first place: paired t-tests and Holm's correction, against formulas written out."""

import math
import statistics

import pytest
from scipy import stats

from flora.results.statistics import first_places, holm, mean_std


def test_mean_and_sample_deviation():
    # 0.4, 0.5, 0.9: mean 0.6; squared deviations 0.04 + 0.01 + 0.09 = 0.14; / 2 = 0.07
    assert mean_std([0.4, 0.5, 0.9]) == pytest.approx((0.6, 0.07**0.5))
    assert mean_std([0.4]) == (0.4, None)


def test_holm_by_hand():
    # sorted 0.01 0.02 0.03 0.04 times 4 3 2 1: 0.04 0.06 0.06 0.04, then never falling: 0.04 0.06 0.06 0.06
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def p_paired(left, right):
    """A two-sided paired t-test from its formula."""
    differences = [a - b for a, b in zip(left, right, strict=True)]
    n = len(differences)
    t = statistics.fmean(differences) / (statistics.stdev(differences) / math.sqrt(n))
    return 2 * stats.t.sf(abs(t), n - 1)


def test_ties_are_decided_by_the_paired_test_with_correction():
    best, close, far = [0.90, 0.91, 0.92, 0.93], [0.89, 0.915, 0.91, 0.92], [0.80, 0.81, 0.83, 0.83]
    assert p_paired(best, close) > 0.05
    assert 2 * p_paired(best, far) < 0.05
    scores = {"a": best, "b": close, "c": far}
    assert first_places({m: dict(enumerate(v)) for m, v in scores.items()}) == ("a", {"b"})


def test_the_correction_can_turn_a_difference_into_a_tie():
    best, other = [0.90, 0.91, 0.92, 0.93], [0.885, 0.90, 0.90, 0.925]
    p = p_paired(best, other)
    assert 0.05 / 4 < p < 0.05
    two = {"a": best, "b": other}
    assert first_places({m: dict(enumerate(v)) for m, v in two.items()}) == ("a", set())
    many = two | {f"b{i}": other for i in range(3)}  # four comparisons: 4 p > 0.05
    assert first_places({m: dict(enumerate(v)) for m, v in many.items()}) == ("a", {"b", "b0", "b1", "b2"})


def test_pairs_are_of_the_same_seed_and_one_seed_is_never_a_tie():
    scores = {"a": {0: 0.9, 1: 0.8, 2: 0.7}, "b": {2: 0.69, 1: 0.79, 0: 0.89}}
    assert first_places(scores) == ("a", set())  # 0.01 apart on every seed: certain, though the ranges overlap
    assert first_places({"a": {0: 0.9}, "b": {0: 0.9}}) == ("a", set())
    assert first_places({"a": {0: 0.9, 1: 0.8}, "b": {0: 0.9, 1: 0.8}}) == ("a", {"b"})
    assert first_places({"a": {}}) == (None, set())
