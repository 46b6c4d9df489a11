"""The lines of a table: its cells joined with their records and with what was published beside them."""

import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flora.results.cells import Cell, Table, row_name
from flora.results.reported import Published, published
from flora.results.statistics import first_places
from flora.results.store import Contents
from flora.results.validation import first_reaching, on_validation, rates, with_norms

METHODS = {
    "flora": "FLoRA",
    **dict.fromkeys(("flora_gradient", "flora_published", "flora_published_nlu", "flora_published_llm"), "FLoRA"),
    "lora": "LoRA",
    "lora_flat": "LoRA",
    "dora": "DoRA",
    "dora_flat": "DoRA",
    "full": "Fully FT",
    "linear_probe": "Base (no backbone adaptation)",
    "bitfit": "BitFit",
    "ia3": "(IA)3",
    "ia3_paper": "(IA)3",
    "ssl": "SSL",
    "ssb": "SSB",
    "houlsby": "HAdapter",
    "pfeiffer": "PAdapter",
    "parallel_adapter": "PA",
    "trilora": "TriLoRA",
    "adalora": "AdaLoRA",
}
"""What published tables call our methods."""
AS_PUBLISHED = "as published"
"""The ``protocol_name`` of a part that follows the protocol of the published numbers beside it."""


@dataclass
class Row:
    """One line of a table.

    Attributes:
        task, model, method, settings: what was run; ``settings`` is what else varies in the table.
        protocol: what the table calls the way in which the runs were made; marks are set within one.
        records: finished records by seed.
        cells: how many runs there should be.
        overrides: what to type after ``python train.py``, the seed left out.
        note: what the table's file says of these runs, or None.
        published: the published number of the same cell, or None.
        published_model: the model that it is of, where that is another; there is no difference to it then.
        mark: ``best``, ``tied`` or nothing.
        lora: the record of LoRA that time and memory are related to, by seed.
        runnable: how many of the cells can run; None: all.
        chosen: its runs are those of other rows, the best of each seed on validation, and count there.
    """

    task: str
    model: str
    method: str
    settings: str
    records: dict[int, dict[str, Any]]
    cells: int
    overrides: tuple[str, ...] = ()
    protocol: str = ""
    note: str | None = None
    published: Published | None = None
    mark: str = ""
    lora: dict[int, dict[str, Any]] = field(default_factory=dict)
    runnable: int | None = None
    published_model: str | None = None
    chosen: bool = False

    @property
    def complete(self) -> bool:
        """Whether all runs that can run are finished."""
        return len(self.records) >= (self.cells if self.runnable is None else self.runnable)

    @property
    def name(self) -> str:
        """The method and what else varies, as shown."""
        return row_name(self.method, self.settings)

    @property
    def values(self) -> list[float]:
        """The metric of each seed."""
        return [record["value"] for record in self.records.values()]

    @property
    def first(self) -> dict[str, Any]:
        """The record of the lowest seed."""
        return self.records[min(self.records)]

    @property
    def difference(self) -> float | None:
        """How far its mean lies above the published number; None where that is of another model, or there is none."""
        if not self.records or self.published is None or self.published.value is None or self.published_model:
            return None
        return statistics.fmean(self.values) - self.published.value

    @property
    def tuned(self) -> bool:
        """Whether each of its runs chose its learning rate on validation, among rates that made a difference."""
        return bool(self.records) and all(
            _told_apart(record.get("selection") or {}) for record in self.records.values()
        )

    @property
    def steps_to_lora(self) -> dict[int, float | None]:
        """Steps of each seed to the first look at validation with LoRA's final value there, the mean over its seeds.

        None where a seed never reaches it; empty where LoRA is not finished, or the table is not of validation.
        """
        seen = {seed: record["curve"] for seed, record in self.records.items() if record.get("curve")}
        if len(self.lora) < self.cells or not all("curve" in record for record in self.lora.values()):
            return {}
        target = statistics.fmean(record["value"] for record in self.lora.values())
        return {seed: first_reaching(curve, target) for seed, curve in seen.items()}

    @property
    def footnotes(self) -> list[str]:
        """Its note, how it was run where a published number stands beside it, and where its grid chose nothing."""
        said = [self.note] if self.note else []
        beside = self.published is not None and self.published.value is not None and self.records
        if beside and self.published_model:
            said.append(f"the published number is of {self.published_model}, so that no difference is shown")
        elif beside and not self.note and self.protocol != AS_PUBLISHED:
            rate = "chosen on validation" if self.tuned else "not chosen"
            here = f"{self.model}, protocol {self.first['protocol']}, learning rate {rate}"
            said.append(f"not known to follow the protocol of the published number beside it: {here}")
        choices = [r["selection"] for r in self.records.values() if r.get("selection")]
        for what, count in (
            ("all rates of the grid score the same on validation", sum(not _told_apart(c) for c in choices)),
            ("the chosen rate is the largest that was tried", sum(c.get("edge") == "top" for c in choices)),
            ("the chosen rate is the smallest that was tried", sum(c.get("edge") == "bottom" for c in choices)),
            (
                "the rate that validation chose diverged or collapsed in the last fit, and a smaller one was taken",
                sum(bool(c.get("fallen")) for c in choices),
            ),
        ):
            if count:
                said.append(f"in {count} of {len(self.records)} runs, {what}")
        return said

    def relative(self, key: str) -> float | None:
        """The mean of a cost divided by LoRA's, over the seeds of which both ran in the same way; None without any.

        An eager run and one captured as CUDA graphs, or runs on two kinds of device, have no ratio that says anything
        about the methods.
        """
        common = [s for s in self.records.keys() & self.lora.keys() if _way(self.records[s]) == _way(self.lora[s])]
        pairs = [(self.records[s].get(key), self.lora[s].get(key)) for s in common]
        both = [(ours, lora) for ours, lora in pairs if ours and lora]
        return sum(ours for ours, _ in both) / sum(lora for _, lora in both) if both else None


def _told_apart(selection: dict[str, Any]) -> bool:
    return len(set((selection.get("values") or {}).values())) > 1


def rate_counts(record: dict[str, Any]) -> bool:
    """Whether a record's rate trained anything: a head alone has its own, trainer.head_lr, unless one was chosen."""
    return bool(record.get("trainable_params") or record.get("selection"))


def _way(record: dict[str, Any]) -> tuple[Any, ...]:
    execution = record.get("execution") or {}
    return record.get("device"), record.get("dtype"), *(bool(execution.get(key)) for key in ("cuda_graph", "compile"))


def rows(table: Table, contents: Contents) -> list[Row]:
    """The lines of a table, blocks of one task and model together, marks set."""
    reported = published(table)
    measured = [_row(key, cells, table, contents, reported) for key, cells in table.rows.items()]
    return set_marks([*measured, *chosen_rows(table.choose, measured)])


def chosen_rows(choices: Sequence[dict[str, Any]], rows: Sequence[Row]) -> list[Row]:
    """A row for each choice in each block of one task, model and protocol that has all rows to choose from.

    Each of its seeds is the run that did best on validation at its own chosen rate, of equal ones the first named; a
    seed stands only where all the runs to choose from are finished, and chose a rate on validation.

    Args:
        choices: each with the ``method`` and ``label`` to show, and the names ``of`` the rows to choose from.
        rows: of the table.
    """
    named: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        named.setdefault((row.task, row.model, row.protocol), {})[row.name] = row
    made = []
    for choice in choices:
        for block in named.values():
            if block.keys() >= set(choice["of"]):
                made.append(_chosen(choice["method"], choice["label"], [block[name] for name in choice["of"]]))
    return made


def _chosen(method: str, label: str, rows: Sequence[Row]) -> Row:
    records = {}
    for seed in sorted(set.intersection(*(set(row.records) for row in rows))):
        runs = [(_reached(row.records[seed]), row.records[seed]) for row in rows]
        if all(reached is not None for reached, _ in runs):
            records[seed] = max(runs, key=lambda run: run[0] or 0.0)[1]
    kept: dict[str, Any] = {"overrides": (), "note": None, "published": None, "chosen": True}
    return replace(rows[0], method=method, settings=label, records=records, **kept)


def _reached(record: dict[str, Any]) -> float | None:
    """What a run reached on validation at the rate that it chose there; None where it chose none."""
    chosen = (record.get("selection") or {}).get("chosen")
    return None if chosen is None else rates(record).get(f"{chosen:g}")


def set_marks(rows: Sequence[Row]) -> list[Row]:
    """Rows, blocks together, with their marks and the LoRA that costs are related to."""
    every = blocks(rows)
    for block in every:
        scores = {row.name: {seed: r["value"] for seed, r in row.records.items()} for row in block}
        best, tied = first_places(scores) if not_compared(block) is None else (None, set())
        references = [r for r in block if r.method in ("lora", "lora_flat")]
        shared = {key for r in references for key in _settings(r)}  # other methods have some of their own, as init
        for row in block:
            row.mark = "best" if row.name == best else "tied" if row.name in tied else ""
            asked = {key: value for key, value in _settings(row).items() if key in shared}
            same = [r for r in references if _settings(r) == asked] or references
            row.lora = same[0].records if len({r.name for r in same}) == 1 else {}
    return [row for block in every for row in block]


def _settings(row: Row) -> dict[str, str]:
    pairs = [word.partition("=") for word in row.settings.split(", ") if word]
    return {key: value for key, _, value in pairs}


def not_compared(block: Sequence[Row]) -> str | None:
    """Why nothing in a block is marked; None where all that can run has been, with the same seeds, at least two."""
    seeds = {frozenset(row.records) for row in block if row.records}
    if len([row for row in block if row.records]) < 2:
        return "one row"
    if len(seeds) > 1:
        return "not the same seeds"
    if len(min(seeds)) < 2:
        return "one seed"
    return None if all(row.complete for row in block) else "not all runs are finished"


def blocks(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that are compared: of one task, model and protocol; those of one task and model side by side."""
    groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault((row.task, row.model), {}).setdefault(row.protocol, []).append(row)
    return [block for protocols in groups.values() for block in protocols.values()]


def by_task(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """Rows by model, protocol and name, then by task: what a table with a column per task needs."""
    lines: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.model, row.protocol, row.name), {})[row.task] = row
    return lines


def _row(
    key: tuple[str, str, str, str, str],
    cells: list[Cell],
    table: Table,
    contents: Contents,
    reported: dict[tuple[str, str, str], Published],
) -> Row:
    task, model, method, settings, protocol = key
    records = {c.seed: on_set(record_of(c, contents), task if c.tests else None) for c in cells}
    if "correlation" in table.definition.get("figures", []):
        records = {seed: with_norms(record, contents.whole) for seed, record in records.items()}
    if table.split == "validation":
        records = {seed: on_validation(record, contents.whole) for seed, record in records.items()}
    printed = reported.get((cells[0].published or "", METHODS.get(method, method), task))
    overrides = tuple(o for o in cells[0].overrides if not o.startswith("seed="))
    finished = {s: r for s, r in sorted(records.items()) if r}
    note = cells[0].note
    runnable = sum(not cell.not_runnable_yet for cell in cells)
    of = (table.definition.get("published") or {}).get("model")
    elsewhere = of if of and of != model else None
    said: dict[str, Any] = {"runnable": runnable, "published_model": elsewhere}
    return Row(*(task, model, method, settings, finished, len(cells), overrides, protocol, note, printed), **said)


def record_of(cell: Cell, contents: Contents) -> dict[str, Any] | None:
    """The summary of a cell's finished record, or None; composing its id is saved where no record is on its data."""
    dataset = cell.settings.get("task.dataset")
    if cell.not_runnable_yet or (dataset is not None and dataset not in contents.datasets):
        return None
    return contents.finished(cell.cell_id)


def on_set(record: dict[str, Any] | None, name: str | None) -> dict[str, Any] | None:
    """A summary whose value is that of one of the sets that the run was tested on; None where it was not."""
    if record is None or name is None:
        return record
    value = record["metrics"].get(f"{name}_{record['metric']}")
    return None if value is None else record | {"value": value}


def digest(records: Sequence[dict[str, Any]]) -> str:
    """Sha256 over the files of the records, whatever their order: changes with any byte of any of them."""
    text = "\n".join(sorted(f"{r['run_id']} {r['sha256']}" for r in records))
    return hashlib.sha256(text.encode()).hexdigest()
