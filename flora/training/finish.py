"""The end of a run: its adapter is saved, and its record is filled in."""

import dataclasses
import json

from flora.files import whole_folder, write_json
from flora.launch import preemption, processes
from flora.results.record import Record, now
from flora.training.model_card import write_card
from flora.training.run import Outcome, Run
from flora.training.saved import write_facts
from flora.training.sharding import gathered


def finished_record(record: Record, run: Run, outcome: Outcome) -> Record:
    """The record of a finished run; what it trained is saved, with facts (``flora.training.saved``) and a model card.

    All processes must ask; the first one gets it and saves, the others keep the record as it was.

    Raises:
        AlreadyRunning: the run is another process's now; nothing is touched.
        CheckpointError: the adapter cannot be written; then nothing of it is.
    """
    with gathered(outcome.adapted.model):
        return _finished(record, run, outcome) if processes.first() else record


def _finished(record: Record, run: Run, outcome: Outcome) -> Record:
    record = dataclasses.replace(record)
    for name, count in run.counts(outcome.adapted).items():
        setattr(record, name, count)
    record.lr, record.selection = outcome.lr, outcome.selection
    record.skipped_layers, record.ranks = outcome.adapted.skipped, outcome.adapted.ranks
    record.metrics, record.value = outcome.metrics, outcome.metrics[run.task.metric]
    if record.mode == "train":
        meter, folder, classes = outcome.trainer.meter, run.folder / "adapter", run.splits.num_classes
        record.train_seconds = round(meter.train_seconds, 3)
        record.examples_per_second = round(meter.steps * run.settings.batch_size / meter.train_seconds, 1)
        record.gpu_busy_share, record.execution = meter.gpu_busy_share, outcome.trainer.execution
        record.peak_memory_bytes = meter.peak_memory_bytes
        record.history = outcome.trainer.state.log_history
        record.adapter_path = str(folder)
        if run.claim is not None:
            run.claim.check()
        with whole_folder(folder, preemption.held) as place:
            run.method.save(outcome.adapted.model, place)
            for config in place.glob("*.json"):  # it may name a place of this machine, and people publish it
                write_json(config, json.loads(config.read_text()))
            write_facts(record, classes, place)
            write_card(record, classes, place)
            if run.claim is not None:
                run.claim.check()  # once more, as the disk takes its time
    record.status = "finished"
    record.finished = max(now(), record.started)  # as the clock may have been set back
    return record
