"""GLUE: nine tasks of English understanding, classification of texts and pairs, and one regression.

Wang et al. 2019, "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding", arXiv
1804.07461. The labels of its test splits are hidden: results are those of the development sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor
from torch.nn import functional as F

from flora.errors import ConfigError, DataError, WeightsError, first_line
from flora.models.weights import reach_hub, sha256_of
from flora.tasks import manifest
from flora.tasks.base import Splits, check_dataset, check_split_seed, draw
from flora.tasks.metrics import Glue as GlueMetric
from flora.tasks.rows import Rows, check_labels, check_texts, read_parquet, row_of
from flora.tasks.text import TextDataset, TextTask, fingerprint, padding_of, tokenise

HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class Entry:
    """One task.

    Attributes:
        metric: what is reported.
        rows: official numbers of rows, train and development; MNLI's second development set is a field of its own.
        folder: in the official download.
        columns: of the text in the hub's layout.
        tsv: of the text in the official TSV; numbers where it has no header.
        label: of the target in the official TSV.
        classes: names in the order of their indices; none for a regression.
    """

    metric: str
    rows: dict[str, int]
    folder: str
    columns: tuple[str, ...]
    tsv: tuple[str | int, ...]
    label: str | int
    classes: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """Of the network."""
        return len(self.classes) or 1


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_SIMILARITY = (0.0, 5.0)
_COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str | int, ...], str | int, tuple[str, ...]]] = {
    "cola": (("sentence",), (3,), 1, ("unacceptable", "acceptable")),
    "sst2": (("sentence",), ("sentence",), "label", ("negative", "positive")),
    "mrpc": (_PAIR, ("#1 String", "#2 String"), "Quality", ("not_equivalent", "equivalent")),
    "stsb": (_PAIR, _PAIR, "score", ()),
    "rte": (_PAIR, _PAIR, "label", _ENTAILMENT),
    "qnli": (("question", "sentence"), ("question", "sentence"), "label", _ENTAILMENT),
    "qqp": (("question1", "question2"), ("question1", "question2"), "is_duplicate", ("not_duplicate", "duplicate")),
    "mnli": (("premise", "hypothesis"), _PAIR, "gold_label", ("entailment", "neutral", "contradiction")),
    "wnli": (_PAIR, _PAIR, "label", ("not_entailment", "entailment")),
}
DATASETS = {
    name: Entry(metric, rows, folder, *_COLUMNS[name])
    for name, metric, folder, rows in [
        ("cola", "matthews_correlation", "CoLA", {"train": 8551, "validation": 1043}),
        ("sst2", "accuracy", "SST-2", {"train": 67349, "validation": 872}),
        ("mrpc", "accuracy", "MRPC", {"train": 3668, "validation": 408}),
        ("stsb", "pearson", "STS-B", {"train": 5749, "validation": 1500}),
        ("rte", "accuracy", "RTE", {"train": 2490, "validation": 277}),
        ("qnli", "accuracy", "QNLI", {"train": 104743, "validation": 5463}),
        ("qqp", "accuracy", "QQP", {"train": 363846, "validation": 40430}),
        ("mnli", "accuracy", "MNLI", {"train": 392702, "validation_matched": 9815, "validation_mismatched": 9832}),
        ("wnli", "accuracy", "WNLI", {"train": 635, "validation": 71}),
    ]
}


class Glue(TextTask):
    """One task of GLUE.

    Args:
        name: of the family, as records show it.
        dataset: a key of DATASETS.
        epochs: default length of training.
        max_length: longer examples are cut, and counted in the record; None: what the model takes.
        held_out: share of train that is validation, the development set then being the test; 0: the development set is
            both, as in published tables.
        split_seed: of that draw.
        rates, recipe: of the published recipe, which the trainer's config reads.

    Raises:
        ConfigError: for an unknown dataset or a value out of range.
    """

    def __init__(
        self,
        *,
        name: str,
        dataset: str,
        epochs: float,
        max_length: int | None,
        held_out: float,
        split_seed: int = 0,
        rates: str = "scripts",
        recipe: Mapping[str, Any] | None = None,
    ):
        check_dataset(dataset, DATASETS)
        check_split_seed(split_seed)
        if rates not in ("scripts", "paper"):
            raise ConfigError(f"task.rates={rates} must be scripts or paper")
        if max_length is not None and max_length < 1:
            raise ConfigError(f"task.max_length={max_length} must be at least 1")
        if not 0 <= held_out < 1:
            raise ConfigError(f"task.held_out={held_out} must lie in [0, 1)")
        self.name = name
        self.dataset = dataset
        self.epochs = epochs
        self.max_length = max_length
        self.held_out = held_out
        self.split_seed = split_seed

    @property
    def entry(self) -> Entry:
        """The dataset's row of DATASETS."""
        return DATASETS[self.dataset]

    @property
    def metric(self) -> str:  # type: ignore[override]
        """What GLUE reports; the first of two where it has two."""
        return self.entry.metric

    def metrics(self) -> GlueMetric:
        """All metrics that GLUE defines for the dataset."""
        return GlueMetric(self.dataset)

    def loss(self, outputs: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        """Cross-entropy, or the squared error of a regression."""
        if self.entry.classes:
            return super().loss(outputs, labels, label_smoothing)
        return F.mse_loss(outputs.float().squeeze(-1), labels)

    def load_for(self, model: Any, data_dir: Path | None) -> Splits:
        """See Task.load_for."""
        if getattr(model, "kind", "sequence_classification") != "sequence_classification":
            raise ConfigError(f"model={model.name} writes text and has no classifier: choose e.g. model=minilm_l6")
        return super().load_for(model, data_dir)

    def load(self, *, tokenizer: Any, max_length: int, data_dir: Path | None) -> Splits:
        """See TextTask.load; from ``data_dir/glue/DATASET/*.parquet``, the official TSVs there, or the hub."""
        found, source = self._read(data_dir)
        longest = min(max_length, self.max_length or max_length)
        facts: dict[str, Any] = {
            "source": source,
            "files": {name: fact for rows in found.values() for name, fact in rows.facts["files"].items()},
            "max_length": longest,
            "tokenizer_sha256": fingerprint(tokenizer),
            "truncated": {},
            "warnings": [
                f"{split} has {len(found[split])} rows, GLUE has {official}"
                for split, official in self.entry.rows.items()
                if len(found[split]) != official
            ],
        }
        sets = {}
        for split, rows in found.items():
            sets[split], facts["truncated"][split] = self._encode(rows, tokenizer, longest)
        train, development = sets.pop("train"), sets.pop(next(iter(sets)))
        if self.held_out:
            order = draw(len(train), self.split_seed)
            kept = len(order) - max(1, round(self.held_out * len(order)))
            if not kept:
                raise DataError(f"{self.dataset}: train has {len(order)} rows, none is left to hold out")
            train, validation = train.take(order[:kept]), train.take(order[kept:])
            facts["split_rule"] = (
                f"validation a drawn {self.held_out:.0%} of train, seed {self.split_seed}; test the development set"
            )
        else:
            validation = development
            facts["split_rule"] = "selected and reported on the development set, as published"
        facts["counts"] = {"train": len(train), "validation": len(validation), "test": len(development)}
        names = list(self.entry.classes) or ["score"]
        further = {name.removeprefix("validation_"): rows for name, rows in sets.items()}
        return Splits(train, validation, development, self.entry.outputs, names, facts, further)

    def _encode(self, rows: Rows, tokenizer: Any, max_length: int) -> tuple[TextDataset, int]:
        tokens, starts, truncated = tokenise(rows.texts, tokenizer, max_length)
        return TextDataset(tokens, starts, {"labels": rows.label_tensor()}, padding_of(tokenizer, tokens)), truncated

    def _read(self, data_dir: Path | None) -> tuple[dict[str, Rows], str]:
        """The rows of each split, the first development set second, and where they come from."""
        places = []
        if data_dir is not None:
            folder = Path(data_dir) / "glue" / self.dataset
            for place in (folder, Path(data_dir) / "glue" / self.entry.folder):
                if any(place.glob("*.parquet")) or (place / "train.tsv").is_file():
                    return self.read_folder(place), "paths.data"
            places.append(f"{folder} holds no train*.parquet and no train.tsv")
        try:
            return self.read_folder(self.from_hub()), f"hub {HUB}"
        except WeightsError as error:
            places.append(f"hub {HUB}: {error}")
        raise DataError(f"no data for {self.dataset} ({'; '.join(places)}): set paths.data to a folder that has it")

    def read_folder(self, folder: Path) -> dict[str, Rows]:
        """The rows of each split, from parquet or the official TSVs."""
        if not any(folder.glob("*.parquet")):
            return self._from_tsv(folder)
        found = {}
        for split in self.entry.rows:
            paths = sorted(folder.glob(f"{split}*.parquet"))
            if not paths:
                raise DataError(f"{folder}: no {split}*.parquet; fetch the dataset again")
            manifest.check(folder, paths)
            found[split] = read_parquet(paths, self.entry.columns, len(self.entry.classes), _SIMILARITY)
        return found

    def _from_tsv(self, folder: Path) -> dict[str, Rows]:
        names = {"train": "train", "validation": "dev"}
        files = {split: f"{names.get(split, split.replace('validation', 'dev'))}.tsv" for split in self.entry.rows}
        manifest.check(folder, [folder / file for file in files.values()])
        return {split: _read_tsv(folder / file, self.entry) for split, file in files.items()}

    def from_hub(self) -> Path:
        """The folder of the hub's cache with the dataset's files; WeightsError where they cannot be had."""
        pattern = f"{self.dataset}/*.parquet"
        options: dict[str, Any] = {"repo_type": "dataset", "allow_patterns": pattern}
        try:
            folder = Path(huggingface_hub.snapshot_download(HUB, local_files_only=True, **options)) / self.dataset
            if any(folder.glob("train*.parquet")):
                return folder
        except LocalEntryNotFoundError:
            pass
        reach_hub()
        try:
            return Path(huggingface_hub.snapshot_download(HUB, **options)) / self.dataset
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise WeightsError(first_line(error)) from error


def _read_tsv(path: Path, entry: Entry) -> Rows:
    """An official TSV: no quoting, a header except in CoLA; rows of another width are left out and counted."""
    try:
        # MRPC's official files begin with a byte order mark.
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8-sig").split("\n") if line]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
    header: list[Any] = [] if isinstance(entry.label, int) else (lines or [[]])[0]
    rows = lines[1:] if header else lines
    missing = [name for name in (*entry.tsv, entry.label) if header and name not in header]
    width = len(header or (rows or [[]])[0])
    whole = [row for row in rows if len(row) == width]
    if missing or not whole:
        what = f"no column {' and '.join(map(str, missing))}" if missing else f"no rows of {width} columns"
        raise DataError(f"{path}: {what}; fetch the file again")
    places = [header.index(name) if header else int(name) for name in (*entry.tsv, entry.label)]
    *columns, labels = [[row[place] for row in whole] for place in places]
    numbers = [entry.classes.index(label) if label in entry.classes else label for label in labels]
    where = partial(row_of, path)
    facts: dict[str, Any] = {"rows": len(whole), "sha256": sha256_of(path)}
    if len(whole) < len(rows):
        facts["left_out"] = len(rows) - len(whole)
    return Rows(
        check_texts(columns, [str(name) for name in entry.tsv], where),
        check_labels(numbers, len(entry.classes), _SIMILARITY, where),
        {"files": {path.name: facts}},
    )
