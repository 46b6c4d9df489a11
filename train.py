"""Fine-tune a pretrained model with FLoRA or a rival, and leave one record. `python train.py --help` shows how."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a trace what has not begun
os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach flora.launch.entry.main, which prints one line
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from flora.config import check_shape, instantiate, instantiate_method, run_id
from flora.errors import MENDABLE, AlreadyRunning, ConfigError, WeightsError, enough_memory
from flora.launch import processes
from flora.launch.entry import main, quietly
from flora.results import Record, Store
from flora.results.lock import Claim
from flora.tasks import aliases
from flora.training import saved
from flora.training.settings import CHECKPOINTS
from flora.training.tested import Tested, as_trained


def run(cfg: DictConfig, typed: Sequence[str] | None = None) -> Path:
    """Run what the config says, unless a finished record of the same run exists; returns the record's path.

    A saved run is tested, and predicts, under its own config but for the overrides ``typed``; None: under this one.
    """
    check_shape(cfg)
    tested = as_trained(cfg, typed) if cfg.mode != "train" else None
    cfg = tested.cfg if tested else cfg
    check_shape(cfg)
    if tested and cfg.mode == "predict":
        from flora.predict.command import predict

        return predict(tested)
    weights = saved.digest(tested.folder, tested.model) if tested else None
    cfg.checkpoint = weights  # what is tested counts by what it holds
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
    with contextlib.ExitStack() as locked:
        claim = processes.once(lambda: locked.enter_context(store.lock(identity)))
        if done := processes.once(lambda: store.settled(identity, cfg.retry, cfg.force)):  # by another, since we looked
            locked.close()
            return finished_before(store, done, folder)
        if cfg.force and processes.first():
            from flora.training.progress import Checkpoints

            Checkpoints(folder / CHECKPOINTS).remove()
        record = execute(cfg, identity, task, tested, folder, store, claim)
        if processes.first():
            store.write(record, claim)
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return store.path(identity)


def finished_before(store: Store, done: dict[str, Any], folder: Path) -> Path:
    """Say what a finished record holds; returns its path. Its process may have been killed before it had tidied up."""
    if (checkpoints := folder / CHECKPOINTS).exists() and processes.first():
        with contextlib.suppress(AlreadyRunning), store.lock(done["run_id"]):  # not those of a run that is done again
            shutil.rmtree(checkpoints, ignore_errors=True)
    result = f"{done['dataset']} {done['model']} {done['adapter']}: test {done['metric']} {done['value']:.4f}"
    say(f"finished before: {result} (force=true runs it again)")
    return store.path(done["run_id"])


def execute(
    cfg: DictConfig, identity: str, task: Any, tested: Tested | None, folder: Path, store: Store, claim: Claim
) -> Record:
    """Train, or evaluate what was saved; returns the finished record, or writes one of the failure."""
    from flora.training import NoLogger, Run, demand
    from flora.training.finish import begun_record, finished_record
    from flora.training.loggers import about, opened
    from flora.training.run import data_workers

    model, method = instantiate(cfg.model), instantiate_method(cfg.adapter)
    settings, protocol, logger = instantiate(cfg.trainer), instantiate(cfg.protocol), instantiate(cfg.logger)
    logger = logger if processes.first() else NoLogger()
    label = f"{task.name}/{task.dataset} {model.name} {method.name} seed {cfg.seed}"
    say(f"{label}: run {identity}")
    splits = task.load_for(model, Path(cfg.paths.data))
    analysis = dict(cfg.analysis) if cfg.analysis.every_n_steps is not None else None
    current = Run(task, model, method, settings, protocol, splits, cfg.seed, folder, None, claim, analysis)
    demand.check(current)
    record = begun_record(cfg, identity, current, tested)
    try:
        log = opened(logger, about(record, label, cfg.table, cfg.cell, cfg.force), folder)
        with enough_memory(), processes.together(), log as current.log, data_workers():
            if tested:
                tested.check(model, method)
                record.execution = {"set_anew": tested.anew} if tested.anew else {}
                outcome = current.evaluate(tested.folder, method.name)
            else:
                outcome = current.train()
            current.log.result(outcome.metrics, outcome.selection, outcome.trainer.state.global_step)
            record = finished_record(record, current, outcome, cfg)
    except (AlreadyRunning, ConfigError, WeightsError):
        raise  # another's run now, or bad input: nothing was run that a record should keep
    except (KeyboardInterrupt, OSError, *MENDABLE) as error:
        store.end(record, "interrupted", error, claim)  # the same command goes on from the last checkpoint
        raise
    except Exception as error:
        if path := store.end(record, "failed", error, claim):
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
        path = run(cfg, HydraConfig.get().overrides.task)
        print(f"{'predictions' if cfg.mode == 'predict' else 'record'}: {path}", flush=True)


if __name__ == "__main__":
    main(job, trace=lambda: any(a == "debug=trace" for a in sys.argv))
