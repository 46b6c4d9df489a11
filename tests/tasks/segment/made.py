"""Made scenes: stripes of classes in their own grey, as tables and as ADE20K's folder."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from flora.models import TimmModel
from flora.models.segmentation import UperNet
from flora.tasks import Segment


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def scene(number: int, height: int = 48, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """An image uint8 [H, W, 3] of upright stripes, 20 grey values a class, and its mask; the first row is void."""
    mask = np.broadcast_to((np.arange(width) // 8 + number) % 11, (height, width)).astype(np.uint8).copy()
    image = np.repeat((20 * mask)[..., None], 3, axis=2)
    mask[0] = 255
    return image, mask


def write_table(folder: Path, split: str, cells: list[tuple[bytes | None, bytes | None]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    columns = {
        name: pa.array([{"bytes": cell[i], "path": None} for cell in cells])
        for i, name in enumerate(("image", "annotation"))
    }
    pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    return folder / f"{split}.parquet"


def write_camvid(data: Path, counts: dict[str, int] | None = None, **size: int) -> None:
    """Tables of scenes under DATA/camvid, numbered through."""
    start = 0
    for split, count in (counts or {"train": 6, "validation": 2, "test": 3}).items():
        pairs = [scene(start + i, **size) for i in range(count)]
        write_table(data / "camvid", split, [(encoded(image), encoded(mask)) for image, mask in pairs])
        start += count


def write_ade20k(data: Path, training: int = 10, validation: int = 2) -> Path:
    """ADE20K's official folder; class 1 of masks is the first, 0 is none."""
    place = data / "ade20k" / "ADEChallengeData2016"
    for split, count in (("training", training), ("validation", validation)):
        for kind in ("images", "annotations"):
            (place / kind / split).mkdir(parents=True)
        for i in range(count):
            image, mask = scene(i)
            Image.fromarray(image).save(place / "images" / split / f"ADE_{i}.jpg", quality=95)
            Image.fromarray((mask + 1).astype(np.uint8)).save(place / "annotations" / split / f"ADE_{i}.png")
    return place


def network(**options: int) -> UperNet:
    backbone = TimmModel("resnet18", pretrained=False, architecture={"channels": (8, 8, 16, 16)}, image_size=64)
    return UperNet(backbone, **{"hidden_size": 8, **options})


def task(**options: object) -> Segment:
    settings = {"name": "segment", "dataset": "camvid", "epochs": 1, "size": 48, "crop": 32, "hidden_size": 8}
    return Segment(**{**settings, **options})
