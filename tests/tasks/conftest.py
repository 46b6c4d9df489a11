"""Data that tests of tasks read: images that spell numbers, parquet files of them, the data folder."""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature
from PIL import Image
from pyarrow import parquet as pq
from pyarrow import table


@pytest.fixture
def data_folder() -> Path:
    return Path(os.environ["FLORA_DATA"])


def png(number: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """An image whose every pixel spells a number: red its hundreds, green the rest."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number // 100, number % 100, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def numbers(images: np.ndarray) -> list[int]:
    """What ``png`` wrote, read back from uint8 [N, 3, H, W]."""
    return [int(image[0, 0, 0]) * 100 + int(image[1, 0, 0]) for image in images]


@pytest.fixture
def write_split(tmp_path: Path) -> Callable[..., Path]:
    """Writes FOLDER/NAME.parquet of images numbered from ``start``; image number i has label i modulo the classes."""

    def write(
        name: str,
        rows: int,
        start: int = 0,
        classes: int = 10,
        folder: str = "eurosat",
        replace: dict[int, bytes] | None = None,
        labels: Sequence[int | None] | None = None,
    ) -> Path:
        cells = [(replace or {}).get(i, png(start + i)) for i in range(rows)]
        columns = {
            "image": [{"bytes": cell, "path": None} for cell in cells],
            "label": list(labels) if labels is not None else [(start + i) % classes for i in range(rows)],
        }
        features = Features(image=ImageFeature(), label=ClassLabel(names=[f"class {c}" for c in range(classes)]))
        path = tmp_path / folder / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table(columns, schema=features.arrow_schema), path)
        return path

    return write
