"""easy-VQA: its files out of its package, whose code is not run."""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from flora.errors import DataError, WeightsError
from flora.models.weights import download_wheel, sha256_of

PACKAGE = "easy-vqa==1.0"  # MIT; its wheel carries the images
SHA256 = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"


def fetch(folder: Path) -> str:
    """Write ``train.parquet`` and ``test.parquet``; returns where they come from."""
    with tempfile.TemporaryDirectory() as place:
        try:
            wheel = download_wheel(PACKAGE, Path(place))
        except WeightsError as error:
            raise DataError(f"easy_vqa: {error}; give a folder that has it with --from") from error
        if (digest := sha256_of(wheel)) != SHA256:
            raise DataError(f"easy_vqa: the package index served another file (sha256 {digest}); do not use it")
        image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        schema = pa.schema({"image": image, "question": pa.string(), "answer": pa.string()})
        with zipfile.ZipFile(wheel) as archive:
            for split in ("train", "test"):
                root = f"easy_vqa/data/{split}"
                rows = json.loads(archive.read(f"{root}/questions.json"))
                images = {number: archive.read(f"{root}/images/{number}.png") for *_, number in rows}
                columns = {
                    "image": [{"bytes": images[n], "path": f"{split}/{n}.png"} for *_, n in rows],
                    "question": [question for question, *_ in rows],
                    "answer": [answer for _, answer, _ in rows],
                }
                pq.write_table(pa.table(columns, schema=schema), folder / f"{split}.parquet")
    return f"package {PACKAGE}"
