"""Means of a table's rows over its data sets and models, and how far they lie from those of some of them.

At each rate that all runs of a method tried, where the table is of validation, and at the rate that each run chose.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flora.config import composed
from flora.results.cells import Table
from flora.results.markdown import DASH, formatted, markdown_table
from flora.results.paired import paired_markdown
from flora.results.rows import Row, by_task
from flora.results.statistics import mean_std
from flora.results.validation import rates

Key = tuple[str, str, int]  # task, model, seed
Figure = tuple[float, float | None]  # a number and its standard error
CHOSEN = "chosen"
_NOTE = (
    "Means of the means over seeds, each data set and model alike; ± is their standard error, from the deviations over "
    "seeds. They stand where every run is finished. A difference is over the runs that both have, paired by data set, "
    "model and seed, ± its standard error over these pairs."
)
_OF_RATES = (
    "A line at one rate is compared with the other method at its own default rate, one at chosen rates with its chosen "
    "rates. Steps: the median over all runs of those to the first look at validation with the final value of LoRA "
    "there; runs that never reach it count as endless."
)


@dataclass(frozen=True)
class Contender:
    """What runs of a method come to at a rate.

    Attributes:
        protocol, name: of its rows.
        rate: of the grid, or ``chosen``.
        values: of each run; None where it diverged.
        wanted: how many runs there should be, by model.
        steps: to LoRA's final value, None where a run never reaches it.
        default: whether the rate is the one that all its rows have without a grid.
    """

    protocol: str
    name: str
    rate: str
    values: dict[Key, float | None]
    wanted: dict[str, int]
    steps: list[float | None]
    default: bool = False

    def mean(self, model: str | None = None) -> Figure | None:
        """The mean over data sets (and models, unless one is named) and its standard error; None where a run lacks."""
        blocks: dict[tuple[str, str], list[float]] = {}
        for (task, of, _), value in self.values.items():
            if value is not None and model in (None, of):
                blocks.setdefault((task, of), []).append(value)
        if sum(map(len, blocks.values())) < sum(n for of, n in self.wanted.items() if model in (None, of)):
            return None
        each = [(*mean_std(values), len(values)) for values in blocks.values()]
        squares = [std**2 / count for _, std, count in each if std is not None]
        error = math.sqrt(sum(squares)) / len(each) if len(squares) == len(each) else None
        return statistics.fmean(mean for mean, _, _ in each), error


def difference(ours: Mapping[Key, float | None], theirs: Mapping[Key, float | None]) -> tuple[Figure, int] | None:
    """The mean of paired differences over common runs with its standard error, and their number; None without any."""
    pairs = [(value, theirs.get(key)) for key, value in ours.items()]
    found = [mine - other for mine, other in pairs if mine is not None and other is not None]
    if not found:
        return None
    mean, std = mean_std(found)
    return (mean, None if std is None else std / math.sqrt(len(found))), len(found)


def contenders(table: Table, rows: Sequence[Row]) -> list[Contender]:
    """The lines of the means: of each method those at single rates, then that at chosen ones."""
    found = []
    every = {(row.task, row.model, row.protocol) for row in rows}
    lines: dict[tuple[str, str], list[Row]] = {}
    for (_, protocol, name), of_task in by_task(rows).items():
        lines.setdefault((protocol, name), []).extend(of_task.values())
    for (protocol, name), mine in lines.items():
        runs = {(row.task, row.model, seed): record for row in mine for seed, record in row.records.items()}
        seeds = max(row.cells for row in mine)
        wanted = {row.model: 0 for row in rows}
        for model in (model for _, model, of in every if of == protocol):
            wanted[model] += seeds
        grids = [rates(record) for record in runs.values()] if table.split == "validation" else []
        common = [rate for rate in (grids[0] if grids else ()) if all(rate in grid for grid in grids)]
        usual = _default_rates(mine) if common else {}
        for rate in sorted(common, key=float):
            values = {key: rates(record)[rate] for key, record in runs.items()}
            default = set(usual.values()) == {rate}
            found.append(Contender(protocol, name, rate, values, wanted, [], default))
        steps = [step for row in mine for step in row.steps_to_lora.values()]
        found.append(Contender(protocol, name, CHOSEN, {k: r["value"] for k, r in runs.items()}, wanted, steps))
    return found


def at_default_rate(rows: Sequence[Row]) -> dict[Key, float | None]:
    """The value of each run at the rate that it would have without a grid, as far as its grid holds that."""
    usual = _default_rates(rows)
    runs = {(row.task, row.model, seed): (usual[row.task], r) for row in rows for seed, r in row.records.items()}
    return {key: rates(record).get(rate) for key, (rate, record) in runs.items()}


def _default_rates(rows: Sequence[Row]) -> dict[str, str]:
    """``trainer.lr`` by task: a grid takes its place, so that it decides nothing but what is called the default."""
    return {row.task: f"{composed(row.overrides).trainer.lr:g}" for row in rows}


def means_markdown(table: Table, rows: Sequence[Row]) -> list[str]:
    """Means and paired tests, below the rows; nothing where the table asks for none, or no run is finished."""
    if not table.against or not any(row.records for row in rows):
        return []
    tests = tests_lines(table, rows)
    return ["", *means_lines(table, rows), *(["", *tests] if tests else [])]


def tests_lines(table: Table, rows: Sequence[Row]) -> list[str]:
    """Paired tests of the rows against those that the table names, as Markdown, at the rates chosen."""
    chosen = [line for line in contenders(table, rows) if line.rate == CHOSEN]
    return paired_markdown(chosen, table.against, [] if table.split == "validation" else _models(rows))


def _models(rows: Sequence[Row]) -> list[str]:
    """The models, where there are several."""
    models = list(dict.fromkeys(row.model for row in rows))
    return models if len(models) > 1 else []


def means_lines(table: Table, rows: Sequence[Row]) -> list[str]:
    """The means as a Markdown table, and how they are made."""
    lines = contenders(table, rows)
    models = _models(rows)
    of_rates = any(line.rate != CHOSEN for line in lines)
    reaching = any(line.steps for line in lines)
    protocols = any(line.protocol for line in lines)
    blocks = len({(row.task, row.model) for row in rows})
    head = [*(["protocol"] if protocols else []), "method", *(["rate"] if of_rates else []), *models]
    head += [f"mean over {blocks}", *(f"to {name}" for name in table.against)]
    head += ["reach LoRA", "steps"] if reaching else []
    body = []
    for line in lines:
        rate = f"{line.rate} (default)" if line.default else line.rate
        shown = [*([line.protocol or DASH] if protocols else []), line.name, *([rate] if of_rates else [])]
        shown += [_with_error(line.mean(model), ".4f") for model in models]
        lost = sum(value is None for value in line.values.values())
        shown.append(f"{DASH} ({lost} diverged)" if lost else _with_error(line.mean(), ".4f"))
        shown += [_difference(line, lines, rows, name) for name in table.against]
        reached = [step for step in line.steps if step is not None]
        shown += (
            [f"{len(reached)} of {len(line.steps)}" if line.steps else DASH, _median(line.steps)] if reaching else []
        )
        body.append(shown)
    return [*markdown_table(head, body), "", f"{_NOTE} {_OF_RATES}" if of_rates else _NOTE]


def _difference(line: Contender, lines: Sequence[Contender], rows: Sequence[Row], name: str) -> str:
    if line.rate == CHOSEN:
        theirs = next((o.values for o in lines if (o.protocol, o.name, o.rate) == (line.protocol, name, CHOSEN)), {})
    else:
        theirs = at_default_rate([row for row in rows if (row.protocol, row.name) == (line.protocol, name)])
    found = difference(line.values, theirs) if line.name != name or line.rate != CHOSEN else None
    if found is None or (line.name == name and line.default):
        return DASH
    value, count = found
    return _with_error(value, "+.4f") + (f" (n = {count})" if count < sum(line.wanted.values()) else "")


def _with_error(value: Figure | None, spec: str) -> str:
    if value is None:
        return DASH
    return format(value[0], spec) + (f" ± {value[1]:.4f}" if value[1] is not None else "")


def _median(steps: Sequence[float | None]) -> str:
    median = statistics.median([math.inf if step is None else step for step in steps]) if steps else math.inf
    return formatted(median if math.isfinite(median) else None, ".0f")
