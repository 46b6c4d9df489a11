"""The record of a run: begun before it, filled in at its end, when its adapter is saved."""

import dataclasses
import json

from omegaconf import DictConfig

from flora.config import METHOD_VERSION, semantic_config
from flora.files import whole_folder, write_json
from flora.launch import preemption, processes
from flora.models.weights import name_of
from flora.results.record import Record, command, device_name, now
from flora.training.identity import Identity
from flora.training.model_card import write_card
from flora.training.run import Outcome, Run
from flora.training.saved import write_facts, written
from flora.training.sharding import gathered
from flora.training.tested import Tested


def begun_record(cfg: DictConfig, identity: Identity, run: Run, tested: Tested | None) -> Record:
    """The record of a run that is about to start, or of the test of a saved one."""
    splits, settings = run.splits, run.settings
    return Record(
        run_id=identity.run_id,
        method_version=METHOD_VERSION,
        task=run.task.name,
        dataset=run.task.dataset,
        model=run.model.name,
        adapter=tested.method if tested else run.method.name,
        protocol=run.protocol.name,
        mode=cfg.mode,
        seed=cfg.seed,
        config=identity.config,
        command=command(),
        dtype=settings.dtype,
        device=device_name(settings.device == "cpu"),
        started=now(),
        metric=run.task.metric,
        split="validation" if splits.test is splits.validation else "test",
        data=splits.facts,
        weights=run.model.facts,
        adapter_path=str(tested.folder) if tested else None,
        deterministic=settings.deterministic,
    )


def finished_record(record: Record, run: Run, outcome: Outcome, cfg: DictConfig) -> Record:
    """The record of a finished run; what it trained is saved, with facts (``flora.training.saved``) and a model card.

    All processes must ask; the first one gets it and saves, the others keep the record as it was. What is saved says
    where data and weights lay, as ``cfg`` does; a record does not.

    Raises:
        AlreadyRunning: the run is another process's now; nothing is touched.
        CheckpointError: the adapter cannot be written; then nothing of it is.
    """
    with gathered(outcome.adapted.model):
        return _finished(record, run, outcome, cfg) if processes.first() else record


def _finished(record: Record, run: Run, outcome: Outcome, cfg: DictConfig) -> Record:
    record = dataclasses.replace(record)
    for name, count in run.counts(outcome.adapted).items():
        setattr(record, name, count)
    record.lr, record.selection = outcome.lr, outcome.selection
    record.skipped_layers, record.ranks = outcome.adapted.skipped, outcome.adapted.ranks
    record.metrics, record.value = outcome.metrics, outcome.metrics[run.task.metric]
    if record.mode == "train":
        meter, folder = outcome.trainer.meter, run.folder / "adapter"
        if outcome.lr is not None:  # something was trained
            record.train_seconds = round(meter.train_seconds, 3)
            record.examples_per_second = round(meter.steps * run.settings.batch_size / meter.train_seconds, 1)
            if (rate := meter.rate(run.settings.batch_size)) is not None:
                record.steady_examples_per_second = round(rate, 1)
            record.gpu_busy_share, record.execution = meter.gpu_busy_share, outcome.trainer.execution
            record.peak_memory_bytes = meter.peak_memory_bytes
            record.history = outcome.trainer.state.log_history
        record.adapter_path = str(folder)
        if run.claim is not None:
            run.claim.check()
        with whole_folder(folder, preemption.held) as place:
            run.method.save(outcome.adapted.model, place)
            facts = {
                "num_classes": run.splits.num_classes,
                "class_names": written(run.splits.class_names),
                "weights": record.weights,
                "inputs": run.task.preprocessing(run.model),
                "data": run.splits.facts,
                "data_folder": cfg.paths.data,
                "config": record.config | {"model": semantic_config(cfg)["model"]},
            }
            for config in place.glob("*.json"):  # it may name a place of this machine, and people publish it
                base = {"base_model_name_or_path": where} if (where := name_of(record.weights)) else {}
                write_json(config, json.loads(config.read_text()) | base)
            write_facts(record, place, **facts)
            write_card(record, facts, place)
            if run.claim is not None:
                run.claim.check()  # once more, as the disk takes its time
    record.status = "finished"
    record.finished = max(now(), record.started)  # as the clock may have been set back
    return record
