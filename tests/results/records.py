"""Made-up records of a table's cells, written through the store as a run would."""

from flora.results import Record, Store
from flora.results.cells import Cell


def write(store: Store, cell: Cell, value: float, **changes) -> None:
    """A finished record of a cell with a chosen metric."""
    made = Record(
        run_id=cell.run_id,
        method_version=1,
        task="vtab",
        dataset=cell.task,
        model=cell.model,
        adapter=cell.method,
        protocol="vtab1k",
        mode="train",
        seed=cell.seed,
        config={},
        command="python train.py",
        dtype="fp32",
        device="cpu",
        started="2026-01-01T00:00:00+00:00",
    )
    made.status, made.metric, made.value, made.finished = "finished", "accuracy", value, "2026-01-01T00:01:40+00:00"
    made.lr, made.trainable_params, made.head_params, made.total_params = 1e-3, 50, 10, 1000
    made.train_seconds, made.examples_per_second, made.peak_memory_bytes = 2.0, 100.0, 10**6
    made.history = [{"loss": 1.0 / (step + 1), "step": step} for step in (0, 10, 20)]
    made.commit, made.dirty = "c0ffee", False
    for name, changed in changes.items():
        setattr(made, name, changed)
    store.write(made)
