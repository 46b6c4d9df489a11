"""Paired tests between the rows of a table, over data sets, models and seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from flora.results.markdown import DASH, markdown_table
from flora.results.statistics import holm

_DECIMALS = 12  # of differences: rounding of floats would rank equal ones above each other
_NOTE = (
    "Paired tests: differences of the test metric over the runs that both have, paired by data set, model and seed, at"
    " the rates that each chose; two-sided t-test (p, and p adjusted by Holm over the rows compared with one another),"
    " its 95 % interval, and Wilcoxon's signed-rank test, which asks for no distribution. Seeds of one data set share"
    " its images, so that p speaks of these data sets and not of others."
)


@dataclass(frozen=True)
class Paired:
    """``mean`` of the paired differences, its 95 % interval, both tests' p, and who was above how often."""

    n: int
    mean: float
    low: float
    high: float
    t: float
    wilcoxon: float
    above: int
    below: int


def paired(ours: Mapping[Any, float | None], theirs: Mapping[Any, float | None]) -> Paired | None:
    """Compare runs by key; None with fewer than two in common."""
    both = [(mine, theirs.get(key)) for key, mine in ours.items()]
    found = np.array([mine - other for mine, other in both if mine is not None and other is not None], dtype=float)
    found = found.round(_DECIMALS)
    if len(found) < 2:
        return None
    above, below = int((found > 0).sum()), int((found < 0).sum())
    mean = float(found.mean())
    if np.ptp(found) == 0:  # no deviation: the statistic is infinite, or there is no difference
        p = 1.0 if mean == 0 else 0.0
        wilcoxon = 1.0 if mean == 0 else float(stats.wilcoxon(found).pvalue)
        return Paired(len(found), mean, mean, mean, p, wilcoxon, above, below)
    test = stats.ttest_1samp(found, 0.0)
    low, high = test.confidence_interval(0.95)
    return Paired(
        *(len(found), mean, float(low), float(high), float(test.pvalue)),
        *(float(stats.wilcoxon(found).pvalue), above, below),
    )


def paired_markdown(lines: Sequence[Any], against: Sequence[str], models: Sequence[str]) -> list[str]:
    """Tests of every line against some, over all runs and by model; nothing where no two lines have runs in common.

    Args:
        lines: with ``protocol``, ``name`` and ``values`` by (task, model, seed), see ``flora.results.means``.
        against: names of lines.
        models: those to show by themselves; empty: all together alone.
    """
    protocols = any(line.protocol for line in lines)
    body: list[list[str]] = []
    for protocol in dict.fromkeys(line.protocol for line in lines):
        mine = [line for line in lines if line.protocol == protocol]
        for name in against:
            theirs: Mapping[Any, float | None] = next((line.values for line in mine if line.name == name), {})
            for model in (None, *models):
                rivals = [line for line in mine if line.name != name]
                tests = [paired(_of(line.values, model), theirs) for line in rivals]
                adjusted = iter(holm([test.t for test in tests if test]))
                for line, test in zip(rivals, tests, strict=True):
                    if test:
                        shown = [*([protocol or DASH] if protocols else []), line.name, name, model or "all"]
                        body.append([*shown, *_shown(test, next(adjusted))])
    if not body:
        return []
    head = [*(["protocol"] if protocols else []), "method", "against", "models", "n", "difference", "95 % interval"]
    head += ["p (t)", "p (Holm)", "p (Wilcoxon)", "above, below"]
    return [*markdown_table(head, body), "", _NOTE]


def _shown(test: Paired, adjusted: float) -> list[str]:
    numbers = [str(test.n), f"{test.mean:+.4f}", f"{test.low:+.4f} to {test.high:+.4f}"]
    return [*numbers, *(_p(p) for p in (test.t, adjusted, test.wilcoxon)), f"{test.above}, {test.below}"]


def _p(p: float) -> str:
    if math.isnan(p):
        return DASH
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _of(values: Mapping[Any, float | None], model: str | None) -> dict[Any, float | None]:
    return {key: value for key, value in values.items() if model in (None, key[1])}
