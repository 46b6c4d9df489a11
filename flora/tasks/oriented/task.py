"""Oriented object detection in aerial images: Gliding Vertex over a pretrained network, on tiles, scored as DOTA is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora import contents
from flora.errors import ConfigError
from flora.launch import processes
from flora.models.detection import PADDING, DetectionModel, Sizes
from flora.models.oriented import OrientedModel, united
from flora.models.spec import ModelSpec
from flora.tasks.base import Batch, Forward, Predicted, Splits
from flora.tasks.detect import found
from flora.tasks.detect.base import ObjectTask
from flora.tasks.oriented import dota, rendered
from flora.tasks.oriented.dataset import Images, Tiles, with_objects
from flora.tasks.oriented.objects import places, tiled
from flora.tasks.oriented.scores import OrientedScores

_LEAST = 32  # pixels of a side


class Oriented(ObjectTask):
    """Oriented object detection on DOTA's layout in ``paths.data/DATASET``, or on the stand-in ``rendered``.

    Training sees the tiles that show an object. An evaluation finds what is in all tiles of an image, and unites it.

    Args:
        name: of the family, as records show it.
        dataset: the folder's name; ``rendered`` is drawn on ``paths.data/rsscn7``.
        epochs: default length of training.
        tile: side of tiles in pixels of the images.
        overlap: pixels that neighbours share.
        visible: share of an object that a tile must show for it to be learnt there.
        seen: side in pixels at which the network sees a tile; of several in training one is drawn, evaluation takes the
            last.
        anchors, channels, hidden: see ``flora.models.detection.Sizes``.
        proposals: boxes that the heads look at in a tile.
        regions: of them that training learns from.
        most: detections of a tile.
        at_once: tiles in a forward pass of an evaluation.
        flip: probability of a training tile to be mirrored left to right, and of one to be mirrored upside down.
        turn: turn training tiles by quarters.
        held_out: share of train that is validation, where the files have none beside the test.
        split_seed: of its draw, and of what is rendered.
        unreadable: ``error``, or ``skip`` to leave out and count images that cannot be decoded or are not there.

    Raises:
        ConfigError: for a value out of range.
    """

    outline: ClassVar[int] = 8

    def __init__(
        self,
        *,
        name: str,
        dataset: str,
        epochs: float,
        tile: int = 1024,
        overlap: int = 200,
        visible: float = 0.7,
        seen: Sequence[int] = (1024,),
        anchors: Sequence[int] = (32, 64, 128, 256, 512),
        channels: int = 256,
        hidden: int = 1024,
        proposals: int = 2000,
        regions: int = 512,
        most: int = 2000,
        at_once: int = 8,
        flip: float = 0.5,
        turn: bool = True,
        held_out: float = 0.1,
        split_seed: int = 0,
        unreadable: str = "error",
    ) -> None:
        super().__init__(name, dataset, epochs, flip, held_out, split_seed, unreadable)
        for key, value, least in (("tile", tile, _LEAST), ("most", most, 1), ("at_once", at_once, 1)):
            if type(value) is not int or value < least:
                raise ConfigError(f"task.{key}={value} must be a whole number of at least {least}")
        if type(overlap) is not int or not 0 <= overlap < tile:
            raise ConfigError(f"task.overlap={overlap} must be a whole number below task.tile={tile}")
        if not isinstance(visible, int | float) or not 0 < visible <= 1:
            raise ConfigError(f"task.visible={visible} must lie above 0 and not above 1")
        if not seen or not all(type(side) is int and side >= _LEAST for side in seen):
            raise ConfigError(f"task.seen={list(seen)} must be whole numbers of at least {_LEAST} pixels")
        self.tile, self.overlap, self.visible, self.most, self.at_once = tile, overlap, visible, most, at_once
        self.turn = turn
        heads = (channels, hidden, (proposals, proposals), regions)
        self.sizes = Sizes(tuple(seen), max(seen), tuple(anchors), *heads)

    def network(self, model: ModelSpec) -> DetectionModel:
        """An oriented detector over the model's feature maps."""
        return OrientedModel(model, self.sizes, self.most)

    @property
    def _is_rendered(self) -> bool:
        return self.dataset == rendered.NAME

    def files(self, data_dir: Path | None) -> tuple[Path, list[Path]]:
        """See Task.files: labels and images, or the tables of photographs."""
        data = Path(data_dir or ".")
        if self._is_rendered:
            return data / rendered.PHOTOGRAPHS, [*rendered.files(data).values()]
        folder = data / self.dataset
        return folder, [
            path
            for part in dota.pairs(folder, self.unreadable).values()
            for pair in part
            for path in (pair.labels, pair.image)
        ]

    def contents(self, data_dir: Path | None) -> dict[str, str]:
        """See Task.contents; of all images together, and all labels."""
        folder, files = self.files(data_dir)
        if self._is_rendered:
            return contents.digests(files, folder) | {rendered.NAME: rendered.VERSION}
        return {
            "images": contents.checksum(files[1::2], folder),
            "labels": contents.checksum(files[::2], folder),
        }

    def read(self, model: DetectionModel, data_dir: Path | None) -> Splits:
        """See Task.read; nothing is decoded yet."""
        data, skip = Path(data_dir or "."), self.unreadable == "skip"
        if self._is_rendered:
            annotated, rows, facts = rendered.open_rendered(data, self.split_seed)
        else:
            annotated, rows, facts = dota.open_folder(
                data / self.dataset, self.held_out, self.split_seed, self.unreadable
            )
        self._keep(annotated, rows)
        whole = tiled(annotated, self.tile, self.overlap, self.visible)
        train = Tiles(whole, with_objects(whole, rows["train"]), skip, once=False)
        facts |= {
            "counts": {split: len(part) for split, part in rows.items()},
            "tiles": {"side": self.tile, "overlap": self.overlap, "train": len(train)},
            "unreadable": {"policy": self.unreadable},
            "warnings": facts.get("warnings", []),
        }
        validation, test = (Images(whole, rows[split], skip, once=True) for split in ("validation", "test"))
        names = annotated.class_names
        return Splits(train, validation, test, num_classes=len(names), class_names=names, facts=facts)

    def forward(self, model: DetectionModel) -> Forward:
        """Mirror and turn tiles (training only), then losses and, in evaluation, detections in whole images."""

        def forward(module: nn.Module, batch: Batch, training: bool) -> tuple[dict[str, Tensor], Tensor]:
            tiles, found = batch["tiles"].tolist(), batch["found"].tolist()
            objects = zip(batch["quads"].split(found), batch["classes"].split(found), strict=True)
            targets = [{"quads": corners, "labels": classes + 1} for corners, classes in objects]
            if not training:
                return self._looked_at(module, model, batch, tiles, targets), batch["labels"]
            flips = (torch.rand(len(tiles), 2) < self.flip).tolist()
            turns = torch.randint(0, 4 if self.turn else 1, (len(tiles),)).tolist()
            images = self._cut(model, batch, tiles)
            for number, ((across, down), quarters) in enumerate(zip(flips, turns, strict=True)):
                image, corners = turned(images[number], targets[number]["quads"], across, down, quarters)
                images[number], targets[number]["quads"] = image, corners
            return module(images, targets), batch["labels"]

        return forward

    def _cut(self, model: DetectionModel, batch: Batch, tiles: Sequence[Sequence[int]]) -> list[Tensor]:
        """Tiles (place in the batch, top, left, height, width) as floats ``[3, tile, tile]`` in [0, 1].

        One at the edge of a small image is filled up with the mean colour.
        """
        images = []
        for place, top, left, height, width in tiles:
            image = batch["pixel_values"][place, :, top : top + height, left : left + width].float().div_(255)
            if (height, width) != (self.tile, self.tile):
                whole = image.new_tensor(model.mean)[:, None, None].repeat(1, self.tile, self.tile)
                whole[:, :height, :width] = image
                image = whole
            images.append(image)
        return images

    def _looked_at(
        self,
        module: nn.Module,
        model: DetectionModel,
        batch: Batch,
        tiles: Sequence[Sequence[int]],
        targets: Sequence[dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """``detections`` in the images of a batch ``[B, D, 10]``; with targets ``losses`` of the tiles, a mean."""
        starts = [*range(0, len(tiles), self.at_once)]
        # Shards of a network are gathered in each forward pass: every process must have as many.
        spare = max(processes.collected(len(starts))) - len(starts) if processes.count() > 1 else 0
        losses, detections = [], []
        for number, start in enumerate([*starts, *[0] * spare]):
            part = slice(start, start + self.at_once)
            images = self._cut(model, batch, tiles[part])  # no more of a large image at once
            outputs = module(images, targets and targets[part])
            if number < len(starts):
                detections.append(outputs["detections"])
                losses += [outputs["losses"] * len(images)] if targets is not None else []
        whole = {"detections": _united(torch.cat(detections), tiles, len(batch["labels"]))}
        return whole if targets is None else whole | {"losses": torch.stack(losses).sum(dim=0) / len(tiles)}

    def metrics(self) -> OrientedScores:
        """DOTA's average precision over what was read."""
        return OrientedScores(self.annotated)

    def entered(self, model: DetectionModel, batch: Batch) -> list[Tensor]:
        """See ObjectTask.entered: the tiles of the images, one image's after the other's."""
        return self._cut(model, batch, self._tiles(batch))

    def _tiles(self, batch: Batch) -> list[list[int]]:
        """Those of an unlabelled batch: place in it, top, left, height, width."""
        sizes = batch["sizes"].tolist()
        return [
            [place, *tile]
            for place, (height, width, *_) in enumerate(sizes)
            for tile in places(height, width, self.tile, self.overlap).tolist()
        ]

    def predicting(self, model: DetectionModel) -> Forward:
        """See Task.predicting: of each image ``[D, 10]``, what is found in its tiles, united."""

        def forward(module: nn.Module, batch: Batch, training: bool) -> tuple[Tensor, Tensor]:
            return self._looked_at(module, model, batch, self._tiles(batch))["detections"], batch["labels"]

        return forward

    def understood(self, row: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
        """``objects``: what was found, see ``flora.tasks.detect.found.Found``; with corners."""
        return {"objects": found.of_quads(row, class_names)}

    def leave(self, predicted: Iterable[Predicted], class_names: Sequence[str], folder: Path) -> None:
        """What ``task=detect`` leaves, with outlines; and DOTA's files of results."""
        results = dota.Results(class_names)
        found.write(map(results.noted, predicted), class_names, range(len(class_names)), folder)
        results.write(folder / "task1")

    def preprocessing(self, model: DetectionModel) -> dict[str, Any]:
        """See Task.preprocessing."""
        sides = {"tile": self.tile, "overlap": self.overlap, "seen": self.sizes.short_sides[-1]}
        return sides | {"mean": model.mean, "std": model.std, "orientation": "stored"}


def _united(detections: Tensor, tiles: Sequence[Sequence[int]], count: int) -> Tensor:
    """What is found in images, from what is found in their tiles: ``[B, D, 10]``, as many as the most have."""
    shifts = detections.new_tensor([[left, top] * 4 + [0, 0] for _, top, left, _, _ in tiles])
    there = detections[..., -1:] >= 0
    detections = torch.where(there, detections + shifts[:, None], detections)
    of = torch.tensor([place for place, *_ in tiles], device=detections.device)
    each = [united(detections[of == image].flatten(0, 1)) for image in range(count)]
    longest = max(1, *map(len, each))
    whole = torch.stack([F.pad(rows, (0, 0, 0, longest - len(rows)), value=PADDING) for rows in each])
    broken = torch.stack([detections[of == image].isnan().any() for image in range(count)])
    return whole.masked_fill(broken[:, None, None], torch.nan)


def turned(image: Tensor, corners: Tensor, across: bool, down: bool, quarters: int) -> tuple[Tensor, Tensor]:
    """A square image ``[3, S, S]`` and the objects in it ``[n, 4, 2]``, mirrored and then turned.

    Args:
        image, corners: of a tile; x and y.
        across: exchange left and right.
        down: exchange top and bottom.
        quarters: turns against the clock.
    """
    side = image.shape[-1]
    x, y = corners.unbind(-1)
    if across:
        image, x = image.flip(2), side - x
    if down:
        image, y = image.flip(1), side - y
    for _ in range(quarters):
        x, y = y, side - x
    return image.rot90(quarters, (1, 2)), torch.stack([x, y], dim=-1)
