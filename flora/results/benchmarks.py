"""The table of step costs: what the benchmark scripts wrote to results/benchmarks, as Markdown and CSV."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flora.errors import DataError
from flora.results import costs
from flora.results.escape import code, spreadsheet
from flora.results.escape import markdown as escaped
from flora.results.markdown import formatted, markdown_table

SETTINGS = (
    "model",
    "batch",
    "size",
    "tokens",
    "dtype",
    "captured",
    "channels_last",
    "layers",
    "match",
    "r",
    "kernel_rank",
)
TITLES = {
    "step": "Forward and backward",
    "infer": "Inference with the adapter merged",
    "train": "train.py from end to end",
    "dense": "Segmentation and detection, train.py from end to end",
    "start": "A start from gradients",
}
_COLUMNS = {
    "step": ("method", "ms", "spread", "x floor", "x LoRA", "peak GB", "layers", "trainable params"),
    "infer": ("model", "ms", "spread", "x base", "spread"),
    "train": ("method", "train.py, examples/s", "spread", "bare step, examples/s", "spread", "share"),
    "dense": ("method", "train.py, images/s", "spread", "bare step, images/s", "spread", "share", "bare step x LoRA"),
    "start": ("method", "batches", "seconds", "peak GB", "share kept"),
}


def read(folder: Path) -> list[dict[str, Any]]:
    """Every result in a folder, ordered by benchmark and by the name of its file, kept under ``file``.

    Raises:
        DataError: a file that no benchmark script wrote.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            result: Any = json.loads(path.read_text()) if path.is_file() else None
            results.append((list(TITLES).index(result["benchmark"]), path.name, result | {"file": path.name}))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path}: not the result of a benchmark ({type(error).__name__}); remove it") from error
    return [result for _, _, result in sorted(results, key=lambda entry: entry[:2])]


def rendered(results: Path) -> dict[Path, str]:
    """The files made of ``results/benchmarks``: text by path; nothing where nothing was measured."""
    measured = read(results / "benchmarks")
    stem = results / "tables" / "step_cost"
    if not measured:
        return {}
    texts = {stem.with_suffix(".md"): markdown(measured), stem.with_suffix(".csv"): as_csv(measured)}
    table_5 = costs.markdown(measured)
    return texts | ({results / "tables" / "table5_cost.md": table_5} if table_5 else {})


def markdown(measured: Sequence[dict[str, Any]]) -> str:
    """A section per benchmark, a table per file, and below each where it was measured."""
    lines = ["# What a step costs", "", *_notes()]
    lines += [f"- {escaped(line)}" for line in speedups(measured)]
    for benchmark, title in TITLES.items():
        results = [result for result in measured if result["benchmark"] == benchmark]
        lines += ["", f"## {title}"] if results else []
        for result in results:
            lines += ["", f"### {escaped(heading(result))}", "", *_table(result), "", *_source(result)]
    return "\n".join(lines) + "\n"


def _notes() -> list[str]:
    return [
        "- forward and backward without optimiser, in rounds of random order, on a GPU every method alone on the"
        " device (--stay: models stay there, so that turns are short and a busy host disturbs all alike); medians,"
        " spread: interquartile range",
        "- floor: the frozen model (fp32 weights under autocast; a causal language model's in the compute dtype) with"
        " gradients through every activation and to the output of every layer that LoRA adapts; floor_cast: weights"
        " of linear layers and convolutions cast beforehand",
        "- LoRA is PEFT's, which leaves depthwise and grouped convolutions out; full trains the head and all else;"
        " dense: as the published code runs its layers",
        "- weights and data are random; peak: the GPU allocator's, - on a CPU",
    ]


def speedups(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Geometric means of LoRA's time over FLoRA's, by device, capture and way of choosing ranks."""
    groups: dict[tuple[str, bool, bool, str], list[float]] = {}
    for result in measured:
        times = _times(result) if result["benchmark"] == "step" else {}
        if "lora" in times and "flora" in times:
            key = (result["device"], result["captured"], result["match"], result["layers"])
            groups.setdefault(key, []).append(times["lora"] / times["flora"])
    lines = []
    for (device, captured, match, layers), ratios in sorted(groups.items()):
        mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
        how = [device, "captured" if captured else "eager", "equal parameters" if match else "equal r"]
        how += ["same layers"] if layers == "common" else []
        lines.append(f"FLoRA is x{mean:.2f} as fast as LoRA, geometric mean of {len(ratios)} ({', '.join(how)})")
    return lines


def heading(result: dict[str, Any]) -> str:
    """What was run, in words."""
    words = [f"{result['task']}{' with masks' if result['masks'] else ''}"] if "task" in result else []
    words += [f"{result['model']}, batch {result['batch']}"]
    words += [f"{result['size']} px"] if result.get("size") else []
    words += [f"{result['tokens']} tokens"] if result.get("tokens") else []
    words += [result["dtype"], f"r {result['r']}"]
    words += [f"kernel rank {result['kernel_rank']}"] if result.get("size") else []
    words += ["FLoRA with LoRA's number of parameters"] if result.get("match") else []
    words += ["layers that LoRA can adapt"] if result.get("layers") == "common" else []
    words += ["channels last"] if result.get("channels_last") else []
    words += ["gradient checkpointing"] if result.get("gradient_checkpointing") else []
    words += [", ".join(f"trainer.{key}={value}" for key, value in result.get("trainer", {}).items())]
    words += ["one CUDA graph"] if result.get("captured") else []
    return ", ".join(word for word in words if word)


def _table(result: dict[str, Any]) -> list[str]:
    benchmark = result["benchmark"]
    columns = _COLUMNS[benchmark]
    of = {"step": _step_cells, "infer": _infer_cells, "train": _train_cells, "start": _start_cells}
    return markdown_table(columns, (of | {"dense": _dense_cells})[benchmark](result), numbers=True)


def _step_cells(result: dict[str, Any]) -> list[list[str]]:
    lora = _times(result).get("lora")
    rows = []
    for row in result["rows"]:
        peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 1e9
        against_lora = row["ms"] / lora if lora and row["ms"] else None
        cells = [(row["ms"], ".2f"), (row["ms_spread"], ".2f"), (row["ratio"], ".2f"), (against_lora, ".2f")]
        cells += [(peak, ".2f"), (row["layers"], "d"), (row["trainable_params"], ",d")]
        rows.append([row["method"], *(formatted(value, spec) for value, spec in cells)])
    return rows


def _infer_cells(result: dict[str, Any]) -> list[list[str]]:
    keys = ("ms", "ms_spread", "ratio", "ratio_spread")
    return [[row["method"], *(f"{row[key]:.3f}" for key in keys)] for row in result["rows"]]


def _train_cells(result: dict[str, Any]) -> list[list[str]]:
    specs = {"train": ",.0f", "train_spread": ",.0f", "bare": ",.0f", "bare_spread": ",.0f", "share": ".3f"}
    return [[row["method"], *(formatted(row[key], spec) for key, spec in specs.items())] for row in result["rows"]]


def _dense_cells(result: dict[str, Any]) -> list[list[str]]:
    lora = next((row["bare"] for row in result["rows"] if row["method"] == "lora"), None)
    beside = [formatted(lora / row["bare"] if lora else None, ".3f") for row in result["rows"]]
    return [[*cells, times] for cells, times in zip(_train_cells(result), beside, strict=True)]


def _start_cells(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for row in result["rows"]:
        peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 1e9
        cells: list[tuple[Any, str]] = [
            (result["batches"], "d"),
            (row["seconds"], ".2f"),
            (peak, ".2f"),
            (row.get("kept"), ".3f"),
        ]
        rows.append([row["method"], *(formatted(value, spec) for value, spec in cells)])
    return rows


def _source(result: dict[str, Any]) -> list[str]:
    lines = [f"{row['method']}: {row['error']}" for row in result["rows"] if row.get("error")]
    if result["benchmark"] == "infer":
        lines.append(f"merged against adapted outputs: {result['difference']:.1e} of the largest")
        export = result.get("export")
        if export:
            ends = f"passes, outputs equal to {export['difference']:.1e}" if export["passed"] else export["error"]
            base = "" if export["passed"] else f"; the base model {'passes' if export['base_passed'] else 'fails too'}"
            lines.append(f"torch.export of the merged model: {ends}{base}")
    dirty = ", with uncommitted changes" if result["dirty"] else ""
    several = f"{result['processes']} processes, " if result.get("processes", 1) > 1 else ""
    several += f"{result['cpus']} CPU cores, " if "cpus" in result else ""
    where = f"{several}{result['device']}, torch {result['torch']}, commit {str(result['commit'])[:12]}{dirty}"
    return [f"- {line}" for line in (*map(escaped, (*lines, where)), code(str(result["command"])))]


def _times(result: dict[str, Any]) -> dict[str, float]:
    return {row["method"]: row["ms"] for row in result["rows"] if row.get("ms")}


def as_csv(measured: Sequence[dict[str, Any]]) -> str:
    """Every number unrounded, one line per method and file."""
    facts = ("file", "benchmark", "device", "torch", "commit", *SETTINGS)
    costs = ("ms", "ms_spread", "ratio", "ratio_spread", "peak_bytes", "trainable_params")
    numbers = (*costs, "train", "train_spread", "bare", "bare_spread", "share", "seconds", "kept", "error")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*facts, "method", "adapted_layers", *numbers])
    for result in measured:
        head = [result.get(key) for key in facts]
        for row in result["rows"]:
            cells = [*head, row["method"], row.get("layers"), *(row.get(key) for key in numbers)]
            writer.writerow(map(spreadsheet, cells))
    return out.getvalue()
