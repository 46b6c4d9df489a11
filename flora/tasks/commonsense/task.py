"""Commonsense reasoning with a language model: eight sets of questions with listed answers, as LLM-Adapters asks them.

Hu et al. 2023, "LLM-Adapters", arXiv 2304.01933: an instruction that lists the answers, and the response "the correct
answer is X". Their training mix of the eight sets is commonsense_170k.json.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flora.errors import ConfigError, DataError
from flora.models.spec import ModelSpec, TextSpec
from flora.tasks.base import Batch, Forward, Splits, check_dataset, check_split_seed, cross_entropy, draw
from flora.tasks.commonsense.coder import Coder
from flora.tasks.commonsense.files import from_hub, mix, read_folder, read_mix, tables
from flora.tasks.commonsense.questions import (
    DATASETS,
    DatasetInfo,
)
from flora.tasks.commonsense.scores import generated, likelihoods
from flora.tasks.metrics import Classification
from flora.tasks.text.causal import answer_logits, answer_loss
from flora.tasks.text.task import TextTask
from flora.tasks.text.tokenise import fingerprint


class Commonsense(TextTask):
    """One of the eight sets.

    Args:
        name: of the family, as records show it.
        dataset: a key of DATASETS.
        epochs: default length of training.
        train: ``own`` (the dataset's training split) or ``mix`` (LLM-Adapters' commonsense_170k.json).
        answers: how the test is taken: ``likelihood`` (the listed answer of highest probability) or ``generated`` (the
            first listed answer that greedy decoding names; none of them counts as wrong).
        passage: show BoolQ's passage, which LLM-Adapters does not.
        max_length: tokens; longer prompts lose their beginning, and are counted in the record.
        validation_size: questions drawn from train to choose on.
        split_seed: of that draw.

    Raises:
        ConfigError: for an unknown dataset or a value out of range.
    """

    metric = "accuracy"

    def __init__(
        self,
        *,
        name: str,
        dataset: str,
        epochs: float,
        train: str = "own",
        answers: str = "likelihood",
        passage: bool = False,
        max_length: int = 256,
        validation_size: int = 120,
        split_seed: int = 0,
    ):
        check_dataset(dataset, DATASETS)
        check_split_seed(split_seed)
        for key, value, allowed in (
            ("train", train, ("own", "mix")),
            ("answers", answers, ("likelihood", "generated")),
        ):
            if value not in allowed:
                raise ConfigError(f"task.{key}={value} must be {' or '.join(allowed)}")
        if passage and dataset != "boolq":
            raise ConfigError(f"task.passage=true: only boolq has passages, {dataset} has none")
        if max_length < 32 or validation_size < 1:
            raise ConfigError("task.max_length must be at least 32 and task.validation_size at least 1")
        self.name = name
        self.dataset = dataset
        self.epochs = epochs
        self.train = train
        self.answers = answers
        self.passage = passage
        self.max_length = max_length
        self.validation_size = validation_size
        self.split_seed = split_seed

    @property
    def info(self) -> DatasetInfo:
        """The dataset's row of DATASETS."""
        return DATASETS[self.dataset]

    def metrics(self) -> Classification:
        """Accuracy over the listed answers."""
        return Classification()

    def accepts(self, model: ModelSpec) -> None:
        """See Task.accepts."""
        if model.kind != "causal_lm":
            raise ConfigError(f"model={model.name} writes no text: choose a language model, e.g. model=smollm2_135m")

    def files(self, data_dir: Path | None) -> tuple[Path, list[Path]]:
        """See Task.files; with LLM-Adapters' mix, the folder is ``data_dir``."""
        folder = self._folder(data_dir)
        test = tables(folder, self.info.test)
        if self.train == "mix":
            return Path(data_dir or ""), [mix(data_dir), *test]
        return folder, [*tables(folder, "train"), *test]

    def load(self, *, tokenizer: Any, max_length: int, data_dir: Path | None) -> Splits:
        """See TextTask.load; from ``data_dir/DATASET`` (parquet, or LLM-Adapters' JSON), or the hub."""
        read = partial(read_folder, self._folder(data_dir), self.info, passage=self.passage)
        train, train_files = read("train") if self.train == "own" else read_mix(data_dir)
        test, test_files = read(self.info.test)
        if self.validation_size >= len(train):
            raise DataError(f"{self.dataset}: {len(train)} questions to train on, {self.validation_size} to hold out")
        order = draw(len(train), self.split_seed)
        held_out = [train[i] for i in order[: self.validation_size]]
        fitted = [train[i] for i in order[self.validation_size :]]
        coder = Coder(tokenizer, min(max_length, self.max_length))
        sets: dict[str, Any] = {
            "train": coder.answered("train", fitted),
            "validation": coder.asked("validation", held_out),
            "test": coder.asked("test", test),
        }
        official = dict(zip(("train", "test"), self.info.rows, strict=True))
        counts = {"train": len(train), "test": len(test)}
        facts = {
            "source": "paths.data" if self._local(data_dir) else f"hub {self.info.hub[0]}",
            "files": train_files | test_files,
            "counts": {split: len(part) for split, part in sets.items()},
            "split_rule": f"validation {self.validation_size} drawn from train, seed {self.split_seed}",
            "max_length": coder.max_length,
            "tokenizer_sha256": fingerprint(tokenizer),
            "truncated": coder.truncated,
            "warnings": coder.warnings
            + [
                f"{split} has {counts[split]} questions, the original has {official[split]}"
                for split in official
                if counts[split] != official[split] and not (split == "train" and self.train == "mix")
            ],
        }
        return Splits(**sets, num_classes=0, class_names=[], facts=facts)

    def forward(self, model: TextSpec) -> Forward:
        """In training, logits ``[B, K, V]`` and targets ``[B, K]`` of the last tokens, which hold the answers.

        Else a score for every listed answer ``[B, C]``, and which of them is right ``[B]``.
        """
        tokenizer = model.tokenizer() if self.answers == "generated" else None

        def forward(module: nn.Module, batch: Batch, training: bool) -> tuple[Tensor, Tensor]:
            if training:
                return answer_logits(module, batch, batch["labels"])
            scores = generated(module, batch, tokenizer) if tokenizer is not None else likelihoods(module, batch)
            return scores, batch["labels"]

        return forward

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        """Cross-entropy of the answers' tokens, or of the scores where questions are asked."""
        if outputs.ndim == 2:
            return cross_entropy(outputs, targets)
        return answer_loss(outputs, targets, label_smoothing)

    def _folder(self, data_dir: Path | None) -> Path:
        if local := self._local(data_dir):
            return local
        reason = "paths.data is not set" if data_dir is None else f"{data_dir} has no folder {self.dataset}"
        try:
            return from_hub(self.info)
        except DataError as error:
            raise DataError(
                f"no data for {self.dataset} ({reason}; {error}): "
                f"set paths.data to a folder that holds {self.dataset}/train*.parquet"
            ) from error

    def _local(self, data_dir: Path | None) -> Path | None:
        places = [Path(data_dir) / name for name in (self.dataset, self.info.folder)] if data_dir is not None else []
        return next((place for place in places if place.is_dir()), None)
