"""Own texts: a folder or file with named columns, one or two texts and a class or a number to predict from them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora import contents
from flora.errors import ConfigError, DataError, first_line
from flora.models.spec import ModelSpec, TextSpec
from flora.models.weights import reach_hub, sha256_of
from flora.tasks import baselines, manifest, tables
from flora.tasks.base import Batch, Forward, Splits, check_split_seed
from flora.tasks.imagefolder.confusion import draw_confusion
from flora.tasks.metrics import Numbers, TextClasses
from flora.tasks.portions import AS_FILES, SPLITS, UNDRAWN, WHOLE, absent, hold_out, portions, rule_of, say, shares
from flora.tasks.tables import Table
from flora.tasks.text import labels
from flora.tasks.text.dataset import TextDataset
from flora.tasks.text.task import TextTask, classify
from flora.tasks.text.tokenise import fingerprint, padding_of, tokenise

_PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("text1", "text2"), ("question1", "question2"))
_TEXTS = (
    "text",
    "texts",
    "sentence",
    "review",
    "content",
    "document",
    "comment",
    "message",
    "tweet",
    "body",
    "utterance",
)
_LABELS = (
    "label",
    "labels",
    "class",
    "target",
    "category",
    "sentiment",
    "intent",
    "topic",
    "score",
    "rating",
    "stars",
    "y",
)
_METRICS = {"classification": ("accuracy", "macro_f1"), "regression": ("pearson", "spearmanr")}
_HUB = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")


class Text(TextTask):
    """Own texts.

    Args:
        name: of the family, as records show it.
        dataset: a folder or file in ``paths.data`` or anywhere; ``.``: ``paths.data`` itself; else a name on the hub.
        epochs: default length of training.
        text, text_pair: columns of the text and, of a pair, of the second one; None: by usual names.
        label: column of the class or number; None: by usual names.
        kind: ``classification``, ``regression``, or ``auto``: a regression where labels are numbers with fractions.
        metric: ``accuracy`` or ``macro_f1``, ``pearson`` or ``spearmanr``; None: the first of its kind.
        missing: ``error``, or ``skip`` to leave out and count rows without a text or a label.
        subset: configuration of a data set on the hub.
        split: parts of train, validation and test where there is neither of the last two; None: 70, 15, 15.
        held_out: share of train that is validation where there is only one other split, which is then the test.
        split_seed: of those draws.
        max_length: tokens; longer examples are cut, and counted in the record; None: what the model takes.
        network: kind of model; a language model's config reads it, and gives it a classifier.

    Raises:
        ConfigError: for a value out of range.
    """

    pictures: ClassVar[tuple[str, ...]] = ("confusion.png",)

    def __init__(
        self,
        *,
        name: str,
        dataset: str,
        epochs: float,
        text: str | None = None,
        text_pair: str | None = None,
        label: str | None = None,
        kind: str = "auto",
        metric: str | None = None,
        missing: str = "error",
        subset: str | None = None,
        split: list[float] | None = None,
        held_out: float = 0.1,
        split_seed: int = 0,
        max_length: int | None = None,
        network: str = "sequence_classification",
    ):
        known = tuple(name for names in _METRICS.values() for name in names)
        for key, value, allowed in (
            ("kind", kind, labels.KINDS),
            ("metric", metric, (None, *known)),
            ("missing", missing, ("error", "skip")),
        ):
            if value not in allowed:
                raise ConfigError(f"task.{key}={value} must be {' or '.join(map(str, filter(None, allowed)))}")
        if text_pair is not None and text is None:
            raise ConfigError(f"task.text_pair={text_pair} is the second text: name the first with task.text=COLUMN")
        if max_length is not None and max_length < 1:
            raise ConfigError(f"task.max_length={max_length} must be at least 1")
        if not 0 < held_out < 1:
            raise ConfigError(f"task.held_out={held_out} must lie in (0, 1)")
        check_split_seed(split_seed)
        self.name, self.dataset, self.epochs = name, dataset, epochs
        self.text, self.text_pair, self.label = text, text_pair, label
        self.kind = self.asked_kind = kind
        self.asked_metric, self.missing, self.subset = metric, missing, subset
        self.split, self.parts = split, shares(split)
        self.held_out, self.split_seed, self.max_length = held_out, split_seed, max_length
        self.classes: list[str] = []
        self._scale: tuple[float, float] | None = None  # mean and deviation of the labels that are trained on

    @property
    def metric(self) -> str:  # type: ignore[override]
        """What was asked for; else accuracy, or Pearson's correlation of a regression that was loaded."""
        return self.asked_metric or _METRICS[self.kind if self.kind != "auto" else "classification"][0]

    def metrics(self) -> TextClasses | Numbers:
        """Accuracy and macro F1, or Pearson's and Spearman's correlation and the errors."""
        return Numbers() if self.kind == "regression" else TextClasses()

    def accepts(self, model: ModelSpec) -> None:
        """See Task.accepts."""
        super().accepts(model)
        if model.kind != "sequence_classification":
            raise ConfigError(
                f"model={model.name} has no classifier: choose e.g. model=minilm_l6, or give a language model one with "
                "model.kind=sequence_classification"
            )

    def files(self, data_dir: Path | None) -> tuple[Path, list[Path]]:
        """See Task.files; none where the data comes from the hub."""
        place = self._place(data_dir)
        if place is None:
            return Path(data_dir or "."), []
        found = tables.find(place)
        return place if place.is_dir() else place.parent, [path for paths in found.values() for path in paths]

    def contents(self, data_dir: Path | None) -> dict[str, str]:
        """See Task.contents; of a data set on the hub the checksums of its rows."""
        place = self._place(data_dir)
        if place is not None:
            return super().contents(data_dir)
        contents.note(Path(datasets.config.HF_DATASETS_CACHE), deep=True)  # so that it is asked for each time
        return {split: tables.digest(table)["sha256"] for split, table in self._from_hub(Path(self.dataset)).items()}

    def load(self, *, tokenizer: Any, max_length: int, data_dir: Path | None) -> Splits:
        """See TextTask.load."""
        data, files, source = self._tables(data_dir)
        columns, target = self._columns(data["train"])
        self.text_columns = columns
        for split, table in data.items():
            for name in (*columns, target):
                tables.column(table, f"{split}: task.{'label' if name == target else 'text'}", name, ())
        left_out = {
            split: tables.drop_missing(table, (*columns, target), self.missing) for split, table in data.items()
        }
        names = data["train"].names.get(target)
        if odd := [split for split, table in data.items() if table.names.get(target) != names]:
            raise DataError(f"{odd[0]} gives the classes of {target} other names than train, or another order: mend it")
        cells = {split: [row[target] for row in table.rows] for split, table in data.items()}
        every = [cell for part in cells.values() for cell in part]
        self.kind, why = labels.kind_of(every, names is not None, self.asked_kind)
        if self.metric not in _METRICS[self.kind]:
            raise ConfigError(
                f"task.metric={self.metric} is not for {self.kind}: choose {' or '.join(_METRICS[self.kind])}"
            )
        texts = {split: [tables.texts_of(row, columns) for row in table.rows] for split, table in data.items()}
        values: dict[str, Any]
        if self.kind == "regression":
            values = {split: labels.as_numbers(part, data[split].where) for split, part in cells.items()}
            strata = np.zeros(len(values["train"]), np.int64)
        else:
            whole = labels.are_whole(every)
            values = {split: np.array(labels.as_classes(part, names, whole), object) for split, part in cells.items()}
            strata = np.unique(values["train"], return_inverse=True)[1]
            if not strata.any() and not self.trained_classes:
                raise DataError(f"train has one class, {values['train'][0]}: there is nothing to tell apart")
        chosen, rule = self._split(strata, {split: len(part) for split, part in values.items()})
        texts = {split: [texts[place][row] for row in rows] for split, (place, rows) in chosen.items()}
        values = {split: values[place][rows] for split, (place, rows) in chosen.items()}
        seen = ("test",) if rule == WHOLE else SPLITS  # the others are the same rows then
        warnings = tables.repeated(texts) if rule != WHOLE else []
        if self.kind == "regression":
            self._scale = self._scale or (float(values["train"].mean()), float(values["train"].std()))
            if not self._scale[1]:
                raise DataError(f"every label of train is {self._scale[0]:g}: there is nothing to predict")
        else:
            values, self.classes = labels.indices(values, names, self.trained_classes)
            warnings += [
                f"{warning}; its metrics are over the others"
                for warning in absent({s: values[s] for s in seen}, self.classes)
            ]
            warnings += labels.alike(self.classes)
            warnings += labels.amounts(every, self.classes) if names is None and self.asked_kind == "auto" else []
        sets: dict[str, Any] = {}
        truncated: dict[str, int] = {}
        longest = min(max_length, self.max_length or max_length)
        for split in SPLITS:
            tokens, starts, truncated[split] = tokenise(texts[split], tokenizer, longest)
            targets = {"labels": torch.from_numpy(values[split])}
            sets[split] = TextDataset(tokens, starts, targets, padding_of(tokenizer, tokens))
        counts = ", ".join(f"{len(sets[split])} {split}" for split in seen)
        self._tell(columns, target, why, f"{rule} ({counts})", warnings, left_out, truncated)
        facts = {
            "source": source,
            "files": files,
            "columns": {"texts": list(columns), "label": target},
            "kind": self.kind,
            "counts": {split: len(sets[split]) for split in seen},
            "split_rule": rule,
            "max_length": longest,
            "tokenizer_sha256": fingerprint(tokenizer),
            "truncated": truncated,
            "missing": {"policy": self.missing, "left_out": left_out},
            "warnings": warnings,
        }
        if self.kind == "regression":
            facts["labels"] = dict(zip(("mean", "deviation"), self._units, strict=True))
        places = {} if rule in UNDRAWN else chosen
        drawn = {split: [data[place].where[row] for row in rows] for split, (place, rows) in places.items()}
        outputs = self.classes or [target]
        return Splits(**sets, num_classes=len(outputs), class_names=outputs, facts=facts, drawn=drawn)

    def forward(self, model: TextSpec) -> Forward:
        """Classify; of a regression numbers ``[B, 1]`` in the units of the labels."""
        if self.kind != "regression":
            return classify

        def forward(module: nn.Module, batch: Batch, training: bool) -> tuple[Tensor, Tensor]:
            outputs, targets = classify(module, batch, training)
            mean, deviation = self._units
            return outputs.float() * deviation + mean, targets

        return forward

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        """Cross-entropy, or the squared error of a regression in deviations of the training labels."""
        if self.kind != "regression":
            return super().loss(outputs, targets, label_smoothing)
        _, deviation = self._units
        return F.mse_loss(outputs.squeeze(-1) / deviation, targets / deviation)

    @property
    def _units(self) -> tuple[float, float]:
        return self._scale or (0.0, 1.0)

    def remember(self, facts: Mapping[str, Any]) -> None:
        """See Task.remember."""
        self.kind = self.asked_kind = facts["kind"]
        self.text_columns = tuple(facts["columns"]["texts"])
        if scale := facts.get("labels"):
            self._scale = scale["mean"], scale["deviation"]

    def report(self, metric: Any, splits: Splits, folder: Path) -> None:
        """Write ``confusion.png``, how the test's texts of each class were called; say what needs no model."""
        if self.kind == "regression":
            splits.facts["baseline"], lines = baselines.of_numbers(self._units[0], metric.called, metric.truth)
        else:
            known = cast(Any, splits.train).values["labels"].numpy()
            splits.facts["baseline"], lines = baselines.of_classes(
                known, metric.confusion, splits.class_names, self.usual_class
            )
            draw_confusion(metric.confusion, splits.class_names, folder / "confusion.png")
        for line in lines:
            say(f"{self.dataset}: {line}")

    def _place(self, data_dir: Path | None) -> Path | None:
        """Where the data lies; None: on the hub."""
        place = Path(data_dir or ".") / self.dataset
        for found in (place, Path(self.dataset)):
            if found.exists():
                return found
        if _HUB.fullmatch(self.dataset) and Path(self.dataset).suffix.lower() not in tables.FORMATS:
            return None
        close = difflib.get_close_matches(place.name, [p.name for p in place.parent.glob("*")], 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise DataError(f"there is no {place}: {hint}set paths.data, and task.dataset to a folder or file in it")

    def _tables(self, data_dir: Path | None) -> tuple[dict[str, Table], dict[str, Any], str]:
        """The rows of every split, facts of their files, and where they come from."""
        place = self._place(data_dir)
        if place is None:
            data = self._from_hub(Path(data_dir or ".") / self.dataset)
            return data, {split: tables.digest(table) for split, table in data.items()}, f"hub {self.dataset}"
        folder, everything = self.files(data_dir)
        manifest.check(folder, everything)
        data = {split: tables.read(paths) for split, paths in tables.find(place).items()}
        return data, {str(p.relative_to(folder)): {"sha256": sha256_of(p)} for p in everything}, "paths.data"

    def _from_hub(self, place: Path) -> dict[str, Table]:
        try:
            if not datasets.config.HF_HUB_OFFLINE:
                reach_hub()
            loaded = datasets.load_dataset(self.dataset, self.subset)
        except Exception as error:  # datasets raises almost any type
            raise DataError(
                f"there is no {place}, and nothing called {self.dataset} comes from the hub ({first_line(error)}): set "
                "paths.data, and task.dataset to a folder or file in it"
            ) from error
        data = {}
        for part, rows in loaded.items():
            if split := tables.split_of(str(part)):
                names = {n: list(k.names) for n, k in rows.features.items() if isinstance(k, datasets.ClassLabel)}
                where = [f"{self.dataset}, {part} row {number}" for number in range(len(rows))]
                data[split] = Table(list(rows.column_names), rows.to_list(), where, names)
        if "train" not in data:
            raise DataError(f"{self.dataset} of the hub has no train, but {', '.join(map(str, loaded))}")
        return data

    def _columns(self, table: Table) -> tuple[tuple[str, ...], str]:
        """The text columns and the label's."""
        target = tables.column(table, "task.label", self.label, _LABELS)
        if self.text is not None:
            asked = {"task.text": self.text, "task.text_pair": self.text_pair}
            texts = tuple(tables.column(table, key, name, ()) for key, name in asked.items() if name is not None)
        else:
            found = (tuple(tables.usual_column(table.columns, [name]) for name in pair) for pair in _PAIRS)
            pair = next((pair for pair in found if None not in pair), None)
            texts = pair or (tables.column(table, "task.text", None, _TEXTS),)  # type: ignore[assignment]
        if target in texts or len(set(texts)) < len(texts):
            raise ConfigError(f"task.text and task.label name one column twice: {', '.join((*texts, target))}")
        return texts, target

    def _split(self, strata: np.ndarray, counts: dict[str, int]) -> tuple[dict[str, tuple[str, np.ndarray]], str]:
        """Of each split, which one of the files its rows are in and which, and how that was done."""
        if self.split is not None and len(counts) > 1:
            raise ConfigError(f"task.split={self.split}: there is {' and '.join(counts)} already; leave it out")
        balanced = None if self.kind == "regression" else "class"
        if len(counts) == 1 and self.whole_test:
            return {split: ("train", np.arange(counts["train"])) for split in SPLITS}, WHOLE
        if len(counts) == 1:
            drawn = portions(strata, self.parts, self.split_seed)
            if empty := [split for split, rows in drawn.items() if not len(rows)]:
                raise DataError(
                    f"no {balanced or 'data'} has the three rows that {empty[0]} needs: add some; labels that are "
                    "numbers to predict need task.kind=regression"
                )
            rule = rule_of(self.parts, self.split_seed, balanced)
            return {split: ("train", rows) for split, rows in drawn.items()}, rule
        whole = {split: (split, np.arange(count)) for split, count in counts.items()}
        if len(counts) == len(SPLITS):
            return whole, AS_FILES
        kept, held = hold_out(strata, self.held_out, self.split_seed)
        if not len(held):
            raise DataError(
                f"task.held_out={self.held_out} of {len(strata)} rows leaves nothing to choose on: raise it"
            )
        test = whole[next(s for s in counts if s != "train")]
        parts = {"train": ("train", kept), "validation": ("train", held), "test": test}
        return parts, f"validation a drawn {self.held_out:.0%} of train, seed {self.split_seed}"

    def _tell(
        self,
        columns: Sequence[str],
        target: str,
        why: str,
        rule: str,
        warnings: Sequence[str],
        left_out: dict[str, int],
        truncated: dict[str, int],
    ) -> None:
        """Say in a line what was taken for what, and in others what is to be looked at."""
        what = f"{len(self.classes)} classes" if self.classes else "a number"
        say(
            f"{self.dataset}: text in {' and '.join(columns)}, label in {target}, {what} as {why} "
            f"(task.text, task.label and task.kind choose otherwise); splits {rule}"
        )
        for warning in warnings:
            say(f"{self.dataset}: {warning}")
        if count := sum(left_out.values()):
            say(f"{self.dataset}: {count} rows without a text or a label are left out")
        if count := sum(truncated.values()):
            say(f"{self.dataset}: {count} texts are longer than task.max_length or the model takes, and are cut")
