"""Which run a config asks for: what it runs, on which data, from which weights."""

import contextlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from flora import inputs
from flora.config import PLACES, cell_id, instantiate, recorded_cell, recorded_id, semantic_config
from flora.errors import AlreadyRunning
from flora.files import saved_weights
from flora.launch import processes
from flora.results.cells import OUTPUTS
from flora.results.store import SHIPPED, Contents, Store
from flora.training import saved
from flora.training.settings import CHECKPOINTS


@dataclass(frozen=True)
class Identity:
    """What names a run.

    Attributes:
        run_id: by all that decides the result.
        cell_id: by the settings alone, whatever the data and weights hold.
        config: the settings and ``inputs``, as the record keeps them.
        about: what a list of runs shows of one that is on: task, dataset, model, adapter and seed.
    """

    run_id: str
    cell_id: str
    config: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> inputs.Inputs:
        """What identifies the data and weights."""
        return self.config["inputs"]


def identify(cfg: DictConfig) -> Identity:
    """The run that a config asks for.

    Raises:
        ConfigError, DataError, WeightsError: it cannot be run as it stands: data or weights are not there.
    """
    data, places = Path(cfg.paths.data), list(_places(semantic_config(cfg)["model"]))

    def find() -> dict[str, Any]:
        task = instantiate(cfg.task)  # only now: what trains takes seconds to import
        model = task.network(instantiate(cfg.model))
        task.accepts(model)
        return {"dataset": task.dataset, "inputs": inputs.of(task.contents(data), model.facts)}

    found = inputs.kept(cell_id(cfg), data, places, find)
    cfg.task.dataset = found["dataset"]  # a class may know further aliases
    semantic, given = semantic_config(cfg), dict(found["inputs"])
    config = semantic | {"model": _by_cell(semantic["model"]), "inputs": given}
    if cfg.checkpoint is not None:  # what is tested counts by the cell that made it, and by what it holds
        given["checkpoint"] = saved.digest(Path(cfg.checkpoint))
        place = _cell_of(cfg.checkpoint)
        config["checkpoint"] = given["checkpoint"] if place == cfg.checkpoint else place
    model = cfg.model.get("name") or cfg.model.get("timm_name") or cfg.model["_target_"].rpartition(".")[2]
    about = {"task": cfg.task.name, "dataset": cfg.task.dataset, "model": model}
    about |= {"adapter": cfg.adapter.get("name"), "seed": cfg.seed}
    return Identity(recorded_id(config), recorded_cell(config), config, about)


def finished(identity: Identity, store: Store, cfg: DictConfig) -> tuple[dict[str, Any], Path] | None:
    """The finished record that makes a run unnecessary, and its file: the user's own, or one of ours if he asks for it.

    Raises:
        FailedBefore, DataError: as of ``Store.settled``.
    """
    places = [store, *([Store(SHIPPED)] if cfg.reuse == "reference" and not cfg.force else [])]
    for place in places:
        record = place.settled(identity.run_id, cfg.retry or place is not store, cfg.force)
        if record is not None:
            return record, place.path(identity.run_id)
    return None


def tell(store: Store, record: dict[str, Any], path: Path, folder: Path) -> Path:
    """Say what a finished record holds; returns its path. Its process may have been killed before it had tidied up."""
    if (checkpoints := folder / CHECKPOINTS).exists() and processes.first():
        with contextlib.suppress(AlreadyRunning), store.lock(record["run_id"]):  # not those of a run done again
            shutil.rmtree(checkpoints, ignore_errors=True)
    result = f"{record['dataset']} {record['model']} {record['adapter']}: test {record['metric']} {record['value']:.4f}"
    whose = "" if path.parent == store.folder else f", a record that ships with flora ({path})"
    print(f"finished before{whose}: {result} (force=true runs it again)", file=sys.stderr, flush=True)
    return path


def notes(identity: Identity, contents: Contents) -> list[str]:
    """What to say before a run that the records at hand do not make unnecessary, though some look as if they did."""
    said = []
    for record in contents.of_cell.get(identity.cell_id, []):
        if record["status"] == "finished" and (other := inputs.difference(identity.inputs, record["inputs"])):
            said.append(f"other {other} than in run {record['run_id']}: this is another run")
    return said + [problem for problem in contents.problems if "schema version 1," in problem][:1]


def _places(model: Mapping[str, Any]) -> Iterator[str]:
    """What settings of a model say of files of the user's."""
    for key, value in model.items():
        if isinstance(value, Mapping):
            yield from _places(value)
        elif key in PLACES and isinstance(value, str):
            yield value


def _by_cell(model: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model, with ``outputs/CELL_ID`` for the folder of a run: whose cell does not depend on the data."""
    return {
        key: _by_cell(value) if isinstance(value, dict) else _cell_of(value) if key in PLACES else value
        for key, value in model.items()
    }


def _cell_of(place: Any) -> Any:
    weights = saved_weights(Path(place).expanduser()) if isinstance(place, str) and place else None
    said = saved.facts(weights.parent) if weights is not None else {}
    made_by = said.get("cell_id") or said.get("run_id")  # at first both were one
    return f"{OUTPUTS}/{made_by}" if made_by else place
