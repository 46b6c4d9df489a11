"""Parquet files as others write them: metadata that is broken or of unknown types, columns that are doubled."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flora.errors import DataError
from flora.tasks.commonsense.files import ask_all
from flora.tasks.commonsense.questions import adapters_row
from flora.tasks.images.parquet import open_pool, read_class_names
from flora.tasks.text.rows import read_parquet
from flora.tasks.vqa.dialogues import Pictures, plain
from flora.tasks.vqa.dialogues import read_parquet as read_questions
from tests.tasks.conftest import png


def features(label):
    return json.dumps({"info": {"features": {"label": label}}}).encode()


BROKEN = {
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "features that are a list": b'{"info": {"features": [1]}}',
    "info that is a list": b'{"info": []}',
    "an unknown type": features({"_type": "Unheard"}),
    "a type that is a list": features({"_type": ["ClassLabel"]}),
    "names that are doubled": features({"_type": "ClassLabel", "names": ["ant", "ant"]}),
    "names that are no texts": features({"_type": "ClassLabel", "names": [1, None]}),
    "names that are a number": features({"_type": "ClassLabel", "names": 7}),
    "an unknown argument": features({"_type": "ClassLabel", "names": ["ant", "bee"], "colour": "red"}),
    "a label that is a number": features(3),
}


def write(path, table, metadata=None):
    schema = table.schema if metadata is None else table.schema.with_metadata({b"huggingface": metadata})
    pq.write_table(table.cast(schema) if metadata is None else table.replace_schema_metadata(schema.metadata), path)
    return path


def images():
    return pa.table({"image": [{"bytes": png(i), "path": None} for i in range(4)], "label": [0, 1, 0, 1]})


def texts():
    return pa.table({"sentence": ["a", "b"], "label": [0, 1]})


def refused(read):
    """What is said of a file that cannot be read, in one line; None of one that can."""
    said = None
    try:
        read()
    except DataError as error:
        said = str(error)
    assert "\n" not in (said or "")
    return said


@pytest.mark.parametrize("kind", BROKEN)
def test_metadata_that_cannot_be_read_is_said(tmp_path, kind):
    path = write(tmp_path / "train.parquet", images(), BROKEN[kind])
    image = refused(lambda: open_pool([path], read_class_names([path], 2)))
    path = write(tmp_path / "text.parquet", texts(), BROKEN[kind])
    text = refused(lambda: read_parquet([path], ["sentence"], 2, (0, 1)))
    assert (image is None) == (text is None)
    if image is not None:
        assert "its Hugging Face metadata cannot be read" in image
        assert "its Hugging Face metadata cannot be read" in str(text)


def doubled(table):
    return pa.Table.from_arrays([*table.columns, table.column(0)], names=[*table.column_names, table.column_names[0]])


def not_utf8(table, column):
    raw = pa.array([b"\xff\xfe"] * table.num_rows, pa.binary()).view(pa.string())
    return table.set_column(table.column_names.index(column), column, raw)


def test_doubled_columns_and_texts_that_are_none_are_said(tmp_path):
    asked = pa.table({"image": images()["image"], "question": ["is it?"] * 4, "answer": ["yes"] * 4})
    choices = pa.table({"instruction": ["which?"] * 2, "answer": ["true", "false"]})
    readers = {
        "sentence": (texts(), lambda path: read_parquet([path], ["sentence"], 2, (0, 1))),
        "question": (asked, lambda path: read_questions([path], plain, Pictures())),
        "instruction": (choices, lambda path: ask_all([path], adapters_row)),
    }
    for column, (table, read) in readers.items():
        for changed in (doubled(table), not_utf8(table, column)):
            path = write(tmp_path / "train.parquet", changed)
            said = refused(lambda path=path, read=read: read(path))
            assert said is not None
            assert "not a readable parquet file" in said
    path = write(tmp_path / "train.parquet", doubled(images()))
    assert "no single column image" in refused(lambda: open_pool([path], ["ant", "bee"]))
