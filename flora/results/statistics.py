"""Means over seeds, and which of several methods share the first place."""

import statistics
import warnings
from collections.abc import Mapping

from scipy import stats

LEVEL = 0.05


def mean_std(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); no deviation for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def holm(p_values: list[float]) -> list[float]:
    """P-values adjusted for their number by Holm's step-down method, in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def first_places(scores: Mapping[str, Mapping[int, float]]) -> tuple[str | None, set[str]]:
    """The method with the highest mean, and those that a test does not tell from it.

    Two-sided t-tests of the best against each other method, paired over common seeds and Holm-corrected over the
    comparisons; p > 0.05 is a tie. A method without two common seeds is not tested, and never marked as tied.

    Args:
        scores: per method, the score of each seed; higher is better.
    """
    measured = {method: by_seed for method, by_seed in scores.items() if by_seed}
    if not measured:
        return None, set()
    best = max(measured, key=lambda method: statistics.fmean(measured[method].values()))
    rivals, p_values = [], []
    for method, by_seed in measured.items():
        common = sorted(by_seed.keys() & measured[best].keys())
        if method != best and len(common) > 1:
            rivals.append(method)
            p_values.append(_paired([measured[best][s] for s in common], [by_seed[s] for s in common]))
    return best, {method for method, p in zip(rivals, holm(p_values), strict=True) if p > LEVEL}


def _paired(left: list[float], right: list[float]) -> float:
    if left == right:
        return 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal differences: the statistic is infinite, p is 0
        return float(stats.ttest_rel(left, right).pvalue)
