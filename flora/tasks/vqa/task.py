"""Multimodal instruction tuning, as LLaVA does it: a model learns to write answers to questions about images.

Liu et al. 2023, "Visual Instruction Tuning", arXiv 2304.08485, and "Improved Baselines", arXiv 2310.03744. Stage 1
trains the projector alone (adapter=linear_probe), stage 2 the projector and adapters on the language model, starting
from that projector (model.projector=DIR).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from flora.contents import checksum, digests, everything, of
from flora.errors import ConfigError, DataError
from flora.models.spec import ImageTextSpec, ModelSpec
from flora.tasks import manifest, tables
from flora.tasks.base import Batch, Forward, Splits, Task, check_split_seed, draw
from flora.tasks.images.decode import ORIENTATIONS, as_picture, as_square
from flora.tasks.portions import ALONE, AS_FILES, SPLITS, UNDRAWN, WHOLE, rule_of, say, shares
from flora.tasks.text.causal import answer_logits, answer_loss, write_out
from flora.tasks.text.tokenise import fingerprint
from flora.tasks.vqa import sheet
from flora.tasks.vqa.answers import Written, scores
from flora.tasks.vqa.benchmarks import BENCHMARKS
from flora.tasks.vqa.coder import Coder
from flora.tasks.vqa.dataset import Shown
from flora.tasks.vqa.dialogues import (
    IMAGE,
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
from flora.tasks.vqa.rows import Columns, are_rows, read_rows
from flora.tasks.vqa.splits import hold_out, majority

_ASK = {"easy_vqa": easy_vqa, "nlvr": nlvr}  # others are read as ``plain``


class Instruct(Task[ImageTextSpec]):
    """Conversations about images.

    Args:
        name: of the family, as records show it.
        dataset: a folder of ``paths.data``: ``easy_vqa``, ``nlvr``, ``llava_instruct``, or any other, with
            ``train*``, perhaps ``validation*`` and ``test*`` as parquet (image, question, answer or answers, perhaps
            type), as LLaVA's JSON beside the folder ``images``, or as tables that name a file for each image; or one
            such file; or a benchmark (``flora.tasks.vqa.benchmarks``): ``pope``, ``scienceqa``, ``gqa``, ``textvqa``,
            which are tests alone and have a metric and prompts of their own.
        epochs: default length of training.
        metric: ``exact_match``, or of sets with several answers a question ``vqa_accuracy`` (of ten people, by how many
            agree) or ``any_match`` (a list of accepted answers).
        images: folder of the images that files name, in the data set's folder, in ``paths.data`` or anywhere; None:
            ``images`` in the data set's folder, or that folder itself.
        image, question, answer: columns of tables that name images; None: by usual names.
        split: parts of train, validation and test, drawn by image, where there is neither of the last two; None: 70,
            15, 15.
        suffix: words after every question of a table; LLaVA-1.5 asks "Answer the question using a single word or
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

    pictures: ClassVar[tuple[str, ...]] = ("predictions.png",)

    def __init__(
        self,
        *,
        name: str,
        dataset: str,
        epochs: float,
        metric: str = "exact_match",
        images: str | None = None,
        image: str | None = None,
        question: str | None = None,
        answer: str | None = None,
        split: list[float] | None = None,
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
            ("metric", metric, ("exact_match", "vqa_accuracy", "any_match")),
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
        self.images, self.columns = images, Columns(image, question, answer)
        self.split, self.parts = split, shares(split)
        self.suffix = suffix
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self.validation_size, self.split_seed = validation_size, split_seed
        self.unreadable, self.orientation = unreadable, orientation or "exif"
        self.benchmark = BENCHMARKS.get(dataset)
        if self.benchmark is not None:
            self.metric = self.benchmark.metric
        self._train: list[Dialogue] = []
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
        if self.benchmark is not None:
            return self._folder(data_dir), self.benchmark.paths(self._existing(data_dir))
        found = self._tables(data_dir)
        return self._folder(data_dir), [path for paths in found.values() for path in paths]

    def contents(self, data_dir: Path | None) -> dict[str, str]:
        """See Task.contents; of tables that name images also all that lies where these are, whatever it is called."""
        folder, files = self.files(data_dir)
        if self.benchmark is not None:  # of folders with more images than it asks about
            pictures = Pictures()
            self.benchmark.dialogues(folder, self._images(folder, data_dir), pictures)
            return digests(files, folder) | {"images": checksum(pictures.places, folder)}
        sums = of(folder, files)
        if self.images is not None or any(path.suffix.lower() != ".parquet" for path in files):
            images = self._images(folder, data_dir)
            sums["images"] = checksum(everything(images), images)
        return sums

    def read(self, model: ImageTextSpec, data_dir: Path | None) -> Splits:
        """See Task.read."""
        pictures = Pictures(orientation=self.orientation)
        dialogues, files = self._read_files(data_dir, pictures)
        left_out = self._leave_out(dialogues)
        answers_first = {split: sum(dialogue.answer_first for dialogue in part) for split, part in dialogues.items()}
        rule = AS_FILES
        if self.benchmark is not None:
            rule = ALONE
        elif self.split is not None and len(dialogues) > 1:
            raise ConfigError(f"task.split={self.split}: there is {' and '.join(dialogues)} already; leave it out")
        if len(dialogues) == 1 and self.whole_test:
            dialogues, rule = dict.fromkeys(SPLITS, dialogues["train"]), WHOLE
        elif len(dialogues) == 1:
            whole, rule = dialogues["train"], f"{rule_of(self.parts, self.split_seed, None)}, by image"
            rest, test = hold_out(whole, round(self.parts[2] * len(whole)) or 1, self.split_seed)
            train, held_out = hold_out(rest, round(self.parts[1] * len(whole)) or 1, self.split_seed)
            dialogues = {"train": train, "validation": held_out, "test": test}
            say(f"{self.dataset} has no validation and no test: {rule}")
        elif len(dialogues) == 2:
            train, held_out = hold_out(dialogues["train"], self.validation_size, self.split_seed)
            rule = f"validation {len(held_out)} drawn by image from train, seed {self.split_seed}"
            test = dialogues["test" if "test" in dialogues else "validation"]
            dialogues = {"train": train, "validation": held_out, "test": test}
        if self.benchmark is None:
            self._check_metric(dialogues["validation"] + dialogues["test"])
        coder, pixels = self._prepare(model)
        noted = torch.zeros(len(pictures.openers), dtype=torch.bool).share_memory_()
        skips = noted if self.unreadable == "skip" else None
        self._train = dialogues["train"] if rule != WHOLE else []  # then it is the test itself
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
            **left_out,
            "split_rule": rule,
            "orientation": self.orientation,
            "image_tokens": model.image_tokens,
            "max_length": coder.max_length,
            "tokenizer_sha256": fingerprint(coder.tokenizer),
            "truncated": coder.truncated,
            "unreadable": {"policy": self.unreadable},
            "warnings": coder.warnings
            + [f"{split}: {n} conversations begin with an answer, left out" for split, n in answers_first.items() if n],
        }
        drawn = {split: [d.where for d in part] for split, part in dialogues.items()} if rule not in UNDRAWN else {}
        return Splits(**sets, num_classes=0, class_names=[], facts=facts, drawn=drawn)

    def unlabelled(self, model: ImageTextSpec, inputs: Sequence[Any]) -> Shown:
        """Pairs of an image (see ``flora.tasks.images.decode.as_picture``) and a question about it."""
        coder, pixels = self._prepare(model)
        pictures = Pictures(orientation=self.orientation)
        asked = []
        for number, pair in enumerate(inputs):
            if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[1], str) or not pair[1].strip():
                raise ConfigError(f"input {number} is {pair!r:.60}: task={self.name} takes (image, question)")
            picture = as_picture(pair[0], number)
            place = pictures.add(number, picture.name, picture.open)
            question = f"{IMAGE}\n{self._in_own_words(pair[1].strip())}"
            asked.append(Dialogue(((question, ""),), (place,), ("",), "", f"question {number}"))
        rows = coder.asked("prediction", asked, 0)
        if cut := coder.truncated["prediction"]:
            print(f"{cut} of {len(asked)} questions are too long and were cut", file=sys.stderr)
        noted = torch.zeros(len(asked), dtype=torch.bool).share_memory_() if self.unreadable == "skip" else None
        return Shown(rows, [dialogue.images for dialogue in asked], pictures, pixels, noted, once=True)

    def written(self, model: ImageTextSpec, tokens: np.ndarray) -> str:
        """See Task.written."""
        assert self._coder is not None, "unlabelled comes first"
        return self._coder.decode(tokens)

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
            written = write_out(module, ids, mask, self.max_new_tokens, coder.pad, coder.end, 1, **images)
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
        return Written(self._asked, self._coder.decode, self._scores)

    def report(self, metric: Any, splits: Splits, folder: Path) -> None:
        """Write ``predictions.png``, a sheet of test images with questions and answers; count what was skipped.

        The baselines that see no image get a score on the questions that the model was asked.
        """
        test = splits.test
        assert isinstance(test, Shown)
        noted = () if test.unreadable is None else test.unreadable.nonzero().flatten().tolist()
        skipped = sorted(test.pictures.names[index] for index in noted)
        splits.facts["unreadable"] |= {"skipped": len(skipped), "first": skipped[:10]}
        if skipped:
            say(f"{self.dataset}: {len(skipped)} images cannot be decoded and were left out ({', '.join(skipped[:3])})")
        tested = [self._asked[index] for index in metric.texts]
        splits.facts["majority"] = majority(
            self._train, tested, lambda texts, asked: self._scores(texts, asked)[self.metric]
        )
        chosen = [list(metric.texts)[i] for i in draw(len(metric.texts), 0)[: sheet.ROWS * sheet.COLUMNS]]
        shown = [(self._asked[index], metric.texts[index]) for index in chosen]
        sheet.draw_sheet(shown, test.pictures, folder / "predictions.png")

    @property
    def _scores(self) -> Any:
        return scores if self.benchmark is None else self.benchmark.score

    def _tables(self, data_dir: Path | None) -> dict[str, list[Path]]:
        """The files of each split, without the images that they name; DataError where there are none."""
        return tables.find(self._existing(data_dir))

    def _existing(self, data_dir: Path | None) -> Path:
        place = self._place(data_dir)
        if not place.exists():
            raise DataError(
                f"there is no folder {place}: set paths.data, or prepare it (python scripts/prepare_data.py --list)"
            )
        return place

    def _place(self, data_dir: Path | None) -> Path:
        return Path(data_dir or ".") / self.dataset

    def _folder(self, data_dir: Path | None) -> Path:
        place = self._place(data_dir)
        return place.parent if place.is_file() else place

    def _read_files(
        self, data_dir: Path | None, pictures: Pictures
    ) -> tuple[dict[str, list[Dialogue]], dict[str, Any]]:
        """The splits that there are, and facts of the files."""
        folder = self._folder(data_dir)
        images = self._images(folder, data_dir)
        dialogues: dict[str, list[Dialogue]] = {}
        facts: dict[str, Any] = {}
        found = {"test": self.benchmark.paths(self._existing(data_dir))} if self.benchmark else self._tables(data_dir)
        manifest.check(folder, [path for paths in found.values() for path in paths])
        for split, paths in found.items():
            if self.benchmark is not None:
                dialogues = {"train": [], "validation": [], "test": self.benchmark.dialogues(folder, images, pictures)}
            elif self.dataset not in _ASK and are_rows(paths[0], self.columns):
                suffix = f"\n{self.suffix}" if self.suffix else ""
                dialogues[split] = read_rows(paths, self.columns, images, suffix, pictures)
            elif paths[0].suffix.lower() == ".parquet":
                dialogues[split] = read_parquet(paths, self._ask, pictures)
            else:
                dialogues[split] = [dialogue for path in paths for dialogue in read_json(path, images, pictures)]
            facts[split] = facts_of(paths, len(dialogues[split]))
        if files := [key for key in pictures.places if isinstance(key, Path)]:
            self._check_there(files, images)
            facts["images"] = {"sha256": checksum(files, folder)}
        return dialogues, facts

    def _leave_out(self, dialogues: dict[str, list[Dialogue]]) -> dict[str, Any]:
        """Take questions about images of train or validation out of NLVR's test; returns facts on them."""
        if self.dataset != "nlvr" or "test" not in dialogues:
            return {}
        others = (d for split, part in dialogues.items() if split != "test" for d in part)
        seen = {image for dialogue in others for image in dialogue.images}
        kept = [dialogue for dialogue in dialogues["test"] if seen.isdisjoint(dialogue.images)]
        if not kept:
            raise DataError(f"{self.dataset}: every image of test is in train or validation as well; fetch it again")
        count = len(dialogues["test"]) - len(kept)
        dialogues["test"] = kept
        return {"left_out": {"test": count, "why": "their images are in train or validation"}}

    def _images(self, folder: Path, data_dir: Path | None) -> Path:
        """The folder where names of images start."""
        if self.images is None and self.benchmark is not None:
            there = [folder / name for name in self.benchmark.images]
            return next((place for place in there if place.is_dir()), there[0])
        if self.images is None:
            return folder / "images" if (folder / "images").is_dir() else folder
        places = (folder / self.images, Path(data_dir or ".") / self.images, Path(self.images))
        if found := next((place for place in places if place.is_dir()), None):
            return found
        raise DataError(f"there is no folder {places[0]}: correct task.images={self.images}")

    def _check_there(self, files: Sequence[Path], images: Path) -> None:
        missing = [path for path in files if not path.is_file()]
        if not missing:
            return
        more = f" and {len(missing) - 1} more of {len(files)} images are" if len(missing) > 1 else " is"
        said = f"{missing[0]}{more} missing in {images}"
        if self.unreadable == "error":
            raise DataError(f"{said}: correct task.images, or set task.unreadable=skip")
        say(f"{said}: questions about what is missing are left out")

    def _check_metric(self, asked: Sequence[Dialogue]) -> None:
        if self.metric == "any_match" and all(len(dialogue.answers) < 2 for dialogue in asked):
            raise DataError("task.metric=any_match is for lists of accepted answers, and every question has one answer")
        lonely = next((dialogue.where for dialogue in asked if len(dialogue.answers) < 2), None)
        if self.metric == "vqa_accuracy" and lonely:
            raise DataError(
                f"{lonely}: task.metric=vqa_accuracy compares with the answers of several people, here is one"
            )

    def _prepare(self, model: ImageTextSpec) -> tuple[Coder, Any]:
        """What turns dialogues into tokens, and images into pixels."""
        self._coder = Coder(model, self.max_length, self.max_new_tokens)
        fill = tuple(int(255 * value) for value in model.mean)
        options: dict[str, Any] = {"size": model.image_size, "interpolation": model.interpolation, "how": model.aspect}
        return self._coder, partial(as_square, **options, fill=fill)

    def _in_own_words(self, question: str) -> str:
        """A question as the files' questions are asked."""
        return self._ask({"question": question, "sentence": question, "answer": "no", "label": 0}).question

    def _ask(self, row: Row) -> Asked:
        asked = _ASK.get(self.dataset, plain)(row)
        return Asked(f"{asked.question}\n{self.suffix}", asked.answers, asked.kind) if self.suffix else asked
