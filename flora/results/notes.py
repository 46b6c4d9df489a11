"""What stands below a table: how to read it, what varies, and where its numbers come from."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from flora.results.cells import Table
from flora.results.rows import Row, digest
from flora.results.validation import DEVELOPMENT, NOTE

_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def notes(table: Table, rows: Sequence[Row]) -> list[str]:
    """What every table ends with, and what its file says of it."""
    records = [record for row in rows if not row.chosen for record in row.records.values()]
    lines = [
        *stated(table, rows),
        "ours: mean ± sample standard deviation over n seeds; adapter params leave the head out",
        *_varying(rows),
        "bold: highest mean of its task, model and protocol; *: not told from it by a two-sided t-test paired over"
        " seeds (Holm-corrected over the methods, p > 0.05; few seeds tell little apart); nothing is marked where a run"
        " is missing, or where there is one seed, or not the same seeds",
        "time and memory: as each run measured them, beside LoRA's runs on the same kind of device, eager or captured"
        " as CUDA graphs like them; runs that shared a device (reproduce.py --jobs) slowed each other down, so these"
        " ratios are a rough guide and no benchmark",
    ]
    lines += _published(rows)
    if not records:
        return [*lines, "no run of this table is finished"]

    def all_of(key: str) -> str:
        found = sorted({str(r.get(key)) for r in records})
        return (f"{len(found)} of them, " if len(found) > 1 else "") + "; ".join(found)

    packages = sorted({f"{name} {number}" for r in records for name, number in r["versions"].items()})
    dirty = " (some with uncommitted changes)" if any(r.get("dirty") for r in records) else ""
    return [
        *lines,
        f"commit: {all_of('commit')}{dirty}",
        f"device: {all_of('device')}; steps: {_steps(records)}",
        f"rates, epochs and training data chosen by protocol: {all_of('protocol')}; dtype: {all_of('dtype')}",
        f"versions: {', '.join(packages)}",
        f"records: {len(records)}, sha256 {digest(records)}",
    ]


def stated(table: Table, rows: Sequence[Row]) -> list[str]:
    """What the table's file says of it, then the footnotes of its rows, each with its mark."""
    footnotes = [f"{marker([number])} {text}" for text, number in _numbers(rows).items()]
    return [*table.notes, *([NOTE] if table.split == "validation" else _development(rows)), *footnotes]


def markers(rows: Sequence[Row]) -> list[str]:
    """The marks of each row's footnotes, for behind its name."""
    numbers = _numbers(rows)
    return [marker([numbers[text] for text in row.footnotes]) for row in rows]


def marker(numbers: Iterable[int]) -> str:
    """Numbers of footnotes, raised."""
    return " ".join(str(number).translate(_SUPERSCRIPTS) for number in numbers)


def _numbers(rows: Sequence[Row]) -> dict[str, int]:
    texts = dict.fromkeys(text for row in rows for text in row.footnotes)
    return {text: number for number, text in enumerate(texts, 1)}


def _varying(rows: Sequence[Row]) -> list[str]:
    """What differs between the seeds that a deviation is over: the draw of the data too, where it follows the seed."""
    tasks: dict[str, dict[str, None]] = {}
    for row in (row for row in rows if len(row.records) > 1):
        rules = sorted({str(record.get("split_rule") or "") for record in row.records.values()})
        if len(rules) > 1:
            what = "the seed of training and the draw of the data"
        elif not rules[0]:
            what = "the seed of training; the records do not say how the data was drawn"
        else:
            once = "the data is drawn once" if "seed" in rules[0] else "the splits are fixed"
            what = f"the seed of training alone, as {once} ({rules[0]})"
        tasks.setdefault(what, {})[row.task] = None
    return [f"± of {', '.join(names)}: {what}" for what, names in tasks.items()]


def _development(rows: Sequence[Row]) -> list[str]:
    """That FLoRA was tuned on some of the data sets whose test values are shown."""
    shown = [name for name in DEVELOPMENT if any(row.task == name and row.records for row in rows)]
    if not shown:
        return []
    what = "a development set" if len(shown) == 1 else "development sets"
    return [f"{what}: {', '.join(shown)}; defaults of FLoRA were chosen on validation splits of these"]


def _steps(records: Sequence[dict[str, Any]]) -> str:
    """How many runs replayed their steps as CUDA graphs (``trainer.cuda_graph``)."""
    words = {True: "captured as CUDA graphs", False: "eager", None: "not recorded whether captured"}
    counted = Counter(words[(record.get("execution") or {}).get("cuda_graph")] for record in records)
    if len(counted) == 1:
        return next(iter(counted))
    return ", ".join(f"{count} runs {word}" for word, count in sorted(counted.items()))


def _published(rows: Sequence[Row]) -> list[str]:
    shown = [row for row in rows if row.published]
    sources = sorted({f"{r.published.source} ({r.published.confidence})" for r in shown if r.published})
    lines = [f"published: {'; '.join(sources)}"] if sources else []
    return lines + [f"{r.task} {r.name}: {r.published.note}" for r in shown if r.published and r.published.note]
