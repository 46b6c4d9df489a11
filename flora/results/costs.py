"""Table 5 of the paper from the benchmarks: a step's time, examples a second, memory, and merged inference."""

from collections.abc import Sequence
from typing import Any

from flora.results import escape
from flora.results.markdown import DASH, formatted, markdown_table

_HEAD = (
    "network",
    "steps",
    "method",
    "ms a step",
    "examples/s",
    "peak GB",
    "trained",
    "x LoRA's time",
    "x LoRA's memory",
)
_INFERENCE = {  # columns, and the rows of bench_infer.py that they show; adapted: FLoRA's in the first records
    "merged": ("merged",),
    "FLoRA unmerged": ("flora", "adapted"),
    "kept": ("flora_kept",),
    "LoRA unmerged": ("lora",),
}
_NOTES = (
    "forward and backward of one batch, the optimiser left out; ms: median, ± interquartile range; examples/s: batch"
    " over that time; memory: the GPU allocator's peak",
    "adapters have the parameters of LoRA of the rank named (bench_step.py --match); full trains everything",
    "networks have random weights and inputs; spreads, commands and commits stand in step_cost",
    "merged: the adapter merged into the weights, as a multiple of the base model's time; unmerged: beside the weights,"
    " within flora.batched; kept: within flora.batched(model, keep=1)",
    "published: the paper's Table 5 was never found; a review reads FLoRA as cheaper than DoRA in time and memory",
)


def markdown(measured: Sequence[dict[str, Any]]) -> str:
    """The table; empty where no step was measured at equal parameters on a GPU."""
    steps = [r for r in measured if r["benchmark"] == "step" and r["match"] and not str(r["device"]).startswith("cpu")]
    if not steps:
        return ""
    body = [line for result in steps for line in _lines(result)]
    lines = ["# Training time and memory at equal parameters, and inference", "", *markdown_table(_HEAD, body)]
    merged = [(r, {row["method"]: row for row in r["rows"]}) for r in measured if r["benchmark"] == "infer"]
    if merged:
        shown = [
            [_network(result), *(formatted(_ratio(rows, *names), ".3f") for names in _INFERENCE.values())]
            for result, rows in merged
        ]
        lines += ["", *markdown_table(["network", *(f"{name}, x base" for name in _INFERENCE)], shown, numbers=True)]
    devices = sorted({str(result["device"]) for result in (*steps, *(r for r, _ in merged))})
    notes = [*_NOTES, f"device: {'; '.join(devices)}", "a dash: not measured"]
    return "\n".join([*lines, "", *(f"- {escape.markdown(note)}" for note in notes)]) + "\n"


def _ratio(rows: dict[str, Any], *names: str) -> float | None:
    return next((rows[name].get("ratio") for name in names if name in rows), None)


def _network(result: dict[str, Any]) -> str:
    of = f"{result['size']} px" if result.get("size") else f"{result['tokens']} tokens" if result.get("tokens") else ""
    rank = f"r {result['r']}" if "r" in result else ""
    return ", ".join(word for word in (result["model"], f"batch {result['batch']}", of, result["dtype"], rank) if word)


def _lines(result: dict[str, Any]) -> list[list[str]]:
    """A line for each method that ran: floors are no methods."""
    rows = [row for row in result["rows"] if not row["method"].startswith("floor")]
    lora: dict[str, Any] = next((row for row in rows if row["method"] == "lora"), {})
    lines = []
    for row in rows:
        ms, peak = row.get("ms"), row.get("peak_bytes")
        time = None if not ms or not lora.get("ms") else ms / lora["ms"]
        memory = None if not peak or not lora.get("peak_bytes") else peak / lora["peak_bytes"]
        shown = [f"{ms:.2f} ± {row['ms_spread']:.2f}" if ms else DASH]
        shown += [formatted(1000 * result["batch"] / ms if ms else None, ",.0f")]
        shown += [formatted(peak / 1e9 if peak else None, ".2f"), formatted(row["trainable_params"], ",d")]
        shown += [formatted(time, ".2f"), formatted(memory, ".2f")]
        lines.append([_network(result), "captured" if result["captured"] else "eager", row["method"], *shown])
    return lines
