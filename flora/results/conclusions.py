"""What finished tables say, in sentences made from their records."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from flora.results.cells import Table
from flora.results.rows import Row, blocks, not_compared
from flora.results.statistics import mean_std


@dataclass(frozen=True)
class Conclusions:
    """What a table says.

    Attributes:
        summary: how often each method is first, or not told from the first; empty with one data set and model.
        sentences: for each data set and model.
    """

    summary: str
    sentences: list[str]


def complete(table: Table, rows: Sequence[Row]) -> bool:
    """Whether all runs of a table that can be run are finished; a table without cells is a list of what was run."""
    wanted = len([cell for cell in table.cells if cell.not_runnable_yet is None])
    done = sum(len(row.records) for row in rows if not row.chosen)
    return done > 0 and (not table.cells or done == wanted)


def conclusions(table: Table, rows: Sequence[Row]) -> Conclusions | None:
    """What a table says; None while runs are missing, or where nothing stands beside another."""
    several = [block for block in blocks([row for row in rows if row.records]) if len(block) > 1]
    if not complete(table, rows) or not several:
        return None
    compared = [block for block in several if not_compared(block) is None]
    summary = ""
    if len(compared) > 1:
        first = Counter(row.method for block in compared for row in block if row.mark == "best")
        tied = Counter(method for block in compared for method in {row.method for row in block if row.mark})
        summary = f"Of {len(compared)} data sets and models ({_seeds(compared)}), first: {_counted(first)}"
        if tied != first:
            summary += f". First, or not told from the first: {_counted(tied)}"
        summary += "."
    return Conclusions(summary, [_sentence(block) for block in several])


def _counted(methods: Counter[str]) -> str:
    return ", ".join(f"{method} {count}" for method, count in sorted(methods.items(), key=lambda m: (-m[1], m[0])))


def _seeds(blocks: list[list[Row]]) -> str:
    counts = {len(row.records) for block in blocks for row in block}
    return f"n = {min(counts)}" + (f" to {max(counts)}" if len(counts) > 1 else "")


def _sentence(block: list[Row]) -> str:
    """Who is first in a block, who is not told from it, and who is below, with means and the number of seeds."""
    ranked = sorted(block, key=lambda row: -mean_std(row.values)[0])
    protocol = f", {block[0].protocol}" if block[0].protocol else ""
    text = f"{block[0].task}, {block[0].model}{protocol} ({block[0].first['metric']}, {_seeds([block])}): "
    if reason := not_compared(block):
        return f"{text}not compared ({reason}): {', '.join(_named(row, block) for row in block)}."
    (best,) = [row for row in block if row.mark == "best"]
    text += f"first is {_named(best, block)}"
    tied = [_named(row, block) for row in ranked if row.mark == "tied"]
    below = [_named(row, block) for row in ranked if not row.mark]
    if tied:
        text += f"; a paired t-test does not tell from it {', '.join(tied)}"
    if below:
        text += f"; below: {', '.join(below)}"
    return text + "."


def _named(row: Row, block: list[Row]) -> str:
    """A line's method with its mean, and its settings where the method has several lines."""
    alone = [other.method for other in block].count(row.method) == 1
    return f"{row.method if alone else row.name} {mean_std(row.values)[0]:.4f}"
