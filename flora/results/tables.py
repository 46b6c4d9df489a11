"""Tables from records: a row per data set, model and method, published beside ours; Markdown, LaTeX and CSV."""

import csv
import hashlib
import io
import statistics
from dataclasses import dataclass, field
from typing import Any

from flora.results.cells import Cell, Table
from flora.results.reported import Published, published
from flora.results.statistics import first_places, mean_std
from flora.results.store import Contents

DASH = "-"
METHODS = {
    "flora": "FLoRA",
    "lora": "LoRA",
    "lora_flat": "LoRA",
    "dora": "DoRA",
    "dora_flat": "DoRA",
    "full": "Fully FT",
    "linear_probe": "Base (no backbone adaptation)",
    "bitfit": "BitFit",
    "ia3": "(IA)3",
    "houlsby": "HAdapter",
    "pfeiffer": "PAdapter",
    "parallel_adapter": "PA",
    "trilora": "TriLoRA",
    "adalora": "AdaLoRA",
}
"""What published tables call our methods."""

COLUMNS = (
    "task",
    "model",
    "method",
    "published",
    "ours",
    "difference",
    "metric",
    "adapter params",
    "% of model",
    "time / LoRA",
    "memory / LoRA",
    "lr",
    "layers skipped",
)
_MARKS = {"best": "**{}**", "tied": "{}*", "": "{}"}


@dataclass
class Row:
    """One line of a table.

    Attributes:
        task, model, method, settings: what was run; ``settings`` is what else varies in the table.
        records: finished records by seed.
        cells: how many runs there should be.
        overrides: what to type after ``python train.py``, the seed left out.
        published: the published number of the same cell, or None.
        mark: ``best``, ``tied`` or nothing.
        lora: the record of LoRA that time and memory are related to, by seed.
    """

    task: str
    model: str
    method: str
    settings: str
    records: dict[int, dict[str, Any]]
    cells: int
    overrides: tuple[str, ...] = ()
    published: Published | None = None
    mark: str = ""
    lora: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The method and what else varies, as shown."""
        return f"{self.method} ({self.settings})" if self.settings else self.method

    @property
    def values(self) -> list[float]:
        """The metric of each seed."""
        return [record["value"] for record in self.records.values()]

    @property
    def first(self) -> dict[str, Any]:
        """The record of the lowest seed."""
        return self.records[min(self.records)]

    def relative(self, key: str) -> float | None:
        """The mean of a cost divided by LoRA's, over the seeds of which both ran in the same way; None without any.

        An eager run and one captured as CUDA graphs, or runs on two kinds of device, have no ratio that says anything
        about the methods.
        """
        common = [s for s in self.records.keys() & self.lora.keys() if _way(self.records[s]) == _way(self.lora[s])]
        pairs = [(self.records[s].get(key), self.lora[s].get(key)) for s in common]
        known = [(ours, lora) for ours, lora in pairs if ours and lora]
        return sum(ours for ours, _ in known) / sum(lora for _, lora in known) if known else None


def _way(record: dict[str, Any]) -> tuple[Any, ...]:
    execution = record.get("execution") or {}
    return record.get("device"), record.get("dtype"), *(bool(execution.get(key)) for key in ("cuda_graph", "compile"))


def rows(table: Table, contents: Contents) -> list[Row]:
    """The lines of a table, blocks of one task and model together, marks set."""
    reported = published(table)
    found = [_row(key, cells, contents, reported) for key, cells in table.rows.items()]
    blocks: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        blocks.setdefault((row.task, row.model), []).append(row)
    for block in blocks.values():
        best, tied = first_places({row.name: {s: r["value"] for s, r in row.records.items()} for row in block})
        references = [r for r in block if r.method in ("lora", "lora_flat")]
        for row in block:
            row.mark = "best" if row.name == best else "tied" if row.name in tied else ""
            same = [r for r in references if r.settings == row.settings] or references
            row.lora = same[0].records if len({r.name for r in same}) == 1 else {}
    return [row for block in blocks.values() for row in block]


def group_means(found: list[Row], groups: dict[str, list[str]]) -> list[list[str]]:
    """Model, method, its mean over each group of data sets and the mean of those means, as text.

    A mean of which runs are missing says how many are there; it is a dash where a data set has none.
    """
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in found:
        if groups and row.records:
            lines.setdefault((row.model, row.name), {})[row.task] = row
    texts = []
    for (model, name), known in lines.items():
        parts = {g: [known[task] for task in tasks] for g, tasks in groups.items() if known.keys() >= set(tasks)}
        means = {g: statistics.fmean(mean_std(row.values)[0] for row in rows) for g, rows in parts.items()}
        shown = [_with_runs(means[g], parts[g]) if g in parts else DASH for g in groups]
        every = [row for rows in parts.values() for row in rows]
        overall = _with_runs(statistics.fmean(means.values()), every) if len(parts) == len(groups) else DASH
        texts.append([model, name, *shown, overall])
    return texts


def _with_runs(mean: float, rows: list[Row]) -> str:
    done, wanted = sum(len(row.records) for row in rows), sum(row.cells for row in rows)
    return f"{mean:.4f}" + (f" ({done} of {wanted} runs)" if done < wanted else "")


def _groups_markdown(found: list[Row], groups: dict[str, list[str]]) -> list[str]:
    head = ["model", "method", *(f"{group} ({len(tasks)})" for group, tasks in groups.items()), "mean of group means"]
    body = [head, ["---"] * len(head), *group_means(found, groups)]
    return ["", *("| " + " | ".join(cells) + " |" for cells in body)] if len(body) > 2 else []


def _row(
    key: tuple[str, str, str, str],
    cells: list[Cell],
    contents: Contents,
    reported: dict[tuple[str, str, str], Published],
) -> Row:
    task, model, method, settings = key
    records = {c.seed: record_of(c, contents) for c in cells}
    beside = reported.get((cells[0].published or "", METHODS.get(method, method), task))
    overrides = tuple(o for o in cells[0].overrides if not o.startswith("seed="))
    finished = {s: r for s, r in sorted(records.items()) if r}
    return Row(task, model, method, settings, finished, len(cells), overrides, beside)


def record_of(cell: Cell, contents: Contents) -> dict[str, Any] | None:
    """The summary of a cell's finished record, or None; composing its id is saved where no record is on its data."""
    dataset = cell.settings.get("task.dataset")
    if cell.not_runnable_yet or (dataset is not None and dataset not in contents.datasets):
        return None
    return contents.finished(cell.run_id)


def cells_as_text(row: Row) -> list[str]:
    """A line's cells, in the order of COLUMNS; what is missing is a dash. Marks are left to the format."""
    printed = row.published.value if row.published else None
    text = [row.task, row.model, row.name, DASH if printed is None else f"{printed:.4f}"]
    if not row.records:
        return text + [DASH] * (len(COLUMNS) - len(text))
    mean, std = mean_std(row.values)
    first = row.first
    n = f"n = {len(row.values)}" + (f" of {row.cells}" if len(row.values) < row.cells else "")
    if first.get("data_source") == "re-rendered":
        text[0] += " (re-rendered)"
    return [
        *text,
        f"{mean:.4f}" + (f" ± {std:.4f}" if std is not None else "") + f" ({n})",
        DASH if printed is None else f"{mean - printed:+.4f}",
        first["metric"],
        f"{first['trainable_params']:,}",
        f"{100 * first['trainable_params'] / first['total_params']:.2f}",
        _ratio(row.relative("train_seconds")),
        _ratio(row.relative("peak_memory_bytes")),
        ", ".join(sorted({f"{r['lr']:g}" for r in row.records.values() if r.get("lr")})) or DASH,
        str(len(first["skipped_layers"])),
    ]


def _ratio(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


def notes(found: list[Row]) -> list[str]:
    """What every table ends with: how marks are made, and where the numbers come from."""
    records = [record for row in found for record in row.records.values()]
    lines = [
        "ours: mean ± sample standard deviation over n seeds; adapter params leave the head out",
        "bold: highest mean of its task and model; *: not told from it by a two-sided t-test paired over seeds"
        " (Holm-corrected over the methods, p > 0.05; few seeds tell little apart); nothing is tested with one seed",
        "time and memory: as each run measured them, beside LoRA's runs on the same kind of device, eager or captured"
        " as CUDA graphs like them; runs that shared a device (reproduce.py --jobs) slowed each other down, so these"
        " ratios are a rough guide and no benchmark",
    ]
    lines += _footnotes(found)
    if not records:
        return [*lines, "no run of this table is finished"]

    def all_of(key: str) -> str:
        return "; ".join(sorted({str(r.get(key)) for r in records}))

    packages = sorted({f"{name} {number}" for r in records for name, number in r["versions"].items()})
    dirty = " (some with uncommitted changes)" if any(r.get("dirty") for r in records) else ""
    return [
        *lines,
        f"commit: {all_of('commit')}{dirty}",
        f"protocol: {all_of('protocol')}; dtype: {all_of('dtype')}; device: {all_of('device')}",
        f"versions: {', '.join(packages)}",
        f"records: {len(records)}, sha256 {digest(records)}",
    ]


def _footnotes(found: list[Row]) -> list[str]:
    shown = [row for row in found if row.published]
    sources = sorted({f"{r.published.source} ({r.published.confidence})" for r in shown if r.published})
    lines = [f"published: {'; '.join(sources)}"] if sources else []
    return lines + [f"{r.task} {r.name}: {r.published.note}" for r in shown if r.published and r.published.note]


def digest(records: list[dict[str, Any]]) -> str:
    """Sha256 over the files of the records, whatever their order: changes with any byte of any of them."""
    text = "\n".join(sorted(f"{r['run_id']} {r['sha256']}" for r in records))
    return hashlib.sha256(text.encode()).hexdigest()


def markdown(title: str, found: list[Row], groups: dict[str, list[str]] | None = None) -> str:
    """A Markdown table, with the means over ``groups`` of data sets below it."""
    body = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for row in found:
        cells = cells_as_text(row)
        cells[4] = _MARKS[row.mark].format(cells[4])
        body.append(cells)
    lines = [f"# {title}", "", *("| " + " | ".join(cells) + " |" for cells in body)]
    lines += [*_groups_markdown(found, groups or {}), ""]
    return "\n".join(lines + [f"- {note}" for note in notes(found)]) + "\n"


def compact(table: Table, found: list[Row]) -> str:
    """The table at a glance, in Markdown: a line per model and method, a column per data set."""
    tasks = list(dict.fromkeys(row.task for row in found))
    drawn = {row.task for row in found if row.records and row.first.get("data_source") == "re-rendered"}
    names = [f"{task} (re-rendered)" if task in drawn else task for task in tasks]
    body = [["model", "method", "adapter params", *names], ["---"] * (3 + len(tasks))]
    by_line: dict[tuple[str, str], dict[str, Row]] = {}
    for row in found:
        by_line.setdefault((row.model, row.name), {})[row.task] = row
    for (model, name), of_task in by_line.items():
        params = {f"{row.first['trainable_params']:,}" for row in of_task.values() if row.records}
        shown = [_MARKS[row.mark].format(_mean(row)) if row else DASH for row in map(of_task.get, tasks)]
        body.append([model, name, ", ".join(sorted(params)) or DASH, *shown])
    lines = ["| " + " | ".join(cells) + " |" for cells in body]
    done = sum(len(row.records) for row in found)
    where = f"results/tables/{table.stem}.md"
    return "\n".join([*lines, "", f"{done} of {len(table.cells)} runs are finished; [all columns]({where}).", ""])


def _mean(row: Row) -> str:
    if not row.records:
        return DASH
    mean, std = mean_std(row.values)
    fewer = f" (n = {len(row.values)})" if len(row.values) < row.cells else ""
    return f"{mean:.4f}" + (f" ± {std:.4f}" if std is not None else "") + fewer


def latex(title: str, found: list[Row]) -> str:
    """A booktabs table, a rule between blocks of one task and model."""
    marks = {"best": r"\textbf{{{}}}", "tied": "{}*", "": "{}"}
    lines = [r"% \usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{escaped(title)}}}"]
    lines += [r"\begin{tabular}{lll" + "r" * (len(COLUMNS) - 3) + "}", r"\toprule"]
    lines += [" & ".join(escaped(name) for name in COLUMNS) + r" \\", r"\midrule"]
    for before, row in zip([None, *found], found, strict=False):
        if before is not None and (before.task, before.model) != (row.task, row.model):
            lines.append(r"\midrule")
        cells = ["--" if cell == DASH else escaped(cell) for cell in cells_as_text(row)]
        cells[4] = marks[row.mark].format(cells[4])
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in notes(found)), r"\end{table}"]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text with LaTeX's special characters made literal."""
    for character, replacement in (("\\", r"\textbackslash "), *((c, "\\" + c) for c in "&%$#_{}")):
        text = text.replace(character, replacement)
    return text.replace("±", r"$\pm$")


def as_csv(found: list[Row]) -> str:
    """Every number unrounded, one line per row of the table; empty where there is none."""
    out = io.StringIO()
    names = ("task", "model", "method", "settings", "metric", "published", "mean", "std", "n", "difference", "mark")
    costs = ("trainable_params", "head_params", "total_params", "train_seconds", "peak_memory_bytes")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, *costs, "time_to_lora", "memory_to_lora"])
    for row in found:
        printed = row.published.value if row.published else None
        mean, std = mean_std(row.values) if row.records else (None, None)
        difference = mean - printed if mean is not None and printed is not None else None
        metric = row.first["metric"] if row.records else None
        left = [row.task, row.model, row.method, row.settings, metric, printed, mean, std, len(row.values), difference]
        spent = [_mean_of(row, key) for key in costs]
        right = [row.relative("train_seconds"), row.relative("peak_memory_bytes")]
        writer.writerow(["" if cell is None else cell for cell in (*left, row.mark, *spent, *right)])
    return out.getvalue()


def _mean_of(row: Row, key: str) -> float | None:
    values = [record[key] for record in row.records.values() if record.get(key) is not None]
    return statistics.fmean(values) if values else None
