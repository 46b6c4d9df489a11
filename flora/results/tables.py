"""The rows of a table as text: Markdown, LaTeX and CSV."""

import csv
import io
import statistics
from collections.abc import Sequence

from flora.results import escape
from flora.results.cells import Table
from flora.results.markdown import DASH, formatted, markdown_table
from flora.results.means import means_markdown
from flora.results.norms import correlations_markdown
from flora.results.notes import markers, notes, stated
from flora.results.reported import as_printed
from flora.results.rows import Row, blocks, by_task, rate_counts
from flora.results.statistics import mean_std

COLUMNS = (
    "task",
    "model",
    "method",
    "protocol",
    "published",
    "ours",
    "difference",
    "metric",
    "steps to LoRA",
    "adapter params",
    "% of model",
    "time / LoRA",
    "memory / LoRA",
    "lr",
    "layers skipped",
)
_MARKS = {"best": "**{}**", "tied": "{}*", "": "{}"}


def columns(rows: Sequence[Row]) -> list[str]:
    """The columns of a table: protocols, steps, published numbers and differences to them where it has any."""
    beside = any(row.published and row.published.value is not None for row in rows)
    shown = {"protocol": any(row.protocol for row in rows), "steps to LoRA": any(row.steps_to_lora for row in rows)}
    shown |= {"published": beside, "difference": any(row.difference is not None for row in rows)}
    return [column for column in COLUMNS if shown.get(column, True)]


_DASHES = {
    "published": "the paper, or a table that it takes over, prints no such number, or none was found",
    "difference": "no number to compare with",
    "steps to LoRA": "no seed reaches LoRA's final value on validation, or LoRA is not finished",
    "time / LoRA": "no run of LoRA on the same kind of device in the same way, or several of them",
    "memory / LoRA": "as for time, or memory was not measured",
    "lr": "the head alone was trained, at a rate that was not chosen",
}


def dashes(rows: Sequence[Row]) -> list[str]:
    """What the dashes of a table mean, a line for each column that has some; then which rows have no run, and why."""
    shown = set(columns(rows))
    texts = [dict(zip(COLUMNS, cells_as_text(row), strict=True)) for row in rows if row.records]
    said = [f"{c}, -: {why}" for c, why in _DASHES.items() if c in shown and any(text[c] == DASH for text in texts)]
    empty = [row for row in rows if not row.records]
    closed = sum(row.runnable == 0 for row in empty)
    if closed:
        said.append(f"rows of dashes: {closed} cannot be run yet, for the reason that the table's file gives")
    if len(empty) > closed:
        said.append(f"rows of dashes: of {len(empty) - closed} no run is finished")
    return said


def _published_markdown(table: Table) -> list[str]:
    head, body, said = as_printed(table)
    if not head:
        return []
    return ["", "## Published", "", *markdown_table(head, body), "", *(f"- {escape.markdown(line)}" for line in said)]


def group_means(rows: Sequence[Row], groups: dict[str, list[str]]) -> list[list[str]]:
    """Model, method, its mean over each group of data sets and the mean of those means, as text.

    A mean is a dash where a run of it is missing, or chose no learning rate on validation; a method without any mean
    is left out.
    """
    texts = []
    for (model, protocol, name), line in by_task([row for row in rows if groups and row.records]).items():
        whole = {task: row for task, row in line.items() if len(row.records) == row.cells and row.tuned}
        means = {
            group: statistics.fmean(mean_std(whole[task].values)[0] for task in tasks)
            for group, tasks in groups.items()
            if whole.keys() >= set(tasks)
        }
        overall = statistics.fmean(means.values()) if len(means) == len(groups) else None
        shown = [formatted(value, ".4f") for value in (*map(means.get, groups), overall)]
        texts += [[model, _with_protocol(name, protocol), *shown]] if means else []
    return texts


def _with_protocol(name: str, protocol: str) -> str:
    return f"{name}, {protocol}" if protocol else name


def _groups_markdown(rows: Sequence[Row], groups: dict[str, list[str]]) -> list[str]:
    head = ["model", "method", *(f"{group} ({len(tasks)})" for group, tasks in groups.items()), "mean of group means"]
    means = group_means(rows, groups)
    if not means:
        return []
    note = "Means stand where every run is finished and chose its learning rate on validation."
    return ["", *markdown_table(head, means), "", note]


def cells_as_text(row: Row) -> list[str]:
    """A line's cells, in the order of COLUMNS; what is missing is a dash. Marks are left to the format."""
    printed = row.published.value if row.published else None
    text = [row.task, row.model, row.name, row.protocol or DASH, formatted(printed, ".4f")]
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
        formatted(row.difference, "+.4f"),
        first["metric"],
        _steps(row),
        f"{first['trainable_params']:,}",
        f"{100 * first['trainable_params'] / first['total_params']:.2f}",
        formatted(row.relative("train_seconds"), ".2f"),
        formatted(row.relative("peak_memory_bytes"), ".2f"),
        ", ".join(sorted({f"{r['lr']:g}" for r in row.records.values() if r.get("lr") and rate_counts(r)})) or DASH,
        str(len(first["skipped_layers"])),
    ]


def _steps(row: Row) -> str:
    """The mean number of steps to LoRA's final value, over the seeds that reach it; how many do, unless all."""
    steps = row.steps_to_lora
    reached = [step for step in steps.values() if step is not None]
    if not reached:
        return DASH
    some = f" ({len(reached)} of {len(steps)})" if len(reached) < len(steps) else ""
    return f"{statistics.fmean(reached):.0f}{some}"


def lines_as_text(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Lines by column, with the marks of their footnotes."""
    lines = [dict(zip(COLUMNS, cells_as_text(row), strict=True)) for row in rows]
    for line, mark in zip(lines, markers(rows), strict=True):
        line["method"] += mark
    return lines


def markdown(table: Table, rows: Sequence[Row]) -> str:
    """A Markdown table, with the means over its groups of data sets below it."""
    shown, body = columns(rows), lines_as_text(rows)
    for row, line in zip(rows, body, strict=True):
        line["ours"] = _marked(row, line["ours"])
    lines = [f"# {escape.markdown(table.title)}", ""]
    lines += markdown_table(shown, [[line[column] for column in shown] for line in body])
    lines += [*_groups_markdown(rows, table.groups), *means_markdown(table, rows)]
    lines += [*(correlations_markdown(rows) if "correlation" in table.definition.get("figures", []) else []), ""]
    lines += [f"- {escape.markdown(note)}" for note in (*notes(table, rows), *dashes(rows))]
    return "\n".join(lines + _published_markdown(table)) + "\n"


def compact(table: Table, rows: Sequence[Row], folder: str) -> str:
    """The table at a glance, in Markdown: a line per model and method, a column per data set.

    ``folder`` is that of the tables' files, as a link says it where this one stands.
    """
    tasks = list(dict.fromkeys(row.task for row in rows))
    drawn = {row.task for row in rows if row.records and row.first.get("data_source") == "re-rendered"}
    names = [f"{task} (re-rendered)" if task in drawn else task for task in tasks]
    marks = {id(row): mark for row, mark in zip(rows, markers(rows), strict=True)}
    body = []
    for (model, protocol, name), of_task in by_task(rows).items():
        params = {f"{row.first['trainable_params']:,}" for row in of_task.values() if row.records}
        shown = [_marked(row, _mean(row) + marks[id(row)]) if row else DASH for row in map(of_task.get, tasks)]
        body.append([model, _with_protocol(name, protocol), ", ".join(sorted(params)) or DASH, *shown])
    lines = markdown_table(["model", "method", "adapter params", *names], body)
    said = [f"- {escape.markdown(note)}" for note in stated(table, rows)]
    done = sum(len(row.records) for row in rows if not row.chosen)
    end = f"{done} of {len(table.cells)} runs are finished; [all columns]({folder}/{table.stem}.md)."
    return "\n".join([*lines, "", *said, *([""] if said else []), end, ""])


def _marked(row: Row, cell: str) -> escape.Markdown:
    return escape.Markdown(_MARKS[row.mark].format(escape.markdown(cell)))


def _mean(row: Row) -> str:
    if not row.records:
        return DASH
    mean, std = mean_std(row.values)
    fewer = f" (n = {len(row.values)})" if len(row.values) < row.cells else ""
    return f"{mean:.4f}" + (f" ± {std:.4f}" if std is not None else "") + fewer


def latex(table: Table, rows: Sequence[Row]) -> str:
    """A booktabs table, a rule between blocks of one task, model and protocol."""
    marks = {"best": r"\textbf{{{}}}", "tied": "{}*", "": "{}"}
    shown, texts = columns(rows), dict(zip(map(id, rows), lines_as_text(rows), strict=True))
    left = sum(column in ("task", "model", "method", "protocol") for column in shown)
    lines = [r"% \usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{escape.latex(table.title)}}}"]
    lines += [r"\begin{tabular}{" + "l" * left + "r" * (len(shown) - left) + "}", r"\toprule"]
    lines += [" & ".join(map(escape.latex, shown)) + r" \\", r"\midrule"]
    for number, block in enumerate(blocks(rows)):
        lines += [r"\midrule"] if number else []
        for row in block:
            cells = {column: "--" if text == DASH else escape.latex(text) for column, text in texts[id(row)].items()}
            cells["ours"] = marks[row.mark].format(cells["ours"])
            lines.append(" & ".join(cells[column] for column in shown) + r" \\")
    said = [f"% {escape.one_line(note)}" for note in (*notes(table, rows), *dashes(rows))]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *said, r"\end{table}"]) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """Every number unrounded, one line per row of the table; empty where there is none."""
    out = io.StringIO()
    names = ("task", "model", "method", "settings", "protocol", "metric", "published", "mean", "std", "n", "difference")
    costs = ("trainable_params", "head_params", "total_params", "train_seconds", "peak_memory_bytes")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, "mark", *costs, "time_to_lora", "memory_to_lora", "notes"])
    for row in rows:
        printed = row.published.value if row.published else None
        mean, std = mean_std(row.values) if row.records else (None, None)
        metric = row.first["metric"] if row.records else None
        what = [row.task, row.model, row.method, row.settings, row.protocol, metric]
        left = [*what, printed, mean, std, len(row.values), row.difference, row.mark]
        spent = [_mean_of(row, key) for key in costs]
        right = [row.relative("train_seconds"), row.relative("peak_memory_bytes")]
        writer.writerow(map(escape.spreadsheet, (*left, *spent, *right, "; ".join(row.footnotes))))
    return out.getvalue()


def _mean_of(row: Row, key: str) -> float | None:
    values = [record[key] for record in row.records.values() if record.get(key) is not None]
    return statistics.fmean(values) if values else None
