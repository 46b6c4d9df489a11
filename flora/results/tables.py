"""The rows of a table as text: Markdown, LaTeX and CSV."""

import csv
import io
import statistics
from collections.abc import Sequence

from flora.results import escape
from flora.results.cells import Table
from flora.results.markdown import DASH, formatted, markdown_table
from flora.results.rows import Row, blocks, by_task, digest
from flora.results.statistics import mean_std

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


def group_means(rows: Sequence[Row], groups: dict[str, list[str]]) -> list[list[str]]:
    """Model, method, its mean over each group of data sets and the mean of those means, as text.

    A mean of which runs are missing says how many are there; it is a dash where a data set has none.
    """
    texts = []
    for (model, name), line in by_task([row for row in rows if groups and row.records]).items():
        parts = {g: [line[task] for task in tasks] for g, tasks in groups.items() if line.keys() >= set(tasks)}
        means = {g: statistics.fmean(mean_std(row.values)[0] for row in part) for g, part in parts.items()}
        shown = [_with_runs(means[g], parts[g]) if g in parts else DASH for g in groups]
        every = [row for part in parts.values() for row in part]
        overall = _with_runs(statistics.fmean(means.values()), every) if len(parts) == len(groups) else DASH
        texts.append([model, name, *shown, overall])
    return texts


def _with_runs(mean: float, rows: Sequence[Row]) -> str:
    done, wanted = sum(len(row.records) for row in rows), sum(row.cells for row in rows)
    return f"{mean:.4f}" + (f" ({done} of {wanted} runs)" if done < wanted else "")


def _groups_markdown(rows: Sequence[Row], groups: dict[str, list[str]]) -> list[str]:
    head = ["model", "method", *(f"{group} ({len(tasks)})" for group, tasks in groups.items()), "mean of group means"]
    means = group_means(rows, groups)
    return ["", *markdown_table(head, means)] if means else []


def cells_as_text(row: Row) -> list[str]:
    """A line's cells, in the order of COLUMNS; what is missing is a dash. Marks are left to the format."""
    printed = row.published.value if row.published else None
    text = [row.task, row.model, row.name, formatted(printed, ".4f")]
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
        formatted(None if printed is None else mean - printed, "+.4f"),
        first["metric"],
        f"{first['trainable_params']:,}",
        f"{100 * first['trainable_params'] / first['total_params']:.2f}",
        formatted(row.relative("train_seconds"), ".2f"),
        formatted(row.relative("peak_memory_bytes"), ".2f"),
        ", ".join(sorted({f"{r['lr']:g}" for r in row.records.values() if r.get("lr")})) or DASH,
        str(len(first["skipped_layers"])),
    ]


def notes(rows: Sequence[Row]) -> list[str]:
    """What every table ends with: how marks are made, and where the numbers come from."""
    records = [record for row in rows for record in row.records.values()]
    lines = [
        "ours: mean ± sample standard deviation over n seeds; adapter params leave the head out",
        "bold: highest mean of its task and model; *: not told from it by a two-sided t-test paired over seeds"
        " (Holm-corrected over the methods, p > 0.05; few seeds tell little apart); nothing is tested with one seed",
        "time and memory: as each run measured them, beside LoRA's runs on the same kind of device, eager or captured"
        " as CUDA graphs like them; runs that shared a device (reproduce.py --jobs) slowed each other down, so these"
        " ratios are a rough guide and no benchmark",
    ]
    lines += _footnotes(rows)
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


def _footnotes(rows: Sequence[Row]) -> list[str]:
    shown = [row for row in rows if row.published]
    sources = sorted({f"{r.published.source} ({r.published.confidence})" for r in shown if r.published})
    lines = [f"published: {'; '.join(sources)}"] if sources else []
    return lines + [f"{r.task} {r.name}: {r.published.note}" for r in shown if r.published and r.published.note]


def markdown(title: str, rows: Sequence[Row], groups: dict[str, list[str]] | None = None) -> str:
    """A Markdown table, with the means over ``groups`` of data sets below it."""
    body = [cells_as_text(row) for row in rows]
    for row, cells in zip(rows, body, strict=True):
        cells[4] = _marked(row, cells[4])
    lines = [f"# {escape.markdown(title)}", "", *markdown_table(COLUMNS, body)]
    lines += [*_groups_markdown(rows, groups or {}), ""]
    return "\n".join(lines + [f"- {escape.markdown(note)}" for note in notes(rows)]) + "\n"


def compact(table: Table, rows: Sequence[Row]) -> str:
    """The table at a glance, in Markdown: a line per model and method, a column per data set."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    drawn = {row.task for row in rows if row.records and row.first.get("data_source") == "re-rendered"}
    names = [f"{task} (re-rendered)" if task in drawn else task for task in tasks]
    body = []
    for (model, name), of_task in by_task(rows).items():
        params = {f"{row.first['trainable_params']:,}" for row in of_task.values() if row.records}
        shown = [_marked(row, _mean(row)) if row else DASH for row in map(of_task.get, tasks)]
        body.append([model, name, ", ".join(sorted(params)) or DASH, *shown])
    lines = markdown_table(["model", "method", "adapter params", *names], body)
    done = sum(len(row.records) for row in rows)
    where = f"results/tables/{table.stem}.md"
    return "\n".join([*lines, "", f"{done} of {len(table.cells)} runs are finished; [all columns]({where}).", ""])


def _marked(row: Row, cell: str) -> escape.Markdown:
    return escape.Markdown(_MARKS[row.mark].format(escape.markdown(cell)))


def _mean(row: Row) -> str:
    if not row.records:
        return DASH
    mean, std = mean_std(row.values)
    fewer = f" (n = {len(row.values)})" if len(row.values) < row.cells else ""
    return f"{mean:.4f}" + (f" ± {std:.4f}" if std is not None else "") + fewer


def latex(title: str, rows: Sequence[Row]) -> str:
    """A booktabs table, a rule between blocks of one task and model."""
    marks = {"best": r"\textbf{{{}}}", "tied": "{}*", "": "{}"}
    lines = [r"% \usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{escape.latex(title)}}}"]
    lines += [r"\begin{tabular}{lll" + "r" * (len(COLUMNS) - 3) + "}", r"\toprule"]
    lines += [" & ".join(map(escape.latex, COLUMNS)) + r" \\", r"\midrule"]
    for number, block in enumerate(blocks(rows)):
        lines += [r"\midrule"] if number else []
        for row in block:
            cells = ["--" if cell == DASH else escape.latex(cell) for cell in cells_as_text(row)]
            cells[4] = marks[row.mark].format(cells[4])
            lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", *(f"% {escape.one_line(note)}" for note in notes(rows)), r"\end{table}"]
    return "\n".join(lines) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """Every number unrounded, one line per row of the table; empty where there is none."""
    out = io.StringIO()
    names = ("task", "model", "method", "settings", "metric", "published", "mean", "std", "n", "difference", "mark")
    costs = ("trainable_params", "head_params", "total_params", "train_seconds", "peak_memory_bytes")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, *costs, "time_to_lora", "memory_to_lora"])
    for row in rows:
        printed = row.published.value if row.published else None
        mean, std = mean_std(row.values) if row.records else (None, None)
        difference = mean - printed if mean is not None and printed is not None else None
        metric = row.first["metric"] if row.records else None
        left = [row.task, row.model, row.method, row.settings, metric, printed, mean, std, len(row.values), difference]
        spent = [_mean_of(row, key) for key in costs]
        right = [row.relative("train_seconds"), row.relative("peak_memory_bytes")]
        writer.writerow(map(escape.spreadsheet, (*left, row.mark, *spent, *right)))
    return out.getvalue()


def _mean_of(row: Row, key: str) -> float | None:
    values = [record[key] for record in row.records.values() if record.get(key) is not None]
    return statistics.fmean(values) if values else None
