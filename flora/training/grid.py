"""A grid of learning rates: what each is worth, which to try next, and how a grid goes on at its edges."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

FURTHER = 3  # rates that a grid may get beyond each of its edges


def onward(rates: Sequence[float], steps: int) -> float:
    """The rate so many of the grid's own steps above its largest; steps below 0: below its smallest.

    A grid whose rates come again ten times as large goes on so: 1e-3, 3e-3, 1e-2 to 3e-2, 1e-1. Any other goes on by
    the ratio of its two rates at that edge: 2e-4, 4e-4, 8e-4 to 1.6e-3. The rate is rounded to three digits.

    Args:
        rates: at least two, rising.
        steps: not 0.
    """
    period = next((p for p in range(1, len(rates)) if _repeats(rates, p)), None)
    if period is not None:
        decades, place = divmod(steps + len(rates) - 1 if steps > 0 else steps, period)
        rate = rates[place] * 10.0**decades
    else:
        low, high = rates[-2:] if steps > 0 else rates[:2]
        rate = (high if steps > 0 else low) * (high / low) ** steps
    return float(f"{rate:.3g}")


def _repeats(rates: Sequence[float], period: int) -> bool:
    pairs = zip(rates, rates[period:], strict=False)
    return all(math.isclose(later, 10 * earlier, rel_tol=1e-6) for earlier, later in pairs)


def distinct(rates: Sequence[float]) -> list[float]:
    """The rates of a grid, rising, each once: as they are written, to six digits."""
    return list({f"{rate:g}": rate for rate in sorted(rates, reverse=True)}.values())[::-1]


@dataclass
class Grid:
    """The rates that a run tries, and what each came to.

    Args:
        rates: given; at least two where ``extend``.
        extend: go on where the best rate is the smallest or the largest, ``FURTHER`` steps each way at most.
        worth: what of a value is to be the greatest.

    Attributes:
        values: by rate, what validation says; None: the fit diverged.
    """

    rates: Sequence[float]
    extend: bool = False
    worth: Callable[[float], float] = float
    values: dict[float, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rates = distinct(self.rates)

    @property
    def upcoming(self) -> float | None:
        """The rate to try next, None where the choice is made.

        A grid goes on where one rate is better than all others and lies at an edge; below, where all have diverged.
        """
        for rate in self.rates:
            if rate not in self.values:
                return rate
        best = self.ranking[:1] or [min(self.values)]
        if not self.extend or any(self._equal(best[0], other) for other in self.ranking[1:]):
            return None  # further out is not known to be better
        above = sum(rate > self.rates[-1] for rate in self.values)
        below = sum(rate < self.rates[0] for rate in self.values)
        if best == [max(self.values)] and above < FURTHER:
            return onward(self.rates, above + 1)
        if best == [min(self.values)] and below < FURTHER:
            return onward(self.rates, -below - 1)
        return None

    @property
    def ranking(self) -> list[float]:
        """The rates whose fits did not diverge, the best first; of equal ones the smaller."""
        worths = {rate: self.worth(value) for rate, value in self.values.items() if value is not None}
        return sorted(worths, key=lambda rate: (-worths[rate], rate))

    @property
    def falls(self) -> list[float]:
        """The best rate, and the one to take if its last fit fails, and so on: always the best of the smaller ones.

        What makes a fit unstable at one rate does so at larger ones.
        """
        ranking = self.ranking
        return [rate for place, rate in enumerate(ranking) if all(rate < better for better in ranking[:place])]

    @property
    def diverged(self) -> list[float]:
        """The rates whose fits diverged, rising."""
        return sorted(rate for rate, value in self.values.items() if value is None)

    @property
    def added(self) -> list[float]:
        """The rates that were tried beyond the grid, in this order."""
        return [rate for rate in self.values if rate not in self.rates]

    def edge(self, rate: float) -> str | None:
        """``top`` or ``bottom`` for the largest or smallest rate of those tried, None inside; a single one has none."""
        if len(self.values) > 1 and rate in (edges := {max(self.values): "top", min(self.values): "bottom"}):
            return edges[rate]
        return None

    def _equal(self, rate: float, other: float) -> bool:
        return self.values[rate] == self.values[other]
