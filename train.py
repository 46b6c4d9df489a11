"""Fine-tune a pretrained model with FLoRA or a rival, and leave one record. `python train.py --help` shows how."""

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach flora.config.main, which prints one line
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hydra
from omegaconf import DictConfig

from flora.config import METHOD_VERSION, instantiate, main, quietly, run_id, semantic_config
from flora.errors import ConfigError, DataError, WeightsError
from flora.results import Record, Store
from flora.results.record import command, device_name, now, write_json
from flora.training import Experiment
from flora.training.model_card import write_card


def run(cfg: DictConfig) -> Path:
    """Run what the config says, unless a finished record of the same run exists; returns the record's path."""
    if cfg.mode not in ("train", "eval"):
        raise ConfigError(f"mode must be train or eval, got {cfg.mode!r}")
    if not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise ConfigError(f"seed must be a whole number from 0, got {cfg.seed!r}")
    checkpoint = saved_run(cfg.checkpoint) if cfg.mode == "eval" else None
    task = instantiate(cfg.task)
    cfg.task.dataset = task.dataset  # an alias and the name it stands for are one run
    identity = run_id(cfg, digest(checkpoint) if checkpoint else None)
    paths = instantiate(cfg.paths)
    store = Store(paths.results)
    if not cfg.force and (done := store.finished(identity)):
        found = f"{done['dataset']} {done['model']} {done['adapter']}: test {done['metric']} {done['value']:.4f}"
        say(f"finished before: {found} (force=true runs it again)")
        return store.path(identity)

    model, method = instantiate(cfg.model), instantiate(cfg.adapter)
    label = f"{task.name}/{task.dataset} {model.name} {method.name} seed {cfg.seed}"
    settings, protocol, logger = instantiate(cfg.trainer), instantiate(cfg.protocol), instantiate(cfg.logger)
    folder = paths.prepare(identity)
    say(f"{label}: run {identity}")
    splits = task.load(image_size=model.image_size, data_dir=Path(paths.data), interpolation=model.interpolation)
    experiment = Experiment(
        task, model, method, settings, protocol, splits, cfg.seed, folder, report_to=logger.report_to
    )
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
        data=splits.facts,
        weights=model.facts,
        deterministic=settings.deterministic,
    )
    tags = [task.name, task.dataset, model.name, method.name]
    try:
        with logger.run(label, identity, f"{task.name}/{task.dataset}", tags, record.config, folder) as summary:
            if checkpoint is not None:
                check_same_model(checkpoint, model.name)
                outcome = experiment.evaluate(checkpoint)
                record.adapter = saved_facts(checkpoint).get("adapter", method.name)
            else:
                outcome = experiment.train()
            summary.update({f"test/{name}": value for name, value in outcome.metrics.items()})
    except (ConfigError, DataError, WeightsError):
        raise  # bad input: nothing was run that a record should keep
    except KeyboardInterrupt:
        store.write(dataclasses.replace(record, status="interrupted", finished=now()))
        raise
    except Exception as error:
        path = store.write(dataclasses.replace(record, status="failed", error=repr(error), finished=now()))
        say(f"failed: {error} (record: {path})")
        raise
    for name, count in experiment.counts(outcome.adapted).items():
        setattr(record, name, count)
    meter = outcome.trainer.meter
    if checkpoint is None:
        record.train_seconds = round(meter.train_seconds, 3)
        record.examples_per_second = round(meter.steps * settings.batch_size / meter.train_seconds, 1)
        record.peak_memory_bytes = meter.peak_memory_bytes
        record.history = outcome.trainer.state.log_history
        record.adapter_path = str(folder / "adapter")
        method.save(outcome.adapted.model, folder / "adapter")
    record.lr, record.selection = outcome.lr, outcome.selection
    record.skipped_layers, record.ranks = outcome.adapted.skipped, outcome.adapted.ranks
    record.metrics, record.value = outcome.metrics, outcome.metrics[task.metric]
    record.status, record.finished = "finished", now()
    if checkpoint is None:
        facts = {k: getattr(record, k) for k in ("run_id", "task", "dataset", "model", "adapter", "metric", "value")}
        write_json(folder / "adapter" / "run.json", facts | {"num_classes": splits.num_classes})
        write_card(record, splits.num_classes, folder / "adapter")
    say(f"{label}: test {record.metric} {record.value:.4f} ({record.trainable_params:,} trainable parameters)")
    return store.write(record)


def saved_run(checkpoint: str | None) -> Path:
    """The adapter folder that `checkpoint=DIR` means: DIR itself or DIR/adapter."""
    if not checkpoint:
        raise ConfigError("mode=eval needs checkpoint=DIR, the folder of a finished run")
    for folder in (Path(checkpoint), Path(checkpoint) / "adapter"):
        if (folder / "adapter_model.safetensors").exists() or (folder / "model.safetensors").exists():
            return folder
    raise ConfigError(f"checkpoint={checkpoint}: no adapter_model.safetensors or model.safetensors there")


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


def digest(folder: Path) -> str:
    """Sha256 over the saved weights: the identity of a checkpoint, wherever it lies."""
    weights = sorted(folder.glob("*model.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()


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
