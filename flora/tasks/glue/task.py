"""GLUE: nine tasks of English understanding, classification of texts and pairs, and one regression.

Wang et al. 2019, "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding", arXiv
1804.07461. The labels of its test splits are hidden: results are those of the development sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from flora.errors import ConfigError, DataError, WeightsError
from flora.models.spec import ModelSpec
from flora.tasks.base import Splits, check_dataset, check_split_seed, draw
from flora.tasks.glue.datasets import DATASETS, DatasetInfo
from flora.tasks.glue.files import HUB, from_hub, read_folder, tables
from flora.tasks.metrics import Glue as GlueMetric
from flora.tasks.portions import hold_out
from flora.tasks.text.dataset import TextDataset
from flora.tasks.text.rows import Rows
from flora.tasks.text.task import TextTask
from flora.tasks.text.tokenise import fingerprint, padding_of, tokenise


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
        stratify: hold out the same share of every class, and of every unit of a regression's score; false: of all
            rows together, as records without this setting did.
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
        stratify: bool = False,
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
        self.stratify = stratify

    @property
    def info(self) -> DatasetInfo:
        """The dataset's row of DATASETS."""
        return DATASETS[self.dataset]

    @property
    def metric(self) -> str:  # type: ignore[override]
        """What GLUE reports; the first of two where it has two."""
        return self.info.metric

    @property
    def text_columns(self) -> tuple[str, ...]:  # type: ignore[override]
        """As the hub's files call them."""
        return self.info.columns

    def metrics(self) -> GlueMetric:
        """All metrics that GLUE defines for the dataset."""
        return GlueMetric(self.dataset)

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        """Cross-entropy, or the squared error of a regression."""
        if self.info.classes:
            return super().loss(outputs, targets, label_smoothing)
        return F.mse_loss(outputs.float().squeeze(-1), targets)

    def accepts(self, model: ModelSpec) -> None:
        """See Task.accepts."""
        super().accepts(model)
        if model.kind != "sequence_classification":
            raise ConfigError(f"model={model.name} writes text and has no classifier: choose e.g. model=minilm_l6")

    def load(self, *, tokenizer: Any, max_length: int, data_dir: Path | None) -> Splits:
        """See TextTask.load; from ``data_dir/glue/DATASET/*.parquet``, the official TSVs there, or the hub."""
        folder, source = self._folder(data_dir)
        rows_of = read_folder(folder, self.info)
        longest = min(max_length, self.max_length or max_length)
        facts: dict[str, Any] = {
            "source": source,
            "files": {name: fact for rows in rows_of.values() for name, fact in rows.facts["files"].items()},
            "max_length": longest,
            "tokenizer_sha256": fingerprint(tokenizer),
            "truncated": {},
            "warnings": [
                f"{split} has {len(rows_of[split])} rows, GLUE has {official}"
                for split, official in self.info.rows.items()
                if len(rows_of[split]) != official
            ],
        }
        sets = {}
        for split, rows in rows_of.items():
            sets[split], facts["truncated"][split] = self._encode(rows, tokenizer, longest)
        train, development = sets.pop("train"), sets.pop(next(iter(sets)))
        if self.held_out:
            kept, held = self._held_out(rows_of["train"].labels)
            train, validation = train.take(kept), train.take(held)
            stratum = (
                ("of each class of" if self.info.classes else "of each unit of the score of") if self.stratify else "of"
            )
            facts["split_rule"] = (
                f"validation a drawn {self.held_out:.0%} {stratum} train, seed {self.split_seed}; "
                "test the development set"
            )
        else:
            validation = development
            facts["split_rule"] = "selected and reported on the development set, as published"
        facts["counts"] = {"train": len(train), "validation": len(validation), "test": len(development)}
        names = list(self.info.classes) or ["score"]
        further = {name.removeprefix("validation_"): rows for name, rows in sets.items()}
        return Splits(train, validation, development, self.info.outputs, names, facts, further)

    def _held_out(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of train that stay and rows that are held out."""
        if self.stratify:
            # A score of 5 goes with those above 4.
            strata = labels if self.info.classes else np.minimum(np.floor(labels), 4)
            kept, held = hold_out(strata, self.held_out, self.split_seed)
        else:
            order = draw(len(labels), self.split_seed)
            kept, held = np.split(order, [len(order) - max(1, round(self.held_out * len(order)))])
        if not len(kept) or not len(held):
            raise DataError(f"{self.dataset}: train has {len(labels)} rows, none is left to hold out")
        return kept, held

    def _encode(self, rows: Rows, tokenizer: Any, max_length: int) -> tuple[TextDataset, int]:
        tokens, starts, truncated = tokenise(rows.texts, tokenizer, max_length)
        return TextDataset(tokens, starts, {"labels": rows.label_tensor()}, padding_of(tokenizer, tokens)), truncated

    def files(self, data_dir: Path | None) -> tuple[Path, list[Path]]:
        """See Task.files."""
        folder, _ = self._folder(data_dir)
        return folder, [path for paths in tables(folder, self.info).values() for path in paths]

    def _folder(self, data_dir: Path | None) -> tuple[Path, str]:
        """The folder that holds the data, and what it is called in a record."""
        places = []
        if data_dir is not None:
            folder = Path(data_dir) / "glue" / self.dataset
            for place in (folder, Path(data_dir) / "glue" / self.info.folder):
                if any(place.glob("*.parquet")) or (place / "train.tsv").is_file():
                    return place, "paths.data"
            places.append(f"{folder} holds no train*.parquet and no train.tsv")
        try:
            return from_hub(self.dataset), f"hub {HUB}"
        except WeightsError as error:
            places.append(f"hub {HUB}: {error}")
        raise DataError(f"no data for {self.dataset} ({'; '.join(places)}): set paths.data to a folder that has it")
