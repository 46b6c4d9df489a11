"""Questions and conversations about images, written where the task looks for them."""

import json

from flora.tasks import Instruct
from tests.tasks.conftest import png
from tests.tasks.texts import write_rows


def task(dataset="pets", **options):
    return Instruct(**{"name": "instruct", "dataset": dataset, "epochs": 1, "validation_size": 2} | options)


def write_questions(folder, split="train", rows=8, images=4, **columns):
    """Questions about numbered images, each image asked about several times; the path."""
    cells = [{"bytes": png(i % images), "path": None} for i in range(rows)]
    made = {
        "image": cells,
        "question": ["what color is it?"] * rows,
        "answer": [("red", "yes")[i % 2] for i in range(rows)],
    }
    return write_rows(folder / f"{split}.parquet", made | columns)


def write_conversations(folder, entries, split="train"):
    """LLaVA's JSON with images 0.png, 1.png; the path."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(2):
        (folder / "images" / f"{number}.png").write_bytes(png(number))
    path = folder / f"{split}.json"
    path.write_text(json.dumps(entries))
    return path


def conversation(*turns, **more):
    speakers = ("human", "gpt")
    said = [{"from": speakers[i % 2], "value": value} for i, value in enumerate(turns)]
    return {"id": "7", "conversations": said} | more
