"""Multimodal instruction tuning, as LLaVA does it: a model learns to write answers to questions about images.

Liu et al. 2023, "Visual Instruction Tuning", arXiv 2304.08485, and "Improved Baselines", arXiv 2310.03744. Stage 1
trains the projector alone (adapter=linear_probe), stage 2 the projector and adapters on the language model, starting
from that projector (model.projector=DIR).
"""

from __future__ import annotations

import bisect
import itertools
import textwrap
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from flora.errors import ConfigError, DataError
from flora.models.chat import Place
from flora.tasks import dialogues, manifest
from flora.tasks.answers import Written
from flora.tasks.base import Batch, Forward, Splits, Task, check_split_seed, cross_entropy, draw
from flora.tasks.commonsense import answer_logits
from flora.tasks.dialogues import IMAGE, Asked, Dialogue, Pictures, Row
from flora.tasks.images import as_rgb, as_square
from flora.tasks.text import TextDataset, as_tensor, fingerprint, pad_or_end, starts_of

_ASK = {"easy_vqa": dialogues.easy_vqa, "nlvr": dialogues.nlvr}  # others read as dialogues.plain
_NAMES = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
_CHUNK = 1000  # conversations tokenised at a time
_SHEET = (4, 6)  # rows and columns of the contact sheet


class Shown(Dataset[Batch]):
    """Sequences and the images that they show, decoded when a batch asks for them.

    Args:
        rows: the sequences, padded on the left.
        images: of each, indices into ``pictures``.
        pictures: every image of the task.
        pixels: from an RGB image to uint8 ``[H, W, 3]``.
        unreadable: bool ``[all images]``, takes note of those that cannot be decoded, in memory that worker processes
            share; None: they are an error.
    """

    def __init__(
        self,
        rows: TextDataset,
        images: Sequence[tuple[int, ...]],
        pictures: Pictures,
        pixels: Callable[[Any], np.ndarray],
        unreadable: Tensor | None = None,
    ):
        self.rows, self.images, self.pictures = rows, images, pictures
        self.pixels, self.unreadable = pixels, unreadable
        self.lengths = rows.lengths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """A batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Fields of TextDataset ``[B, L]`` or ``[B]``, and ``pixel_values`` uint8 ``[images, 3, H, W]`` if any.

        Examples with an image that is skipped are left out.
        """
        decoded = {i: self._decode(i) for i in sorted({i for index in indices for i in self.images[index]})}
        kept = [index for index in indices if all(decoded[i] is not None for i in self.images[index])]
        if not kept:
            name = self.pictures.names[self.images[indices[0]][0]]
            raise DataError(f"{name} and {len(indices) - 1} more: a whole batch cannot be decoded")
        batch = self.rows.__getitems__(kept)
        if shown := [decoded[i] for index in kept for i in self.images[index]]:
            batch["pixel_values"] = torch.from_numpy(np.stack(shown).transpose(0, 3, 1, 2))  # type: ignore[arg-type]
        return batch

    def concat(self, other: Shown) -> Shown:
        """Both after each other; ConfigError where one is to be answered."""
        if self.rows.tokens.keys() != other.rows.tokens.keys():
            raise ConfigError("protocol.final_train: this task cannot train on its validation split; set it to train")
        return self._with(self.rows.concat(other.rows), [*self.images, *other.images])

    def subset(self, count: int, seed: int = 0) -> Shown:
        """``count`` examples in their old order, drawn with ``seed``."""
        if count >= len(self):
            return self
        chosen = np.sort(draw(len(self), seed)[:count])
        return self._with(self.rows.take(chosen), [self.images[i] for i in chosen])

    def _with(self, rows: TextDataset, images: Sequence[tuple[int, ...]]) -> Shown:
        return Shown(rows, images, self.pictures, self.pixels, self.unreadable)

    def _decode(self, index: int) -> np.ndarray | None:
        try:
            return self.pixels(as_rgb(self.pictures.openers[index], self.pictures.names[index]))
        except DataError:
            if self.unreadable is None:
                raise
            self.unreadable[index] = True
            return None


class Instruct(Task):
    """Conversations about images.

    Args:
        name: of the family, as records show it.
        dataset: a folder of ``paths.data``: ``easy_vqa``, ``nlvr``, ``llava_instruct``, or any other, with
            ``train*``, perhaps ``validation*`` and ``test*`` as parquet (image, question, answer or answers, perhaps
            type) or as LLaVA's JSON beside the folder ``images``.
        epochs: default length of training.
        metric: ``exact_match`` or ``vqa_accuracy`` (of sets with several answers a question).
        suffix: words after every question of a parquet file; LLaVA-1.5 asks "Answer the question using a single word or
            phrase."
        max_length: tokens; longer texts are cut and counted, images never; None: what the model takes.
        max_new_tokens: the longest answer that is written.
        validation_size: questions held out from train to choose on, with all others about the same images, where the
            files have no validation split.
        split_seed: of that draw.
        unreadable: ``error``, or ``skip`` to leave out and count images that cannot be decoded.

    Raises:
        ConfigError: for a value out of range.
    """

    def __init__(
        self,
        *,
        name: str,
        dataset: str,
        epochs: float,
        metric: str = "exact_match",
        suffix: str | None = None,
        max_length: int | None = None,
        max_new_tokens: int = 16,
        validation_size: int = 200,
        split_seed: int = 0,
        unreadable: str = "error",
    ):
        for key, value, known in (
            ("metric", metric, ("exact_match", "vqa_accuracy")),
            ("unreadable", unreadable, ("error", "skip")),
        ):
            if value not in known:
                raise ConfigError(f"task.{key}={value} must be {' or '.join(known)}")
        for key, number in (("max_new_tokens", max_new_tokens), ("validation_size", validation_size)):
            if not isinstance(number, int) or number < 1:
                raise ConfigError(f"task.{key}={number} must be a whole number of at least 1")
        if max_length is not None and max_length < 32:
            raise ConfigError(f"task.max_length={max_length} must be at least 32, or null")
        check_split_seed(split_seed)
        self.name, self.dataset, self.epochs, self.metric = name, dataset, epochs, metric
        self.suffix = suffix
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self.validation_size, self.split_seed = validation_size, split_seed
        self.unreadable = unreadable
        self._asked: list[Dialogue] = []  # questions of validation and test, which batches name by index
        self._coder: Coder | None = None

    def load_for(self, model: Any, data_dir: Path | None) -> Splits:
        """See Task.load_for."""
        if getattr(model, "kind", None) != "image_text":
            raise ConfigError(
                f"model={model.name} does not both see and write: choose model=llava_mini or model=llava_1_5_7b"
            )
        pictures = Pictures()
        found, files = self._read(Path(data_dir or ".") / self.dataset, pictures)
        rule = "as in the files"
        if "validation" not in found or "test" not in found:
            rest, held_out = hold_out(found["train"], self.validation_size, self.split_seed)
            rule = f"validation {len(held_out)} drawn by image from train, seed {self.split_seed}"
            found = {"test": found.get("validation", held_out)} | found | {"train": rest, "validation": held_out}
        self._check_metric(found["validation"] + found["test"])
        self._coder = coder = Coder(model, self.max_length, self.max_new_tokens)
        fill = tuple(int(255 * value) for value in model.mean)
        pixels = partial(
            as_square, size=model.image_size, interpolation=model.interpolation, how=model.aspect, fill=fill
        )
        noted = torch.zeros(len(pictures.openers), dtype=torch.bool).share_memory_()
        skips = noted if self.unreadable == "skip" else None
        self._asked = found["validation"] + found["test"]
        rows = {
            "train": coder.answered("train", found["train"]),
            "validation": coder.asked("validation", found["validation"], 0),
            "test": coder.asked("test", found["test"], len(found["validation"])),
        }
        sets: dict[str, Any] = {
            split: Shown(part, [dialogue.images for dialogue in found[split]], pictures, pixels, skips)
            for split, part in rows.items()
        }
        facts = {
            "source": "paths.data",
            "files": files,
            "counts": {split: len(part) for split, part in sets.items()},
            "split_rule": rule,
            "majority": majority(found["train"], found["test"]),
            "image_tokens": model.image_tokens,
            "max_length": coder.max_length,
            "tokenizer_sha256": fingerprint(coder.tokenizer),
            "truncated": coder.truncated,
            "unreadable": {"policy": self.unreadable},
            "warnings": coder.warnings,
        }
        return Splits(**sets, num_classes=0, class_names=[], facts=facts)

    def forward(self, model: Any) -> Forward:
        """Logits of the answers' tokens ``[B, K, V]`` in training, else the tokens of written answers ``[B, T]``."""
        assert self._coder is not None, "load_for comes first"
        coder = self._coder

        def forward(module: nn.Module, batch: Batch, training: bool) -> Tensor:
            images = {name: model.normalize(batch[name]) for name in ("pixel_values",) if name in batch}
            if training:
                logits, batch["labels"] = answer_logits(module, batch, batch["labels"], **images)
                return logits
            written = getattr(module, "module", module).generate(  # type: ignore[operator]
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                **images,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                pad_token_id=coder.pad,
                eos_token_id=coder.end,
            )
            return written[:, batch["input_ids"].shape[1] :]

        return forward

    def loss(self, outputs: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        """Cross-entropy of the answers' tokens; of answers that were written, the share that is not the first given."""
        if outputs.ndim == 3:
            return cross_entropy(outputs.flatten(0, 1), labels.flatten(), label_smoothing)
        assert self._coder is not None
        expected = [self._coder.answer(self._asked[int(label)]) for label in labels]
        same = [row[: len(tokens)] == tokens for row, tokens in zip(outputs.tolist(), expected, strict=True)]
        return 1 - torch.tensor(same, dtype=torch.float32, device=outputs.device).mean()

    def metrics(self) -> Written:
        """Exact match, by kind of question as well, VQA accuracy, and yes or no as in POPE."""
        assert self._coder is not None, "load_for comes first"
        return Written(self._asked, self._coder.decode)

    def report(self, metric: Any, splits: Splits, folder: Path) -> None:
        """Write ``predictions.png``, a sheet of test images with questions and answers; count what was skipped."""
        test = splits.test
        noted = () if test.unreadable is None else test.unreadable.nonzero().flatten().tolist()
        skipped = sorted(test.pictures.names[index] for index in noted)
        splits.facts["unreadable"] |= {"skipped": len(skipped), "first": skipped[:10]}
        chosen = [list(metric.texts)[i] for i in draw(len(metric.texts), 0)[: _SHEET[0] * _SHEET[1]]]
        shown = [(self._asked[index], metric.texts[index]) for index in chosen]
        draw_sheet(shown, test.pictures, folder / "predictions.png")

    def _read(self, folder: Path, pictures: Pictures) -> tuple[dict[str, list[Dialogue]], dict[str, Any]]:
        """The splits that a folder has, train at least, and facts of the files."""
        if not folder.is_dir():
            raise DataError(
                f"there is no folder {folder}: set paths.data, or prepare it (python scripts/prepare_data.py --list)"
            )
        found: dict[str, list[Dialogue]] = {}
        facts: dict[str, Any] = {}
        for split, names in _NAMES.items():
            tables = sorted({path for name in names for path in folder.glob(f"{name}*.parquet")})
            lists = sorted({path for name in names for path in folder.glob(f"{name}*.json")})
            manifest.check(folder, [*tables, *lists])
            if tables:
                found[split] = dialogues.read_parquet(tables, self._ask, pictures)
            for path in lists if not tables else ():
                found.setdefault(split, []).extend(dialogues.read_json(path, folder / "images", pictures))
            if split in found:
                facts[split] = dialogues.facts_of(tables or lists, len(found[split]))
        if "train" not in found or len(found) == 1:
            raise DataError(f"{folder} needs train and validation or test, as *.parquet or *.json")
        return found, facts

    def _check_metric(self, asked: Sequence[Dialogue]) -> None:
        lonely = next((dialogue.where for dialogue in asked if len(dialogue.answers) < 2), None)
        if self.metric == "vqa_accuracy" and lonely:
            raise DataError(
                f"{lonely}: task.metric=vqa_accuracy compares with the answers of several people, here is one"
            )

    def _ask(self, row: Row) -> Asked:
        asked = _ASK.get(self.dataset, dialogues.plain)(row)
        return Asked(f"{asked.question}\n{self.suffix}", asked.answers, asked.kind) if self.suffix else asked


def hold_out(found: Sequence[Dialogue], size: int, seed: int) -> tuple[list[Dialogue], list[Dialogue]]:
    """The rest, and at least ``size`` drawn dialogues with all others about the same images; DataError if none is left.

    Those without an image stand for themselves.
    """
    groups = [dialogue.images or (-1 - number,) for number, dialogue in enumerate(found)]
    names = list(dict.fromkeys(groups))
    sizes, chosen, total = Counter(groups), set(), 0
    for i in draw(len(names), seed):
        if total >= size:
            break
        chosen.add(names[i])
        total += sizes[names[i]]
    rest = [dialogue for dialogue, group in zip(found, groups, strict=True) if group not in chosen]
    if not rest:
        raise DataError(f"{len(found)} conversations to train on, {size} to hold out (task.validation_size)")
    return rest, [dialogue for dialogue, group in zip(found, groups, strict=True) if group in chosen]


def majority(train: Sequence[Dialogue], test: Sequence[Dialogue]) -> dict[str, Any]:
    """What is right without looking: the most frequent answer of train, and that to the same words.

    Returns:
        the ``answer``, the share of ``test`` questions that it answers, and the share that is answered ``by_question``:
        with the most frequent answer to each question's words in train, or that of all where they are new.
    """
    words: dict[str, Counter[str]] = defaultdict(Counter)
    for dialogue in train:
        words[dialogue.turns[-1][0]][dialogue.answers[0]] += 1
    ((answer, _),) = sum(words.values(), Counter[str]()).most_common(1)
    guessed = [words[q].most_common(1)[0][0] if q in words else answer for q in (d.turns[-1][0] for d in test)]
    right = np.array([dialogue.answers[0] for dialogue in test])
    shares = {"test": float(np.mean(right == answer)), "by_question": float(np.mean(right == np.array(guessed)))}
    return {"answer": answer} | shares


@dataclass(frozen=True)
class _Encoded:
    """A conversation as tokens, its images expanded.

    Attributes:
        ids: all tokens.
        targets: the same where the loss is, else -100.
        turns: per turn the tokens up to the end of its question, to the beginning of its answer, and to its end.
    """

    ids: list[int]
    targets: list[int]
    turns: list[tuple[int, int, int]]


class Coder:
    """Dialogues as sequences for a model: in its words, with the loss on answers and the token that ends them.

    Args:
        model: a spec of ``flora.models.llava``.
        max_length: tokens; None: as many as the model takes.
        max_new_tokens: room that is left where an answer is to be written.

    Attributes:
        truncated: how many texts were cut, by split.
    """

    def __init__(self, model: Any, max_length: int | None, max_new_tokens: int):
        self.tokenizer = model.tokenizer()
        self.chat = model.chat
        self.image_id, self.image_tokens = model.image_id, model.image_tokens
        self.max_length = min(max_length or model.max_length, model.max_length)
        self.max_new_tokens = max_new_tokens
        self.end = self.tokenizer.convert_tokens_to_ids(self.chat.end)
        self.pad = self.end if self.tokenizer.pad_token_id is None else pad_or_end(self.tokenizer)
        self.truncated: dict[str, int] = {}
        self.warnings = ["no pad token: the end token pads"] if self.tokenizer.pad_token_id is None else []
        self._image = self.tokenizer.convert_ids_to_tokens(self.image_id)

    def answered(self, split: str, found: Sequence[Dialogue]) -> TextDataset:
        """Sequences to learn from: ``labels`` per token, -100 except on answers."""
        return self._rows(split, found, [dialogue.turns for dialogue in found], 0)

    def asked(self, split: str, found: Sequence[Dialogue], first: int) -> TextDataset:
        """Sequences that end where the last answer begins; ``labels`` count from ``first``."""
        open_turns: list[Any] = [(*dialogue.turns[:-1], (dialogue.turns[-1][0], None)) for dialogue in found]
        rows = self._rows(split, found, open_turns, self.max_new_tokens)
        numbers = {"labels": torch.arange(first, first + len(found))}
        return TextDataset({"input_ids": rows.tokens["input_ids"]}, rows.starts, numbers, rows.padding, left=True)

    def answer(self, dialogue: Dialogue) -> list[int]:
        """The tokens of the last answer and its end."""
        turns = [(question.replace(IMAGE, ""), answer) for question, answer in dialogue.turns[-1:]]
        (encoded,) = self._encode([turns], [0], [dialogue.where])
        return [target for target in encoded.targets if target != -100]

    def decode(self, tokens: np.ndarray) -> str:
        """The text of written tokens up to their end; negative ones are padding."""
        kept = [int(token) for token in tokens if token >= 0]
        kept = kept[: kept.index(self.end)] if self.end in kept else kept
        return self.tokenizer.decode(kept, skip_special_tokens=True).strip()

    def _rows(self, split: str, found: Sequence[Dialogue], turns: Sequence[Any], reserved: int) -> TextDataset:
        ids, targets, lengths = array("i"), array("i"), []
        self.truncated[split] = 0
        images, places = [len(dialogue.images) for dialogue in found], [dialogue.where for dialogue in found]
        for encoded, dialogue in zip(self._encode(turns, images, places), found, strict=True):
            short = self._fitted(encoded, self.max_length - reserved, dialogue.where)
            self.truncated[split] += len(short.ids) < len(encoded.ids)
            ids.extend(short.ids)
            targets.extend(short.targets)
            lengths.append(len(short.ids))
        fields = {"input_ids": as_tensor(ids), "labels": as_tensor(targets)}
        return TextDataset(fields, starts_of(lengths), {}, {"input_ids": self.pad, "labels": -100}, left=True)

    def _encode(self, turns: Sequence[Any], images: Sequence[int], where: Sequence[str]) -> Iterator[_Encoded]:
        options = {"return_offsets_mapping": True, "verbose": False}
        for start in range(0, len(turns), _CHUNK):
            written = [
                self.chat.write([(question.replace(IMAGE, self._image), answer) for question, answer in some])
                for some in turns[start : start + _CHUNK]
            ]
            tokens = self.tokenizer([text for text, _ in written], **options)
            rows = zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
            for number, (row, offsets) in enumerate(rows):
                if row.count(self.image_id) != images[start + number]:
                    raise DataError(
                        f"{where[start + number]}: its text contains {self._image}, which stands for an image; "
                        "take it out"
                    )
                yield self._expanded(row, [end for _, end in offsets], written[number][1])

    def _expanded(self, row: Sequence[int], ends: Sequence[int], places: Sequence[Place]) -> _Encoded:
        """Tokens that end at these characters, each image as many as it takes; what ends in an answer is a target."""
        sizes = [self.image_tokens if token == self.image_id else 1 for token in row]
        begins = [0, *itertools.accumulate(sizes)]
        ids = [token for token, size in zip(row, sizes, strict=True) for _ in range(size)]
        targets = [-100] * len(ids)
        turns = []
        for place in places:
            question, answer, end = (begins[bisect.bisect_right(ends, limit)] for limit in place)
            targets[answer:end] = ids[answer:end]
            turns.append((question, answer, end))
        return _Encoded(ids, targets, turns)

    def _fitted(self, encoded: _Encoded, room: int, where: str) -> _Encoded:
        """At most ``room`` tokens: without its last turns, then with the longer of question and answer cut at its end.

        A conversation whose last answer is to be written loses no turn.
        """
        if len(encoded.ids) <= room:
            return encoded
        ids, targets, turns = encoded.ids, encoded.targets, encoded.turns
        is_open = turns[-1][1] == turns[-1][2]
        while len(turns) > 1 and not is_open and turns[-1][2] > room and self.image_id not in ids[turns[-2][2] :]:
            turns = turns[:-1]
        question, answer, end = turns[-1]
        if end <= room:
            return _Encoded(ids[:end], targets[:end], turns)
        begin = turns[-2][2] if len(turns) > 1 else 0
        last_image = max((i + 1 for i in range(question) if ids[i] == self.image_id), default=0)
        first_word = max(begin, last_image)
        free = room - first_word - (answer - question)
        if free < 1:
            raise DataError(
                f"{where}: {first_word} tokens of images and earlier turns do not fit into {room}; images are never "
                "cut: raise task.max_length, or lower model.image_size"
            )
        kept_answer = min(end - answer, max(free - (question - first_word), (free + 1) // 2))
        cut = first_word + free - kept_answer
        kept = [*range(cut), *range(question, answer + kept_answer)]
        return _Encoded([ids[i] for i in kept], [targets[i] for i in kept], turns)


def draw_sheet(shown: Sequence[tuple[Dialogue, str]], pictures: Pictures, path: Path) -> None:
    """A picture of images with their last question, what was written and, where it differs, the right answer."""
    from matplotlib.figure import Figure

    rows, columns = _SHEET
    figure = Figure((2.4 * columns, 2.7 * rows), layout="constrained")
    for axes, (dialogue, text) in zip(figure.subplots(rows, columns).flat, shown, strict=False):
        if dialogue.images:
            axes.imshow(as_rgb(pictures.openers[dialogue.images[-1]], dialogue.where))
        right = text.lower() == dialogue.answers[0].lower()
        words = dialogue.turns[-1][0].replace(IMAGE, "").strip()
        told = text if right else f"{text}  (not {dialogue.answers[0]})"
        axes.set_title(_short(words), fontsize=7)
        axes.set_xlabel(_short(told), fontsize=7, color="tab:green" if right else "tab:red")
    for axes in figure.axes:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path)


def _short(text: str) -> str:
    """At most two lines for under a picture."""
    return textwrap.fill(textwrap.shorten(text, 80, placeholder="..."), 40).replace("$", r"\$")
