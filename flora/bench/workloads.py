"""What bench_end_to_end.py trains: data, network and settings, as train.py and as each rival takes them."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import transformers

from flora.bench.rivals.shared import Job
from flora.errors import ConfigError, DataError
from flora.models import get
from flora.models.weights import BUNDLED
from flora.tasks.base import draw
from flora.tasks.commonsense.questions import DATASETS, PROMPT, RESPONSE, TRAINING_PROMPT

EPOCHS = 2  # so that an epoch ends, is evaluated and another one begins
HELD_OUT = 120  # texts at most that a language model is validated on, as configs/task/commonsense.yaml has it
SPLITS = ("train", "validation", "test")
_SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png"}


@dataclass(frozen=True)
class Workload:
    """A network on data.

    Attributes:
        kind: see ``flora.bench.rivals.shared.Job``.
        model: a preset of ``flora.models``.
        dataset: folder of its parquet files in the data folder.
        batch, eval_batch: examples.
        size: of images, in pixels; 0 for texts.
        max_length: of texts, in tokens; 0 for images.
        lr, schedule, weight_decay: of AdamW, for all alike.
        metric: what all report.
    """

    kind: str
    model: str
    dataset: str
    batch: int
    eval_batch: int
    lr: float
    schedule: str
    weight_decay: float
    size: int = 0
    max_length: int = 0
    metric: str = "accuracy"


_IMAGES: dict[str, Any] = {"lr": 2e-3, "schedule": "cosine", "weight_decay": 1e-4}
_TEXTS: dict[str, Any] = {"lr": 8e-4, "schedule": "linear", "weight_decay": 0.01}
WORKLOADS = {
    "convnext_64": Workload("image", "convnext", "eurosat", 256, 256, size=64, **_IMAGES),
    "convnext_224": Workload("image", "convnext", "eurosat", 128, 128, size=224, **_IMAGES),
    "minilm_sst2": Workload("classify", "minilm_l6", "glue/sst2", 32, 256, max_length=128, **_TEXTS),
    "smollm2_sst2": Workload("write", "smollm2_135m", "glue/sst2", 16, 16, max_length=256, **(_TEXTS | {"lr": 3e-4})),
}


@dataclass(frozen=True)
class Extent:
    """How long and with what.

    Attributes:
        steps: of training, an even number.
        test: examples at most of each evaluation.
        workers: processes that load images.
        r: rank.
        dtype, device, seed: see ``Job``.
        random: the network starts with random weights.
        tokenizer: folder of another tokenizer; None: the network's own.
    """

    steps: int
    test: int
    workers: int
    r: int
    dtype: str
    device: str
    seed: int
    random: bool = False
    tokenizer: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A workload on the disk.

    Attributes:
        job: for a rival, but for its ``output``.
        overrides: for train.py, but for the adapter and where output goes.
        weights: what the network starts with, in words.
    """

    job: Job
    overrides: list[str]
    weights: str


def prepare(workload: Workload, extent: Extent, data: Path, folder: Path, spec: Any = None) -> Prepared:
    """Write data and network into a folder.

    Args:
        workload, extent: what to train, for how long.
        data: folder of the datasets.
        folder: a new one.
        spec: of another network than the workload's.

    Raises:
        DataError: there is no such data.
        ConfigError, WeightsError: the network's weights or tokenizer cannot be had.
    """
    tables = {path.stem: pq.read_table(path) for path in sorted((data / workload.dataset).glob("*.parquet"))}
    needed = SPLITS if workload.kind == "image" else SPLITS[:2]
    if missing := [split for split in needed if split not in tables]:
        raise DataError(f"{data / workload.dataset} has no {missing[0]}.parquet: name a folder of datasets with --data")
    spec = spec or get(workload.model)
    count = extent.steps // EPOCHS * workload.batch
    job = Job(
        kind=workload.kind,
        data=str(folder / "data"),
        network=str(folder / "network"),
        output="",
        batch=workload.batch,
        eval_batch=workload.eval_batch,
        epochs=EPOCHS,
        lr=workload.lr,
        weight_decay=workload.weight_decay,
        warmup=0.1,
        schedule=workload.schedule,
        max_grad_norm=1.0,
        r=extent.r,
        alpha=2 * extent.r,
        targets=None,
        head="",
        workers=extent.workers if workload.kind == "image" else 0,  # texts are tokens already: the examples' default
        dtype=extent.dtype,
        device=extent.device,
        seed=extent.seed,
    )
    if workload.kind == "image":
        job, own = _images(workload, extent, job, spec, tables, count)
        weights = f"{spec.name}, shipped with flora"
    else:
        job, own, weights = _texts(workload, extent, job, spec, tables, count)
    return Prepared(job, [*own, *_settings(job)], weights)


def _settings(job: Job) -> list[str]:
    """The trainer of train.py, set as the rivals are."""
    values: dict[str, Any] = {"epochs": job.epochs, "batch_size": job.batch, "eval_batch_size": job.eval_batch}
    values |= {"lr": job.lr, "head_lr": job.lr, "weight_decay": job.weight_decay, "schedule": job.schedule}
    values |= {"warmup_ratio": job.warmup, "warmup_steps": "null", "eval_steps": "null"}
    values |= {"max_grad_norm": job.max_grad_norm, "num_workers": job.workers, "dtype": job.dtype}
    values |= {"device": "auto" if job.on_gpu else "cpu"}
    return [f"adapter.r={job.r}", f"seed={job.seed}", *(f"trainer.{key}={value}" for key, value in values.items())]


def _images(
    workload: Workload, extent: Extent, job: Job, spec: Any, tables: Mapping[str, pa.Table], count: int
) -> tuple[Job, list[str]]:
    for split in SPLITS:
        wanted = count if split == "train" else min(extent.test, tables[split].num_rows)
        write_images(tables[split], wanted, Path(job.data, split), extent.seed)
    classes = len(list(Path(job.data, "train").iterdir()))
    config: Any = transformers.TimmWrapperConfig(architecture=spec.timm_name)
    config.num_labels = classes
    network = transformers.TimmWrapperForImageClassification(config)
    network.timm_model.load_state_dict(spec.build(classes).state_dict())
    network.save_pretrained(job.network)
    shipped = BUNDLED / spec.weights.bundled
    job = replace(
        job,
        head=spec.classifier[-1],
        timm_name=spec.timm_name,
        weights=str(shipped),
        weights_classes=json.loads(shipped.with_suffix(".json").read_text())["num_classes"],
        size=workload.size,
        mean=list(spec.mean),
        std=list(spec.std),
    )
    own = ["task=imagefolder", f"paths.data={job.data}", "task.crop_pct=1.0", f"model={workload.model}"]
    return job, [*own, f"model.image_size={workload.size}"]


def write_images(table: pa.Table, count: int, folder: Path, seed: int) -> None:
    """So many images as files in folders of classes: the same share of each class, as files of the same content again
    where the table has fewer."""
    labels = table.column("label").to_numpy()
    chosen = balanced(labels, count, seed)
    bytes_of = table.column("image").combine_chunks().field("bytes")
    first: dict[int, Path] = {}
    for number, row in enumerate(chosen.tolist()):
        content = bytes_of[row].as_py()
        place = folder / f"{labels[row]:03d}"
        place.mkdir(parents=True, exist_ok=True)
        file = place / f"{number:06d}{_SUFFIXES.get(content[:2], '.png')}"
        if row in first:
            os.link(first[row], file)
        else:
            file.write_bytes(content)
            first[row] = file


def balanced(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Row numbers ``[count]``: classes take turns, in a drawn order; all rows again where they do not suffice."""
    order = draw(len(labels), seed)
    seen: dict[int, int] = {}
    turns = []
    for label in labels[order].tolist():
        turns.append(seen.setdefault(label, 0))
        seen[label] += 1
    return np.resize(order[np.argsort(turns, kind="stable")], count)


def _texts(
    workload: Workload, extent: Extent, job: Job, spec: Any, tables: Mapping[str, pa.Table], count: int
) -> tuple[Job, list[str], str]:
    writes = workload.kind == "write"
    held_out = min(HELD_OUT, extent.test) if writes else 0
    wanted = count + held_out
    train, test = (tables[split] for split in SPLITS[:2])
    if wanted > train.num_rows:
        raise ConfigError(f"--steps: {workload.dataset} has {train.num_rows} texts, {wanted} are needed; lower it")
    folder = Path(job.data, workload.dataset)
    folder.mkdir(parents=True)
    train = train.take(draw(train.num_rows, extent.seed)[:wanted])
    test = test.slice(0, extent.test)
    pq.write_table(train, folder / "train.parquet")
    pq.write_table(test, folder / "validation.parquet")
    weights = write_network(spec, extent, Path(job.network))
    job = replace(job, targets=list(spec.adapter_targets), max_length=workload.max_length)
    own = [f"paths.data={job.data}", f"task.dataset={Path(workload.dataset).name}", f"model={workload.model}"]
    own += [f"model.weights={job.network}", f"model.tokenizer={job.network}", f"task.max_length={workload.max_length}"]
    job = replace(job, data=str(folder))
    if not writes:
        own = ["task=glue", "protocol=glue_paper", *own, "model.head_dropout=0.0"]
        return replace(job, head=spec.classifier[-1]), own, weights
    order = draw(wanted, 0)  # as task.split_seed draws what is held out
    splits = {
        "train": (train.take(order[held_out:]), TRAINING_PROMPT),
        "validation": (train.take(order[:held_out]), TRAINING_PROMPT),
        "test": (test, PROMPT),
    }
    for split, (rows, prompt) in splits.items():
        with (folder / f"{split}.jsonl").open("w") as lines:
            lines.writelines(json.dumps({"text": text}) + "\n" for text in _dialogues(rows, prompt))
    answers = list(DATASETS["sst2"].ask({"sentence": "", "label": 0}).answers)
    own += [f"task.validation_size={held_out}"]
    return replace(job, answers=answers), ["task=commonsense", *own], weights


def _dialogues(rows: pa.Table, prompt: str) -> Iterator[str]:
    for row in rows.to_pylist():
        question = DATASETS["sst2"].ask(row)
        answer = RESPONSE.format(answer=question.answers[question.right])
        yield prompt.format(instruction=question.instruction) + answer


def write_network(spec: Any, extent: Extent, folder: Path) -> str:
    """Save a network of transformers with its tokenizer; says what it starts with."""
    if spec.kind == "sequence_classification":
        spec.head_dropout = 0.0  # train.py and the rivals alike
    if extent.tokenizer:
        spec.tokenizer_place = extent.tokenizer
    tokenizer = spec.tokenizer()
    if tokenizer.eos_token_id is None and spec.kind == "causal_lm":
        tokenizer.eos_token = tokenizer.sep_token  # of a classifier's tokenizer, for want of the network's own
    place = "random" if extent.random else f"{spec.name}'s own"
    spec.pretrained = not extent.random
    transformers.set_seed(extent.seed)
    spec.build(2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"{place}, tokenizer of {Path(extent.tokenizer).name}" if extent.tokenizer else place


def emptied(folder: Path) -> Path:
    """A folder with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def last_words(text: str, lines: int = 3) -> str:
    """The last lines of what a program said that are not empty, in one."""
    said: Sequence[str] = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(islice(said, max(0, len(said) - lines), None))
