"""The data sets of segmentation: their classes, and how masks write them."""

from dataclasses import dataclass

import numpy as np

IGNORED = -100  # the label of a pixel that does not count, as losses have it
_NONE = -1


@dataclass(frozen=True)
class Dataset:
    """A data set.

    Attributes:
        classes: names, in order.
        first: the number that masks write for class 0; the others follow.
        void: the number of pixels that do not count.
        size: short side of the image in pixels, in evaluation.
        crop: side of a training crop.
        hidden_size: channels of UPerNet's decoder.
    """

    classes: tuple[str, ...]
    first: int
    void: int
    size: int
    crop: int
    hidden_size: int

    def labels(self, mask: np.ndarray) -> np.ndarray:
        """Classes int16 ``[H, W]``, ``IGNORED`` where void, of a mask of bytes.

        Raises:
            ValueError: the mask has a number that is no class.
        """
        table = np.full(256, _NONE, np.int16)
        table[self.first : self.first + len(self.classes)] = np.arange(len(self.classes))
        table[self.void] = IGNORED
        labels = table[mask]
        if (labels == _NONE).any():
            last = self.first + len(self.classes) - 1
            unknown = int(mask[labels == _NONE].min())
            raise ValueError(f"it has class {unknown}, beside {self.first} to {last} and {self.void} for none")
        return labels


_CAMVID = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
# Those of the Scene Parsing Benchmark, first name each (objectInfo150.txt), as mmsegmentation calls them.
_ADE20K = """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth,
door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field,
armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard,
chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case,
pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel,
light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole,
land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer,
plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank,
trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase,
traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock,
flag"""

DATASETS = {
    "camvid": Dataset(tuple(_CAMVID.split()), first=0, void=255, size=360, crop=320, hidden_size=128),
    "ade20k": Dataset(
        tuple(_ADE20K.replace("\n", " ").split(", ")), first=1, void=0, size=512, crop=512, hidden_size=512
    ),
}
