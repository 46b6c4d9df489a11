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
    "compiled",
    "channels_last",
    "layers",
    "match",
    "r",
    "kernel_rank",
)
TITLES = {
    "step": "Forward and backward",
    "infer": "Inference",
    "train": "train.py beside its bare step",
    "dense": "Segmentation and detection, train.py beside its bare step",
    "end_to_end": "train.py beside other trainers, from start to end",
    "start": "A start from gradients",
}
_COLUMNS = {
    "step": ("method", "ms", "spread", "x floor", "x LoRA", "peak GB", "layers", "trainable params"),
    "infer": ("model", "ms", "spread", "x base", "spread", "x LoRA", "spread", "kept MB", "differs by"),
    "train": ("method", "train.py, examples/s", "spread", "bare step, examples/s", "spread", "share"),
    "dense": ("method", "train.py, images/s", "spread", "bare step, images/s", "spread", "share", "bare step x LoRA"),
    "end_to_end": (
        *("trainer", "examples/s", "spread", "x transformers", "x timm", "seconds in all", "spread", "CPU seconds"),
        *("peak GB", "accuracy", "trainable params"),
    ),
    "start": ("method", "batches", "seconds", "peak GB", "share kept"),
}
_ENDS = {True: ("", " through torch.compile"), False: ("",)}  # sections of a benchmark: eager results, compiled ones
_COMPILED = ("compile s", "graphs", "graph breaks")


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
    sections = [(f"{title}{end}", name, bool(end)) for name, title in TITLES.items() for end in _ENDS[name == "step"]]
    for title, benchmark, compiled in sections:
        results = [result for result in measured if result["benchmark"] == benchmark]
        results = [result for result in results if bool(result.get("compiled")) == compiled]
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
        "- through torch.compile, every method is compiled, the floor too; compile s: wall time of the first steps, up"
        " to the last that took more than twice a later one, in this process; graphs: of the forward pass",
        "- inference: live adapters of LoRA and FLoRA, in torch.inference_mode; flora_alone: every layer builds its"
        " weight in every pass; flora: within flora.batched, entered for every pass; flora_kept: within one"
        " flora.batched(model, keep=...) around all passes, kept MB being what stays on the GPU for it;"
        " flora_factored: the same with forward=factored; several adapters take turns, set_adapter included; differs"
        " by: from merged, of the largest logit",
        "- weights and data are random; peak: the GPU allocator's, - on a CPU",
    ]


def speedups(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Geometric means of LoRA's time over FLoRA's, by device, way of running and way of choosing ranks."""
    groups: dict[tuple[str, bool, str, bool, str], list[float]] = {}
    for result in measured:
        times = _times(result) if result["benchmark"] == "step" else {}
        if "lora" in times and "flora" in times:
            if result.get("quantize") or result.get("gradient_checkpointing"):
                continue
            compiled = result.get("compiled") or ""
            key = (result["device"], result["captured"], compiled, result["match"], result["layers"])
            groups.setdefault(key, []).append(times["lora"] / times["flora"])
    lines = []
    for (device, captured, compiled, match, layers), ratios in sorted(groups.items()):
        mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
        steps = "captured" if captured else f"torch.compile {compiled}" if compiled else "eager"
        how = [device, steps, "equal parameters" if match else "equal r"]
        how += ["same layers"] if layers == "common" else []
        lines.append(f"FLoRA is x{mean:.2f} as fast as LoRA, geometric mean of {len(ratios)} ({', '.join(how)})")
    return lines


def beside_each_other(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of a benchmark of several runs, each run's times as multiples of the floor's, and LoRA's as those of FLoRA's."""
    runs = {row["method"]: row["ms_runs"] for row in rows if len(row.get("ms_runs", ())) > 1}
    pairs = [(name, "floor") for name in runs if name != "floor"] + [("lora", "flora")]
    lines = []
    for one, other in pairs:
        if one in runs and other in runs:
            ratios = [ours / theirs for ours, theirs in zip(runs[one], runs[other], strict=False)]
            lines.append(f"runs, {one} / {other}: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
    return lines


def heading(result: dict[str, Any]) -> str:
    """What was run, in words."""
    words = [f"{result['task']}{' with masks' if result['masks'] else ''}"] if "task" in result else []
    words += [f"{result['model']}, batch {result['batch']}"]
    words += [f"{result['size']} px"] if result.get("size") else []
    words += [f"{result['tokens']} tokens"] if result.get("tokens") else []
    words += [f"{result['dataset']}, {result['steps']} steps"] if result["benchmark"] == "end_to_end" else []
    words += [result["dtype"], f"r {result['r']}"]
    words += [f"kernel rank {result['kernel_rank']}"] if result.get("size") else []
    words += ["FLoRA with LoRA's number of parameters"] if result.get("match") else []
    words += ["layers that LoRA can adapt"] if result.get("layers") == "common" else []
    words += ["channels last"] if result.get("channels_last") else []
    words += ["weights cast"] if result.get("cast") else []
    words += [f"{result['adapters']} adapters in turn"] if result.get("adapters", 1) > 1 else []
    words += [f"frozen weights in {result['quantize']}"] if result.get("quantize") else []
    words += ["gradient checkpointing"] if result.get("gradient_checkpointing") else []
    words += [", ".join(f"trainer.{key}={value}" for key, value in result.get("trainer", {}).items())]
    words += ["one CUDA graph"] if result.get("captured") else []
    words += [f"mode {result['compiled']}"] if result.get("compiled") else []
    return ", ".join(word for word in words if word)


def _table(result: dict[str, Any]) -> list[str]:
    benchmark = result["benchmark"]
    columns = (*_COLUMNS[benchmark], *(_COMPILED if result.get("compiled") else ()))
    of = {"step": _step_cells, "infer": _infer_cells, "train": _train_cells, "start": _start_cells}
    of |= {"dense": _dense_cells, "end_to_end": _end_to_end_cells}
    return markdown_table(columns, of[benchmark](result), numbers=True)


def _step_cells(result: dict[str, Any]) -> list[list[str]]:
    lora = _times(result).get("lora")
    rows = []
    for row in result["rows"]:
        peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 1e9
        against_lora = row["ms"] / lora if lora and row["ms"] else None
        cells = [(row["ms"], ".2f"), (row["ms_spread"], ".2f"), (row["ratio"], ".2f"), (against_lora, ".2f")]
        cells += [(peak, ".2f"), (row["layers"], "d"), (row["trainable_params"], ",d")]
        if result.get("compiled"):
            cells += [(row.get("compile_seconds"), ".1f"), (row.get("graphs"), "d"), (row.get("graph_breaks"), "d")]
        rows.append([row["method"], *(formatted(value, spec) for value, spec in cells)])
    return rows


def _infer_cells(result: dict[str, Any]) -> list[list[str]]:
    keys = ("ms", "ms_spread", "ratio", "ratio_spread", "lora_ratio", "lora_ratio_spread")
    rows = []
    for row in result["rows"]:
        kept = None if row.get("kept_bytes") is None else row["kept_bytes"] / 1e6
        cells = [*(formatted(row.get(key), ".3f") for key in keys), formatted(kept, ".1f")]
        rows.append([row["method"], *cells, formatted(row.get("difference"), ".1e")])
    return rows


def _train_cells(result: dict[str, Any]) -> list[list[str]]:
    specs = {"train": ",.0f", "train_spread": ",.0f", "bare": ",.0f", "bare_spread": ",.0f", "share": ".3f"}
    return [[row["method"], *(formatted(row[key], spec) for key, spec in specs.items())] for row in result["rows"]]


def _dense_cells(result: dict[str, Any]) -> list[list[str]]:
    lora = next((row["bare"] for row in result["rows"] if row["method"] == "lora"), None)
    beside = [formatted(lora / row["bare"] if lora and row["bare"] else None, ".3f") for row in result["rows"]]
    return [[*cells, times] for cells, times in zip(_train_cells(result), beside, strict=True)]


TRAINERS = {
    "flora": "train.py, FLoRA",
    "lora": "train.py, LoRA",
    "huggingface": "transformers' Trainer, PEFT's LoRA",
    "timm": "timm's loop, PEFT's LoRA",
}


def _end_to_end_cells(result: dict[str, Any]) -> list[list[str]]:
    rates = {row["method"]: row.get("train") for row in result["rows"]}
    rows = []
    for row in result["rows"]:
        rate, peak = row.get("train"), row.get("peak_bytes")
        beside = [rate / rates[name] if rate and rates.get(name) else None for name in ("huggingface", "timm")]
        cells = [(rate, ",.0f"), (row.get("train_spread"), ",.0f"), *((share, ".2f") for share in beside)]
        cells += [(row.get(key), ".1f") for key in ("seconds", "seconds_spread", "cpu_seconds")]
        cells += [(peak and peak / 1e9, ".2f"), (row.get("value"), ".4f"), (row.get("trainable_params"), ",d")]
        rows.append([TRAINERS[row["method"]], *(formatted(value, spec) for value, spec in cells)])
    return rows


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
    lines += ["stopped before all rounds were done"] if result.get("stopped") else []
    lines += beside_each_other(result["rows"])
    if result["benchmark"] == "infer" and "difference" in result:  # until 0.2: merged, and by torch.export alone
        lines.append(f"merged against adapted outputs: {result['difference']:.1e} of the largest")
        export = result.get("export")
        if export:
            ends = f"passes, outputs equal to {export['difference']:.1e}" if export["passed"] else export["error"]
            base = "" if export["passed"] else f"; the base model {'passes' if export['base_passed'] else 'fails too'}"
            lines.append(f"torch.export of the merged model: {ends}{base}")
    for row in result.get("programs", ()):
        ended = row.get("error") or f"logits on a CPU equal to {row['difference']:.1e} of the largest"
        lines.append(f"{row['to']} of {row['method']}: {ended}")
    lines += [f"weights: {result['weights']}"] if "weights" in result else []
    dirty = ", with uncommitted changes" if result["dirty"] else ""
    several = f"{result['processes']} processes, " if result.get("processes", 1) > 1 else ""
    several += f"{result['cpus']} CPU cores, " if "cpus" in result else ""
    several += f"{result['workers']} that load images, " if "workers" in result and result.get("size") else ""
    where = f"{several}{result['device']}, torch {result['torch']}, commit {str(result['commit'])[:12]}{dirty}"
    return [f"- {line}" for line in (*map(escaped, (*lines, where)), code(str(result["command"])))]


def _times(result: dict[str, Any]) -> dict[str, float]:
    return {row["method"]: row["ms"] for row in result["rows"] if row.get("ms")}


def as_csv(measured: Sequence[dict[str, Any]]) -> str:
    """Every number unrounded, one line per method and file."""
    facts = ("file", "benchmark", "device", "torch", "commit", *SETTINGS)
    costs = ("ms", "ms_spread", "ratio", "ratio_spread", "peak_bytes", "trainable_params")
    rates = (
        *("train", "train_spread", "bare", "bare_spread", "share"),
        *("seconds", "seconds_spread", "cpu_seconds", "value", "kept"),
    )
    numbers = (*costs, *rates, "compile_seconds", "graphs", "graph_breaks", "error")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*facts, "method", "adapted_layers", *numbers])
    for result in measured:
        head = [result.get(key) for key in facts]
        for row in result["rows"]:
            cells = [*head, row["method"], row.get("layers"), *(row.get(key) for key in numbers)]
            writer.writerow(map(spreadsheet, cells))
    return out.getvalue()
