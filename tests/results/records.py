"""Made-up records of a table's cells, written through the store as a run would."""

import json
from functools import cache
from typing import Any

from flora.config import composed, semantic_config
from flora.results import Record, Store
from flora.results.cells import Cell
from flora.results.record import versions

VERSIONS = versions()


def settings_of(cell: Cell) -> dict[str, Any]:
    """The config that the record of a cell holds."""
    followed = any("${seed}" in override for override in cell.overrides)
    words = tuple(o for o in cell.overrides if followed or not o.startswith("seed="))
    return json.loads(_settings(words)) | {"seed": cell.seed}


@cache
def _settings(overrides: tuple[str, ...]) -> str:
    return json.dumps(semantic_config(composed(overrides)))


def write(store: Store, cell: Cell, value: float, **changes) -> None:
    """A finished record of a cell with a chosen metric."""
    settings = settings_of(cell)
    rates = settings["protocol"]["lr_grid"] or [settings["trainer"]["lr"]]
    made = Record(
        run_id=cell.cell_id,
        method_version=1,
        task=settings["task"]["name"],
        dataset=settings["task"]["dataset"],
        model=cell.model,
        adapter=settings["adapter"]["name"],
        protocol=settings["protocol"]["name"],
        mode="train",
        seed=cell.seed,
        config=settings,
        command="python train.py",
        dtype=settings["trainer"]["dtype"],
        device="cpu",
        started="2026-01-01T00:00:00+00:00",
        commit="c0ffee",
        dirty=False,
        versions=VERSIONS,
    )
    made.status, made.metric, made.value, made.finished = "finished", "accuracy", value, "2026-01-01T00:01:40+00:00"
    made.metrics = {"accuracy": value}
    made.lr = 1e-3 if 1e-3 in rates else rates[0]
    if settings["protocol"]["lr_grid"]:
        made.selection = {"values": {f"{rate:g}": 0.5 + rate for rate in rates}, "chosen": made.lr, "seconds": 8.0}
    made.trainable_params, made.head_params, made.total_params = 50, 10, 1000
    made.train_seconds, made.examples_per_second, made.peak_memory_bytes = 2.0, 100.0, 10**6
    made.history = [{"loss": 1.0 / (step + 1), "step": step} for step in (0, 10, 20)]
    for name, changed in changes.items():
        setattr(made, name, changed)
    store.write(made)
