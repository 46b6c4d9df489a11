"""Multimodal instruction tuning, as LLaVA does it: a model learns to write answers to questions about images.

Liu et al. 2023, "Visual Instruction Tuning", arXiv 2304.08485, and "Improved Baselines", arXiv 2310.03744. Stage 1
trains the projector alone (adapter=linear_probe), stage 2 the projector and adapters on the language model, starting
from that projector (model.projector=DIR).
"""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from flora.errors import ConfigError, DataError
from flora.tasks import manifest
from flora.tasks.base import COUNTS, Batch, Forward, Splits, Task, check_split_seed, cross_entropy, draw, stand_in
from flora.tasks.commonsense.task import answer_logits
from flora.tasks.images import as_rgb, as_square
from flora.tasks.text import TextDataset, fingerprint
from flora.tasks.vqa import dialogues
from flora.tasks.vqa.answers import Written
from flora.tasks.vqa.coder import Coder
from flora.tasks.vqa.dialogues import IMAGE, Asked, Dialogue, Pictures, Row

_ASK = {"easy_vqa": dialogues.easy_vqa, "nlvr": dialogues.nlvr}  # others read as dialogues.plain
_NAMES = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
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
        once: whether each example counts once, as in an evaluation, so that one which stands in does not.
    """

    def __init__(
        self,
        rows: TextDataset,
        images: Sequence[tuple[int, ...]],
        pictures: Pictures,
        pixels: Callable[[Any], np.ndarray],
        unreadable: Tensor | None = None,
        once: bool = False,
    ):
        self.rows, self.images, self.pictures = rows, images, pictures
        self.pixels, self.unreadable, self.once = pixels, unreadable, once
        self.lengths = rows.lengths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """A batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Fields of TextDataset ``[B, L]`` or ``[B]``, and ``pixel_values`` uint8 ``[images, 3, H, W]`` if any.

        Examples with an image that is skipped are left out; where that is all, the next that can be shown stands in.
        """
        decoded = {i: self._decode(i) for i in sorted({i for index in indices for i in self.images[index]})}
        kept = [index for index in indices if all(decoded[i] is not None for i in self.images[index])]
        if not kept:
            if instead := stand_in(indices[-1], len(self), self._can_be_shown):
                return self.__getitems__(instead) | ({COUNTS: torch.tensor(False)} if self.once else {})
            name = self.pictures.names[self.images[indices[0]][0]]
            raise DataError(f"{name}, {len(indices) - 1} more of its batch and those after it: none can be decoded")
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
        return Shown(rows, images, self.pictures, self.pixels, self.unreadable, self.once)

    def _can_be_shown(self, index: int) -> bool:
        return all(self._decode(i) is not None for i in self.images[index])

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
        answers_first = {split: sum(dialogue.answer_first for dialogue in part) for split, part in found.items()}
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
            split: Shown(part, [d.images for d in found[split]], pictures, pixels, skips, once=split != "train")
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
            "warnings": coder.warnings
            + [f"{split}: {n} conversations begin with an answer, left out" for split, n in answers_first.items() if n],
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

    Those without an image stand for themselves, and images that one dialogue shows together stay together.
    """
    links: dict[int, int] = {}

    def group_of(image: int) -> int:
        while image in links:
            image = links[image]
        return image

    for dialogue in found:
        for image in dialogue.images[1:]:
            if (own := group_of(image)) != (first := group_of(dialogue.images[0])):
                links[own] = first
    groups = [group_of(dialogue.images[0]) if dialogue.images else -1 - n for n, dialogue in enumerate(found)]
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
