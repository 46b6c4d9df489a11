"""What a finished run left to be tested again: where it lies, what it says of itself, what identifies it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from flora.errors import ConfigError
from flora.files import whole_folder, write_json
from flora.launch import processes
from flora.results import Record
from flora.results.record import now
from flora.training.experiment import Experiment, Outcome
from flora.training.model_card import write_card
from flora.training.sharding import gathered


def complete(record: Record, experiment: Experiment, outcome: Outcome) -> Record:
    """The finished record of a run; what it trained is saved, with what ``saved_facts`` reads and a model card.

    All processes must ask; the first one gets it and saves, the others keep the record as it was.

    Raises:
        CheckpointError: the adapter cannot be written; then nothing of it is.
    """
    with gathered(outcome.adapted.model):
        return _complete(record, experiment, outcome) if processes.first() else record


def _complete(record: Record, experiment: Experiment, outcome: Outcome) -> Record:
    record = dataclasses.replace(record)
    for name, count in experiment.counts(outcome.adapted).items():
        setattr(record, name, count)
    record.lr, record.selection = outcome.lr, outcome.selection
    record.skipped_layers, record.ranks = outcome.adapted.skipped, outcome.adapted.ranks
    record.metrics, record.value = outcome.metrics, outcome.metrics[experiment.task.metric]
    if record.mode == "train":
        meter, folder, classes = outcome.trainer.meter, experiment.folder / "adapter", experiment.splits.num_classes
        record.train_seconds = round(meter.train_seconds, 3)
        record.examples_per_second = round(meter.steps * experiment.settings.batch_size / meter.train_seconds, 1)
        record.gpu_busy_share, record.execution = meter.gpu_busy_share, outcome.trainer.execution
        record.peak_memory_bytes = meter.peak_memory_bytes
        record.history = outcome.trainer.state.log_history
        record.adapter_path = str(folder)
        with whole_folder(folder) as place:
            experiment.method.save(outcome.adapted.model, place)
            save_facts(record, classes, place)
            write_card(record, classes, place)
    record.status, record.finished = "finished", now()
    return record


def save_facts(record: Record, num_classes: int, folder: Path) -> None:
    """Write what ``saved_facts`` reads, beside the weights in ``folder``."""
    keys = ("run_id", "task", "dataset", "model", "adapter", "metric", "value")
    write_json(folder / "run.json", {key: getattr(record, key) for key in keys} | {"num_classes": num_classes})


def saved_facts(checkpoint: Path) -> dict[str, Any]:
    """What the training run wrote beside its weights; empty for an adapter from elsewhere."""
    path = checkpoint / "run.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): delete it or save the adapter again") from error


def check_same_model(checkpoint: Path, model: str) -> None:
    """Refuse a checkpoint of another model by name, before its shapes fail to fit."""
    trained = saved_facts(checkpoint).get("model", model)
    if trained != model:
        raise ConfigError(f"checkpoint={checkpoint} was trained on model={trained}, not {model}: pass model={trained}")
