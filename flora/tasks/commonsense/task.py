"""Commonsense reasoning with a language model: eight sets of questions with listed answers, as LLM-Adapters asks them.

Hu et al. 2023, "LLM-Adapters", arXiv 2304.01933 (github.com/AGI-Edgerunners/LLM-Adapters, finetune.py and
commonsense_evaluate.py): an instruction that lists the answers, and the response "the correct answer is X". Their
training mix of the eight sets is commonsense_170k.json; one model is trained on it and answers all eight.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from flora.errors import ConfigError, DataError
from flora.models.spec import ModelSpec, TextSpec
from flora.tasks.base import Batch, Forward, Splits, check_dataset, check_split_seed, cross_entropy, draw
from flora.tasks.commonsense.coder import Coder
from flora.tasks.commonsense.files import from_hub, mix, read_folder, read_mix, tables
from flora.tasks.commonsense.questions import (
    DATASETS,
    EIGHT,
    Question,
    usual_answers,
)
from flora.tasks.commonsense.scores import generated, likelihoods, usual
from flora.tasks.metrics import Classification, SetsOfQuestions
from flora.tasks.text.causal import answer_logits, answer_loss, sequence_losses, write_out
from flora.tasks.text.dataset import TextDataset
from flora.tasks.text.task import TextTask
from flora.tasks.text.tokenise import fingerprint, pad_or_end

_MAX_NEW_TOKENS = 32  # as LLM-Adapters'
_ALL = "all"


class Commonsense(TextTask):
    """One of the eight sets, all of them, or SST-2 for small models.

    Args:
        name: of the family, as records show it.
        dataset: a key of DATASETS; or ``all``: one model, trained on the mix, answers the eight sets, ``accuracy``
            being the mean of theirs.
        epochs: default length of training.
        train: ``own`` (the dataset's training split) or ``mix`` (LLM-Adapters' commonsense_170k.json).
        loss_on: what training learns: the ``sequence``, prompt and answer, cut at its end; or the ``answer`` alone,
            the prompt cut at its beginning (flora.tasks.commonsense.coder).
        answers: how the test is taken: ``likelihood`` (the listed answer of highest probability); ``generated`` (the
            first listed answer that what is written names; none of them counts as wrong); or ``majority`` (the answer
            that is most often right in training, whatever is asked).
        beams: of the search for what is written.
        passage: show BoolQ's passage, which LLM-Adapters does not.
        max_length: tokens of a sequence to train on; what is cut is counted in the record.
        validation_size: questions drawn from train to choose on.
        split_seed: of that draw.

    Raises:
        ConfigError: for an unknown dataset or a value out of range.
    """

    metric = "accuracy"
    text_columns = ("instruction",)
    max_length: int

    def __init__(
        self,
        *,
        name: str,
        dataset: str,
        epochs: float,
        train: str = "own",
        loss_on: str = "answer",
        answers: str = "likelihood",
        beams: int = 1,
        passage: bool = False,
        max_length: int = 256,
        validation_size: int = 120,
        split_seed: int = 0,
    ):
        check_dataset(dataset, [*DATASETS, _ALL])
        check_split_seed(split_seed)
        for key, value, allowed in (
            ("train", train, ("own", "mix")),
            ("loss_on", loss_on, ("sequence", "answer")),
            ("answers", answers, ("likelihood", "generated", "majority")),
        ):
            if value not in allowed:
                raise ConfigError(f"task.{key}={value} must be {' or '.join(allowed)}")
        if dataset == _ALL and train != "mix":
            raise ConfigError("task.dataset=all: one model is trained on the mix of the eight sets; set task.train=mix")
        if not isinstance(beams, int) or beams < 1:
            raise ConfigError(f"task.beams={beams} must be at least 1")
        if passage and dataset != "boolq":
            raise ConfigError(f"task.passage=true: only boolq has passages, {dataset} has none")
        if max_length < 32 or validation_size < 1:
            raise ConfigError("task.max_length must be at least 32 and task.validation_size at least 1")
        self.name = name
        self.dataset = dataset
        self.epochs = epochs
        self.train = train
        self.loss_on = loss_on
        self.answers = answers
        self.beams = beams
        self.passage = passage
        self.max_length = max_length
        self.validation_size = validation_size
        self.split_seed = split_seed

    @property
    def sets(self) -> tuple[str, ...]:
        """The keys of DATASETS that are tested."""
        return EIGHT if self.dataset == _ALL else (self.dataset,)

    def metrics(self) -> Classification:
        """Accuracy over the listed answers; of several sets, that of each and their mean."""
        return SetsOfQuestions(self.sets) if self.dataset == _ALL else Classification()

    def accepts(self, model: ModelSpec) -> None:
        """See Task.accepts."""
        if model.kind != "causal_lm":
            raise ConfigError(f"model={model.name} writes no text: choose a language model, e.g. model=smollm2_135m")

    def files(self, data_dir: Path | None) -> tuple[Path, list[Path]]:
        """See Task.files; with LLM-Adapters' mix, the folder is ``data_dir``."""
        folders = {name: self._folder(data_dir, name) for name in self.sets}
        test = [path for name, folder in folders.items() for path in tables(folder, DATASETS[name].test)]
        if self.train == "mix":
            return Path(data_dir or ""), [mix(data_dir), *test]
        folder = folders[self.dataset]
        return folder, [*tables(folder, "train"), *test]

    def load(self, *, tokenizer: Any, max_length: int, data_dir: Path | None) -> Splits:
        """See TextTask.load; from ``data_dir/DATASET`` (parquet, or LLM-Adapters' JSON), or the hub."""
        tests: list[list[Question]] = []
        files: dict[str, Any] = {}
        warnings: list[str] = []
        for name in self.sets:
            info, folder = DATASETS[name], self._folder(data_dir, name)
            test, facts_of_test = read_folder(folder, info, info.test, passage=self.passage)
            tests.append(test)
            files |= {(f"{name}/{key}" if self.dataset == _ALL else key): fact for key, fact in facts_of_test.items()}
            if len(test) != info.rows[1]:
                warnings.append(f"test has {len(test)} questions, the original of {name} has {info.rows[1]}")
        if self.train == "mix":
            train, train_files = read_mix(data_dir)
        else:
            info = DATASETS[self.dataset]
            train, train_files = read_folder(self._folder(data_dir, self.dataset), info, "train", self.passage)
            if len(train) != info.rows[0]:
                warnings.append(f"train has {len(train)} questions, the original has {info.rows[0]}")
        if self.validation_size >= len(train):
            raise DataError(f"{self.dataset}: {len(train)} questions to train on, {self.validation_size} to hold out")
        order = draw(len(train), self.split_seed)
        held_out = [train[i] for i in order[: self.validation_size]]
        fitted = [train[i] for i in order[self.validation_size :]]
        longest = min(max_length, self.max_length)
        coder = Coder(tokenizer, longest, self.loss_on, max_length if self.loss_on == "sequence" else longest)
        answered = coder.answered("validation", held_out)
        asked: list[Question] = [question for test in tests for question in test]
        numbers = [number for number, test in enumerate(tests) for _ in test] if self.dataset == _ALL else None
        sets: dict[str, Any] = {
            "train": coder.answered("train", fitted),
            "validation": coder.asked(
                "validation", held_out, usual_answers(fitted, held_out), numbers and [-1] * len(held_out)
            ).with_answers(answered),
            "test": coder.asked("test", asked, usual_answers(fitted, asked), numbers),
        }
        facts = {
            "source": "paths.data" if all(self._local(data_dir, name) for name in self.sets) else "hub",
            "files": train_files | files,
            "counts": {split: len(part) for split, part in sets.items()},
            "split_rule": f"validation {self.validation_size} drawn from train, seed {self.split_seed}",
            "max_length": coder.max_length,
            "tokenizer_sha256": fingerprint(tokenizer),
            "truncated": coder.truncated,
            "warnings": coder.warnings + warnings,
        }
        return Splits(**sets, num_classes=0, class_names=[], facts=facts)

    def forward(self, model: TextSpec) -> Forward:
        """In training, logits ``[B, K, V]`` and targets ``[B, K]`` of the last tokens, which hold what is learnt.

        Else a score for every listed answer ``[B, C]``; and which of them is right, or, where training's sequences
        come along, their summed losses and numbers of targets ``[B, 2]``.
        """
        tokenizer = model.tokenizer() if self.answers == "generated" else None

        def forward(module: nn.Module, batch: Batch, training: bool) -> tuple[Tensor, Tensor]:
            if training:
                return answer_logits(module, batch, batch["labels"])
            if "answered_input_ids" in batch:  # to choose on: nothing is written, and the loss is that of training
                rows = {name: batch[f"answered_{name}"] for name in ("input_ids", "attention_mask", "labels")}
                losses = sequence_losses(*answer_logits(module, rows, rows["labels"]))
                return (usual(batch) if self.answers == "majority" else likelihoods(module, batch)), losses
            if self.answers == "majority":
                return usual(batch), batch["labels"]
            if tokenizer is not None:
                return generated(module, batch, tokenizer, _MAX_NEW_TOKENS, self.beams), batch["labels"]
            return likelihoods(module, batch), batch["labels"]

        return forward

    def unlabelled(self, model: TextSpec, inputs: Sequence[Any]) -> TextDataset:
        """Instructions in full, with the answers that they list; prompts that are too long lose their beginning."""
        tokenizer = model.tokenizer()
        longest = model.max_length if self.loss_on == "sequence" else min(model.max_length, self.max_length)
        return Coder(tokenizer, longest).prompts([text for (text,) in self._texts(inputs)], _MAX_NEW_TOKENS)

    def predicting(self, model: TextSpec) -> Forward:
        """What the model writes after the prompt ``[B, T]``, and the numbers of the inputs ``[B]``."""
        tokenizer = model.tokenizer()

        def forward(module: nn.Module, batch: Batch, training: bool) -> tuple[Tensor, Tensor]:
            ids, mask, pad = batch["input_ids"], batch["attention_mask"], pad_or_end(tokenizer)
            written = write_out(module, ids, mask, _MAX_NEW_TOKENS, pad, tokenizer.eos_token_id, self.beams)
            return written, batch["labels"]

        return forward

    def written(self, model: TextSpec, tokens: np.ndarray) -> str:
        """See Task.written."""
        return model.tokenizer().decode(tokens[tokens >= 0], skip_special_tokens=True).strip()

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        """Cross-entropy of the tokens to be learnt, or of the scores where questions are asked."""
        if targets.is_floating_point():
            return targets[:, 0].sum() / targets[:, 1].sum()
        if outputs.ndim == 2:
            return cross_entropy(outputs, targets if targets.ndim == 1 else targets[:, 0])
        return answer_loss(outputs, targets, label_smoothing)

    def _folder(self, data_dir: Path | None, name: str) -> Path:
        if local := self._local(data_dir, name):
            return local
        reason = "paths.data is not set" if data_dir is None else f"{data_dir} has no folder {name}"
        try:
            return from_hub(DATASETS[name])
        except DataError as error:
            raise DataError(
                f"no data for {name} ({reason}; {error}): set paths.data to a folder that holds {name}/train*.parquet"
            ) from error

    def _local(self, data_dir: Path | None, name: str) -> Path | None:
        places = [Path(data_dir) / place for place in (name, DATASETS[name].folder)] if data_dir is not None else []
        return next((place for place in places if place.is_dir()), None)
