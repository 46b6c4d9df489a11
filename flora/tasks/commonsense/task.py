"""Commonsense reasoning with a language model: eight sets of questions with listed answers, as LLM-Adapters asks them.

Hu et al. 2023, "LLM-Adapters", arXiv 2304.01933: an instruction that lists the answers, and the response "the correct
answer is X". Their training mix of the eight sets is commonsense_170k.json.
"""

from __future__ import annotations

import itertools
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from flora.errors import ConfigError, DataError, WeightsError, first_line
from flora.models.weights import reach_hub
from flora.tasks import manifest
from flora.tasks.base import Batch, Forward, Splits, check_dataset, check_split_seed, cross_entropy, draw
from flora.tasks.commonsense.questions import (
    DATASETS,
    MIX,
    PROMPT,
    RESPONSE,
    Entry,
    Question,
    adapters_row,
    ask_all,
    with_passage,
)
from flora.tasks.metrics import Classification
from flora.tasks.text import TextDataset, TextTask, as_tensor, fingerprint, pad_or_end, starts_of, tokenise

_IMPOSSIBLE = -1e9


class Choices(Dataset[Batch]):
    """Questions to be answered: every listed answer as a continuation to score, or the bare prompt to continue.

    Args:
        rows: the sequences; ``labels`` per token are -100 except on the answer.
        first: int64 ``[N + 1]``, which sequences belong to each question, and the end.
        right: int64 ``[N]``, the right answer.
    """

    def __init__(self, rows: TextDataset, first: Tensor, right: Tensor):
        self.rows = rows
        self.first = first
        self.right = right
        lengths = np.array(rows.lengths)
        self.lengths = [int(lengths[a:b].max()) for a, b in itertools.pairwise(first.tolist())]
        self.most = int(first.diff().max())

    def __len__(self) -> int:
        return len(self.right)

    def __getitem__(self, index: int) -> Batch:
        """A batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The right answers ``[B]``, and all sequences ``[M, L]`` with their place among the scores ``[B, most]``."""
        counts = self.first.diff()[torch.as_tensor(indices)]
        sequences = [i for index in indices for i in range(int(self.first[index]), int(self.first[index + 1]))]
        found = self.rows.__getitems__(sequences)
        columns = torch.cat([torch.arange(int(count)) for count in counts])
        places = torch.arange(len(indices)).repeat_interleave(counts) * self.most + columns
        targets = found.pop("labels")
        return {"labels": self.right[torch.as_tensor(indices)], **found, "targets": targets, "places": places} | {
            "most": torch.tensor(self.most)
        }

    def subset(self, count: int, seed: int = 0) -> Choices:
        """``count`` questions in their old order, drawn with ``seed``."""
        if count >= len(self):
            return self
        chosen = np.sort(draw(len(self), seed)[:count])
        sequences = [np.arange(int(self.first[i]), int(self.first[i + 1])) for i in chosen]
        rows = self.rows.take(np.concatenate(sequences))
        return Choices(rows, starts_of(map(len, sequences)), self.right[torch.from_numpy(chosen)])


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
    def entry(self) -> Entry:
        """The dataset's row of DATASETS."""
        return DATASETS[self.dataset]

    def metrics(self) -> Classification:
        """Accuracy over the listed answers."""
        return Classification()

    def load_for(self, model: Any, data_dir: Path | None) -> Splits:
        """See Task.load_for."""
        if getattr(model, "kind", None) != "causal_lm":
            raise ConfigError(f"model={model.name} writes no text: choose a language model, e.g. model=smollm2_135m")
        return super().load_for(model, data_dir)

    def load(self, *, tokenizer: Any, max_length: int, data_dir: Path | None) -> Splits:
        """See TextTask.load; from ``data_dir/DATASET`` (parquet, or LLM-Adapters' JSON), or the hub."""
        folder = self._folder(data_dir)
        train, train_files = self.read_folder(folder, "train") if self.train == "own" else self._mix(data_dir)
        test, test_files = self.read_folder(folder, self.entry.test)
        if self.validation_size >= len(train):
            raise DataError(f"{self.dataset}: {len(train)} questions to train on, {self.validation_size} to hold out")
        order = draw(len(train), self.split_seed)
        held_out = [train[i] for i in order[: self.validation_size]]
        fitted = [train[i] for i in order[self.validation_size :]]
        coder = _Coder(tokenizer, min(max_length, self.max_length))
        sets: dict[str, Any] = {
            "train": coder.answered("train", fitted),
            "validation": coder.asked("validation", held_out),
            "test": coder.asked("test", test),
        }
        official = dict(zip(("train", "test"), self.entry.rows, strict=True))
        found = {"train": len(train), "test": len(test)}
        facts = {
            "source": "paths.data" if self._local(data_dir) else f"hub {self.entry.hub[0]}",
            "files": train_files | test_files,
            "counts": {split: len(part) for split, part in sets.items()},
            "split_rule": f"validation {self.validation_size} drawn from train, seed {self.split_seed}",
            "max_length": coder.max_length,
            "tokenizer_sha256": fingerprint(tokenizer),
            "truncated": coder.truncated,
            "warnings": coder.warnings
            + [
                f"{split} has {found[split]} questions, the original has {official[split]}"
                for split in official
                if found[split] != official[split] and not (split == "train" and self.train == "mix")
            ],
        }
        return Splits(**sets, num_classes=0, class_names=[], facts=facts)

    def forward(self, model: Any) -> Forward:
        """Logits of the answers' tokens ``[B, K, V]`` in training, else a score for every listed answer ``[B, C]``."""
        tokenizer = model.tokenizer() if self.answers == "generated" else None

        def forward(module: nn.Module, batch: Batch, training: bool) -> Tensor:
            if training:
                logits, batch["labels"] = answer_logits(module, batch, batch["labels"])
                return logits
            return generated(module, batch, tokenizer) if tokenizer is not None else likelihoods(module, batch)

        return forward

    def loss(self, outputs: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        """Cross-entropy of the answers' tokens, or of the scores where questions are asked."""
        if outputs.ndim == 2:
            return cross_entropy(outputs, labels)
        return cross_entropy(outputs.flatten(0, 1), labels.flatten(), label_smoothing)

    def _folder(self, data_dir: Path | None) -> Path:
        if local := self._local(data_dir):
            return local
        reason = "paths.data is not set" if data_dir is None else f"{data_dir} has no folder {self.dataset}"
        try:
            return self.from_hub()
        except DataError as error:
            raise DataError(
                f"no data for {self.dataset} ({reason}; {error}): "
                f"set paths.data to a folder that holds {self.dataset}/train*.parquet"
            ) from error

    def from_hub(self) -> Path:
        """The folder of the hub's cache with the dataset's files; DataError where they cannot be had."""
        repository, configuration = self.entry.hub
        options: dict[str, Any] = {
            "repo_type": "dataset",
            "revision": "refs/convert/parquet",
            "allow_patterns": f"{configuration}/*",
        }
        try:
            reach_hub()
            return Path(huggingface_hub.snapshot_download(repository, **options)) / configuration
        except (WeightsError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise DataError(f"hub {repository}: {first_line(error)}") from error

    def _local(self, data_dir: Path | None) -> Path | None:
        places = [Path(data_dir) / name for name in (self.dataset, self.entry.folder)] if data_dir is not None else []
        return next((place for place in places if place.is_dir()), None)

    def read_folder(self, folder: Path, split: str) -> tuple[list[Question], dict[str, Any]]:
        """A split, from parquet files, or from LLM-Adapters' JSON, where the reported split is called test."""
        paths = sorted([*folder.glob(f"{split}*.parquet"), *folder.glob(f"{split}/*.parquet")])
        ask = with_passage if self.passage else self.entry.ask
        if not paths:
            paths = [folder / f"{'train' if split == 'train' else 'test'}.json"]
            ask = adapters_row
            if not paths[0].is_file():
                raise DataError(f"{folder}: neither {split}*.parquet nor {paths[0].name}; fetch the dataset again")
        manifest.check(folder, paths)
        return ask_all(paths, ask)

    def _mix(self, data_dir: Path | None) -> tuple[list[Question], dict[str, Any]]:
        path = Path(data_dir or "") / MIX
        if not path.is_file():
            raise DataError(f"task.train=mix: there is no {path}; fetch it from the repository of LLM-Adapters")
        return ask_all([path], adapters_row)


def answer_logits(module: nn.Module, batch: Batch, targets: Tensor, **images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[B, K, V]`` for the last K tokens, which hold every target, and those targets ``[B, K]``.

    Sequences end where the answers end (they are padded on the left), so that the rest needs no logits. ``images`` is
    what the network takes beside them.
    """
    kept = targets.shape[1] - int((targets != -100).any(0).nonzero()[0])
    mask = batch["attention_mask"]
    logits = module(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=kept + 1,
        use_cache=False,
        **images,
    ).logits
    return logits[:, :-1], targets[:, -kept:]


def likelihoods(module: nn.Module, batch: Batch) -> Tensor:
    """Log-probability of every listed answer given its prompt, ``[B, most]``."""
    logits, targets = answer_logits(module, batch, batch["targets"])
    lost = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    scores = torch.full((len(batch["labels"]), int(batch["most"])), _IMPOSSIBLE, device=lost.device)
    scores.view(-1)[batch["places"]] = -lost.view(targets.shape).sum(1)
    return scores


def generated(module: nn.Module, batch: Batch, tokenizer: Any) -> Tensor:
    """One-hot choice of the listed answer that greedy decoding names first, ``[B, most + 1]``; the last: none."""
    most, targets = int(batch["most"]), batch["targets"]
    asked = batch["places"] % most == 0  # the first sequence of each question
    is_prompt = batch["attention_mask"].bool() & (targets == -100)
    prompts = [ids[inside] for ids, inside in zip(batch["input_ids"][asked], is_prompt[asked], strict=True)]
    pad = pad_or_end(tokenizer)
    padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left", padding_value=pad)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
    written = getattr(module, "module", module).generate(  # type: ignore[operator]
        input_ids=padded,
        attention_mask=mask,
        max_new_tokens=int((targets != -100).sum(1).max()),
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts = tokenizer.batch_decode(written[:, padded.shape[1] :], skip_special_tokens=True)
    listed: list[list[str]] = [[] for _ in texts]
    for place, row in zip(batch["places"].tolist(), targets, strict=True):
        listed[place // most].append(tokenizer.decode(row[row != -100], skip_special_tokens=True).split()[-1])
    picked = [named(text, answers) for text, answers in zip(texts, listed, strict=True)]
    return F.one_hot(torch.tensor([most if i is None else i for i in picked], device=mask.device), most + 1).float()


def named(text: str, answers: Sequence[str]) -> int | None:
    """Which of the answers a text names first; None if none."""
    places = [(text.lower().find(answer), i) for i, answer in enumerate(answers)]
    return min(((place, i) for place, i in places if place >= 0), default=(0, None))[1]


class _Coder:
    """Questions as sequences: the prompt, then an answer, of which every token and the end are targets."""

    def __init__(self, tokenizer: Any, max_length: int):
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no token that ends a text: name one in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncated: dict[str, int] = {}
        self.warnings = ["no pad token: the end token pads"] if tokenizer.pad_token_id is None else []
        self._answers: dict[str, list[int]] = {}

    def answered(self, split: str, questions: Sequence[Question]) -> TextDataset:
        """One sequence a question, with its right answer."""
        return self._rows(split, questions, [(question.right,) for question in questions])

    def asked(self, split: str, questions: Sequence[Question]) -> Choices:
        """One sequence for each listed answer."""
        rows = self._rows(split, questions, [tuple(range(len(question.answers))) for question in questions])
        first = starts_of(len(question.answers) for question in questions)
        return Choices(rows, first, torch.tensor([question.right for question in questions]))

    def _rows(self, split: str, questions: Sequence[Question], wanted: Sequence[Sequence[int]]) -> TextDataset:
        prompts = [(PROMPT.format(instruction=question.instruction),) for question in questions]
        tokens, starts, _ = tokenise(prompts, self.tokenizer, sys.maxsize)
        ids, targets = array("i"), array("i")
        lengths: list[int] = []
        self.truncated[split] = 0
        for i, (question, chosen) in enumerate(zip(questions, wanted, strict=True)):
            prompt = tokens["input_ids"][starts[i] : starts[i + 1]].tolist()
            if prompt[-1] == self.tokenizer.eos_token_id:
                prompt.pop()  # some tokenizers end every text
            answers = [self._answer(answer) for answer in question.answers]
            room = self.max_length - max(map(len, answers))
            self.truncated[split] += len(prompt) > room
            for answer in (answers[c] for c in chosen):
                ids.extend(prompt[-room:] + answer)
                targets.extend([-100] * len(prompt[-room:]) + answer)
                lengths.append(len(prompt[-room:]) + len(answer))
        fields = {"input_ids": as_tensor(ids), "labels": as_tensor(targets)}
        padding = {"input_ids": pad_or_end(self.tokenizer), "labels": -100}
        return TextDataset(fields, starts_of(lengths), {}, padding, left=True)

    def _answer(self, answer: str) -> list[int]:
        if answer not in self._answers:
            text = RESPONSE.format(answer=answer)
            found = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            self._answers[answer] = [*found, self.tokenizer.eos_token_id]
        return self._answers[answer]
