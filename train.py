"""Fine-tune a pretrained model with FLoRA or a rival, and leave one record. `python train.py --help` shows how."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a trace what has not begun
os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach flora.launch.entry.main, which prints one line
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import flora.launch.installed  # noqa: F401

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from flora.config import check_shape, idle, instantiate, instantiate_method, unread
from flora.errors import MENDABLE, AlreadyRunning, ConfigError, WeightsError, enough_memory
from flora.launch import processes
from flora.launch.entry import main, quietly
from flora.results import Record, Store
from flora.results.lock import Claim
from flora.results.record import named
from flora.tasks import aliases
from flora.training import identity
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
    cfg.checkpoint = str(tested.folder) if tested else None
    if (dataset := aliases.canonical(cfg.task)) is not None:
        cfg.task.dataset = dataset  # an alias and the name it stands for are one run
    processes.start(cfg.trainer.get("device") == "cpu")
    for word in () if tested else idle(cfg, typed or ()):
        say(f"warning: {word}: neither adapter.init nor adapter.allocation is gradient, so nothing reads it")
    paths = instantiate(cfg.paths)
    store = Store(paths.results)
    asked = processes.once(lambda: identity.identify(cfg))
    if done := processes.once(lambda: identity.finished(asked, store, cfg)):
        return identity.tell(store, *done, Path(paths.output) / asked.run_id)
    for note in processes.once(lambda: identity.notes(asked, store.read_all())):
        say(note)
    folder = processes.once(lambda: paths.prepare(asked.run_id))
    with contextlib.ExitStack() as locked:
        claim = processes.once(lambda: locked.enter_context(store.lock(asked.run_id, asked.cell_id, asked.about)))
        if done := processes.once(lambda: identity.finished(asked, store, cfg)):  # by another, since we looked
            locked.close()
            return identity.tell(store, *done, folder)
        if cfg.force and processes.first():
            from flora.training.progress import Checkpoints

            Checkpoints(folder / CHECKPOINTS).remove()
        record = execute(cfg, asked, tested, folder, store, claim)
        if processes.first():
            store.write(record, claim)
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return store.path(asked.run_id)


def execute(
    cfg: DictConfig, asked: identity.Identity, tested: Tested | None, folder: Path, store: Store, claim: Claim
) -> Record:
    """Train, or evaluate what was saved; returns the finished record, or writes one of the failure."""
    from flora.training import NoLogger, Run, demand
    from flora.training.debugging import watching
    from flora.training.finish import begun_record, finished_record
    from flora.training.loggers import about, opened
    from flora.training.workers import data_workers

    task, method = instantiate(cfg.task), instantiate_method(cfg.adapter)
    model = task.network(instantiate(cfg.model))
    settings, protocol, logger = instantiate(cfg.trainer), instantiate(cfg.protocol), instantiate(cfg.logger)
    logger = logger if processes.first() else NoLogger()
    label = f"{named(task.name, task.dataset)} {model.name} {method.name} seed {cfg.seed}"
    say(f"{label}: run {asked.run_id}")
    if tested:
        tested.prepare(task, asked.inputs)
    splits = task.load_for(model, Path(cfg.paths.data))
    analysis = dict(cfg.analysis) if cfg.analysis.every_n_steps is not None else None
    current = Run(task, model, method, settings, protocol, splits, cfg.seed, folder, None, claim, analysis)
    demand.check(current)
    current.watching += watching(cfg.debug.watch, folder) if processes.first() else []
    record = begun_record(cfg, asked, current, tested)
    try:
        log = opened(logger, about(record, label, cfg.table, cfg.cell, cfg.force), folder)
        with enough_memory(), processes.together(), log as current.log, data_workers():
            if tested:
                tested.check(model, method, splits, asked.inputs)
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
def job(cfg: DictConfig) -> str | None:
    """One run; prints the record's path as the last line of stdout, and hands it to a search."""
    with quietly():
        typed = HydraConfig.get().overrides.task
        for key in unread(sys.argv[1:]):  # as they were written, with what refers to others
            say(f"warning: +{key}: nothing reads such a key")
        path = run(cfg, typed)
        print(f"{'predictions' if cfg.mode == 'predict' else 'record'}: {path}", flush=True)
        return str(path)
    return None  # bad input, which is kept for the end


if __name__ == "__main__":
    main(job, trace=lambda: any(a == "debug=trace" for a in sys.argv))
