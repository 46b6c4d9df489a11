"""Fine-tune a pretrained model with FLoRA or a rival, and leave one record. `python train.py --help` shows how."""

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach flora.launch.entry.main, which prints one line
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hydra
from omegaconf import DictConfig

from flora.config import METHOD_VERSION, check_shape, instantiate, instantiate_method, run_id, semantic_config
from flora.errors import CheckpointError, ConfigError, DataError, ProcessLost, WeightsError, WorkerLost
from flora.launch import processes
from flora.launch.entry import main, quietly
from flora.results import Record, Store
from flora.results.record import command, device_name, now
from flora.tasks import aliases
from flora.training import saved
from flora.training.settings import CHECKPOINTS

if TYPE_CHECKING:
    from flora.tasks.base import Task


def run(cfg: DictConfig) -> Path:
    """Run what the config says, unless a finished record of the same run exists; returns the record's path."""
    check_shape(cfg)
    adapter = saved.adapter_folder(cfg.checkpoint) if cfg.mode == "eval" else None
    weights = saved.digest(adapter) if adapter else None
    if (dataset := aliases.canonical(cfg.task)) is not None:
        cfg.task.dataset = dataset  # an alias and the name it stands for are one run
    processes.start(cfg.trainer.get("device") == "cpu")
    identity = run_id(cfg, weights)
    paths = instantiate(cfg.paths)
    store = Store(paths.results)
    if done := processes.once(lambda: store.settled(identity, cfg.retry, cfg.force)):
        return finished_before(store, done, Path(paths.output) / identity)
    task = instantiate(cfg.task)  # only now: what trains takes seconds to import
    cfg.task.dataset = task.dataset  # a class may know further aliases
    identity = run_id(cfg, weights)
    folder = processes.once(lambda: paths.prepare(identity))
    with store.lock(identity) if processes.first() else contextlib.nullcontext() as lock:
        if done := processes.once(lambda: store.settled(identity, cfg.retry, cfg.force)):  # by another, since we looked
            return finished_before(store, done, folder)
        if cfg.force and processes.first():
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        record = execute(cfg, identity, task, adapter, folder, store)
        if lock is not None:
            lock.check()
            store.write(record)
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return store.path(identity)


def finished_before(store: Store, done: dict[str, Any], folder: Path) -> Path:
    """Say what a finished record holds; returns its path. Its process may have been killed before it had tidied up."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    result = f"{done['dataset']} {done['model']} {done['adapter']}: test {done['metric']} {done['value']:.4f}"
    say(f"finished before: {result} (force=true runs it again)")
    return store.path(done["run_id"])


def execute(
    cfg: DictConfig, identity: str, task: "Task[Any]", adapter: Path | None, folder: Path, store: Store
) -> Record:
    """Train, or evaluate ``adapter``; returns the finished record, or writes one of the failure."""
    from flora.training import NoLogger, Run, demand
    from flora.training.finish import finished_record
    from flora.training.loggers import about
    from flora.training.run import data_workers

    model, method = instantiate(cfg.model), instantiate_method(cfg.adapter)
    settings, protocol, logger = instantiate(cfg.trainer), instantiate(cfg.protocol), instantiate(cfg.logger)
    logger = logger if processes.first() else NoLogger()
    label = f"{task.name}/{task.dataset} {model.name} {method.name} seed {cfg.seed}"
    say(f"{label}: run {identity}")
    splits = task.load_for(model, Path(cfg.paths.data))
    analysis = dict(cfg.analysis) if cfg.analysis.every_n_steps is not None else None
    current = Run(task, model, method, settings, protocol, splits, cfg.seed, folder, analysis=analysis)
    demand.check(current)
    record = Record(
        run_id=identity,
        method_version=METHOD_VERSION,
        task=task.name,
        dataset=task.dataset,
        model=model.name,
        adapter=method.name,
        protocol=protocol.name,
        mode=cfg.mode,
        seed=cfg.seed,
        config=semantic_config(cfg),
        command=command(),
        dtype=settings.dtype,
        device=device_name(settings.device == "cpu"),
        started=now(),
        metric=task.metric,
        split="validation" if splits.test is splits.validation else "test",
        data=splits.facts,
        weights=model.facts,
        deterministic=settings.deterministic,
    )
    try:
        log = logger.run(about(record, label, cfg.table, cfg.cell, cfg.force), folder)
        with processes.together(), log as current.log, data_workers():
            if adapter is not None:
                saved.check_same_model(adapter, model.name)
                outcome = current.evaluate(adapter)
                record.adapter = saved.facts(adapter).get("adapter", method.name)
            else:
                outcome = current.train()
            current.log.result(outcome.metrics, outcome.selection, outcome.trainer.state.global_step)
            record = finished_record(record, current, outcome)
    except (ConfigError, WeightsError):
        raise  # bad input: nothing was run that a record should keep
    except (KeyboardInterrupt, CheckpointError, DataError, ProcessLost, WorkerLost, OSError) as error:
        with contextlib.suppress(OSError):  # the same command goes on from the last checkpoint
            store.end(record, "interrupted", error)
        raise
    except Exception as error:
        if path := store.end(record, "failed", error):
            say(f"failed: {error} (record: {path})")
        raise
    if processes.first():
        say(f"{label}: test {record.metric} {record.value:.4f} ({record.trainable_params:,} trainable parameters)")
    return record


def say(text: str) -> None:
    """A line on stderr; stdout is for the record's path."""
    print(text, file=sys.stderr, flush=True)


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent / "configs"), config_name="train")
def job(cfg: DictConfig) -> None:
    """One run; prints the record's path as the last line of stdout."""
    with quietly():
        print(f"record: {run(cfg)}", flush=True)


if __name__ == "__main__":
    main(job, trace=lambda: any(a == "debug=trace" for a in sys.argv))
