"""Multimodal instruction tuning, as LLaVA does it: a model learns to write answers to questions about images.

Liu et al. 2023, "Visual Instruction Tuning", arXiv 2304.08485, and "Improved Baselines", arXiv 2310.03744. Stage 1
trains the projector alone (adapter=linear_probe), stage 2 the projector and adapters on the language model, starting
from that projector (model.projector=DIR).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora.contents import checksum, of
from flora.errors import ConfigError, DataError
from flora.models.spec import ImageTextSpec, ModelSpec
from flora.tasks import manifest
from flora.tasks.base import Batch, Forward, Splits, Task, check_split_seed, draw
from flora.tasks.images.decode import ORIENTATIONS, as_square
from flora.tasks.text.causal import answer_logits, answer_loss, write_greedily
from flora.tasks.text.tokenise import fingerprint
from flora.tasks.vqa import sheet
from flora.tasks.vqa.answers import Written
from flora.tasks.vqa.coder import Coder
from flora.tasks.vqa.dataset import Shown
from flora.tasks.vqa.dialogues import (
    Asked,
    Dialogue,
    Pictures,
    Row,
    easy_vqa,
    facts_of,
    nlvr,
    plain,
    read_json,
    read_parquet,
)
from flora.tasks.vqa.splits import hold_out, majority

_ASK = {"easy_vqa": easy_vqa, "nlvr": nlvr}  # others are read as ``plain``
_NAMES = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}


class Instruct(Task[ImageTextSpec]):
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
        orientation: ``exif`` turns images as their files ask, ``stored`` takes the pixels as they lie; None: exif.

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
        orientation: str | None = None,
    ):
        for key, value, allowed in (
            ("orientation", orientation or "exif", ORIENTATIONS),
            ("metric", metric, ("exact_match", "vqa_accuracy")),
            ("unreadable", unreadable, ("error", "skip")),
        ):
            if value not in allowed:
                raise ConfigError(f"task.{key}={value} must be {' or '.join(allowed)}")
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
        self.unreadable, self.orientation = unreadable, orientation or "exif"
        self._asked: list[Dialogue] = []  # questions of validation and test, which batches name by index
        self._coder: Coder | None = None

    def accepts(self, model: ModelSpec) -> None:
        """See Task.accepts."""
        if model.kind != "image_text":
            raise ConfigError(
                f"model={model.name} does not both see and write: choose model=llava_mini or model=llava_1_5_7b"
            )

    def files(self, data_dir: Path | None) -> tuple[Path, list[Path]]:
        """See Task.files."""
        folder = Path(data_dir or ".") / self.dataset
        return folder, [path for paths in _tables(folder).values() for path in paths]

    def contents(self, data_dir: Path | None) -> dict[str, str]:
        """See Task.contents; of LLaVA's format also all that lies in ``images``, whatever it is called."""
        folder, files = self.files(data_dir)
        sums, images = of(folder, files), folder / "images"
        if images.is_dir() and any(path.suffix == ".json" for path in files):
            sums["images"] = checksum((path for path in images.rglob("*") if path.is_file()), folder)
        return sums

    def read(self, model: ImageTextSpec, data_dir: Path | None) -> Splits:
        """See Task.read."""
        pictures = Pictures(orientation=self.orientation)
        dialogues, files = self._read_folder(Path(data_dir or ".") / self.dataset, pictures)
        answers_first = {split: sum(dialogue.answer_first for dialogue in part) for split, part in dialogues.items()}
        rule = "as in the files"
        if "validation" not in dialogues or "test" not in dialogues:
            train, held_out = hold_out(dialogues["train"], self.validation_size, self.split_seed)
            rule = f"validation {len(held_out)} drawn by image from train, seed {self.split_seed}"
            test = dialogues["test" if "test" in dialogues else "validation"]
            dialogues = {"train": train, "validation": held_out, "test": test}
        self._check_metric(dialogues["validation"] + dialogues["test"])
        self._coder = coder = Coder(model, self.max_length, self.max_new_tokens)
        fill = tuple(int(255 * value) for value in model.mean)
        pixels = partial(
            as_square, size=model.image_size, interpolation=model.interpolation, how=model.aspect, fill=fill
        )
        noted = torch.zeros(len(pictures.openers), dtype=torch.bool).share_memory_()
        skips = noted if self.unreadable == "skip" else None
        self._asked = dialogues["validation"] + dialogues["test"]
        rows = {
            "train": coder.answered("train", dialogues["train"]),
            "validation": coder.asked("validation", dialogues["validation"], 0),
            "test": coder.asked("test", dialogues["test"], len(dialogues["validation"])),
        }
        sets: dict[str, Any] = {
            split: Shown(part, [d.images for d in dialogues[split]], pictures, pixels, skips, once=split != "train")
            for split, part in rows.items()
        }
        facts = {
            "source": "paths.data",
            "files": files,
            "counts": {split: len(part) for split, part in sets.items()},
            "split_rule": rule,
            "orientation": self.orientation,
            "majority": majority(dialogues["train"], dialogues["test"]),
            "image_tokens": model.image_tokens,
            "max_length": coder.max_length,
            "tokenizer_sha256": fingerprint(coder.tokenizer),
            "truncated": coder.truncated,
            "unreadable": {"policy": self.unreadable},
            "warnings": coder.warnings
            + [f"{split}: {n} conversations begin with an answer, left out" for split, n in answers_first.items() if n],
        }
        return Splits(**sets, num_classes=0, class_names=[], facts=facts)

    def forward(self, model: ImageTextSpec) -> Forward:
        """In training, logits ``[B, K, V]`` and targets ``[B, K]`` of the last tokens, which hold the answers.

        Else the tokens of written answers ``[B, T]``, and which questions they answer ``[B]``.
        """
        assert self._coder is not None, "load_for comes first"
        coder = self._coder

        def forward(module: nn.Module, batch: Batch, training: bool) -> tuple[Tensor, Tensor]:
            images = {name: model.normalize(batch[name]) for name in ("pixel_values",) if name in batch}
            if training:
                return answer_logits(module, batch, batch["labels"], **images)
            ids, mask = batch["input_ids"], batch["attention_mask"]
            written = write_greedily(module, ids, mask, self.max_new_tokens, coder.pad, coder.end, **images)
            return written, batch["labels"]

        return forward

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        """Cross-entropy of the answers' tokens; of answers that were written, the share that is not the first given."""
        if outputs.ndim == 3:
            return answer_loss(outputs, targets, label_smoothing)
        assert self._coder is not None
        expected = [self._coder.answer(self._asked[int(index)]) for index in targets]
        same = [row[: len(tokens)] == tokens for row, tokens in zip(outputs.tolist(), expected, strict=True)]
        return 1 - torch.tensor(same, dtype=torch.float32, device=outputs.device).mean()

    def metrics(self) -> Written:
        """Exact match, by kind of question as well, VQA accuracy, and yes or no as in POPE."""
        assert self._coder is not None, "load_for comes first"
        return Written(self._asked, self._coder.decode)

    def report(self, metric: Any, splits: Splits, folder: Path) -> None:
        """Write ``predictions.png``, a sheet of test images with questions and answers; count what was skipped."""
        test = splits.test
        assert isinstance(test, Shown)
        noted = () if test.unreadable is None else test.unreadable.nonzero().flatten().tolist()
        skipped = sorted(test.pictures.names[index] for index in noted)
        splits.facts["unreadable"] |= {"skipped": len(skipped), "first": skipped[:10]}
        chosen = [list(metric.texts)[i] for i in draw(len(metric.texts), 0)[: sheet.ROWS * sheet.COLUMNS]]
        shown = [(self._asked[index], metric.texts[index]) for index in chosen]
        sheet.draw_sheet(shown, test.pictures, folder / "predictions.png")

    def _read_folder(self, folder: Path, pictures: Pictures) -> tuple[dict[str, list[Dialogue]], dict[str, Any]]:
        """The splits that a folder has, train at least, and facts of the files."""
        dialogues: dict[str, list[Dialogue]] = {}
        facts: dict[str, Any] = {}
        for split, paths in _tables(folder).items():
            manifest.check(folder, paths)
            if paths[0].suffix == ".parquet":
                dialogues[split] = read_parquet(paths, self._ask, pictures)
            else:
                dialogues[split] = [d for path in paths for d in read_json(path, folder / "images", pictures)]
            facts[split] = facts_of(paths, len(dialogues[split]))
        if files := [key for key in pictures.places if isinstance(key, Path)]:
            facts["images"] = {"sha256": checksum(files, folder)}
        if "train" not in dialogues or len(dialogues) == 1:
            raise DataError(f"{folder} needs train and validation or test, as *.parquet or *.json")
        return dialogues, facts

    def _check_metric(self, asked: Sequence[Dialogue]) -> None:
        lonely = next((dialogue.where for dialogue in asked if len(dialogue.answers) < 2), None)
        if self.metric == "vqa_accuracy" and lonely:
            raise DataError(
                f"{lonely}: task.metric=vqa_accuracy compares with the answers of several people, here is one"
            )

    def _ask(self, row: Row) -> Asked:
        asked = _ASK.get(self.dataset, plain)(row)
        return Asked(f"{asked.question}\n{self.suffix}", asked.answers, asked.kind) if self.suffix else asked


def _tables(folder: Path) -> dict[str, list[Path]]:
    """The files of each split that there is: parquet, or LLaVA's JSON."""
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder}: set paths.data, or prepare it (python scripts/prepare_data.py --list)"
        )
    splits = {}
    for split, names in _NAMES.items():
        for ending in ("json", "parquet"):  # the last there is wins
            if paths := sorted({path for name in names for path in folder.glob(f"{name}*.{ending}")}):
                splits[split] = paths
    return splits
