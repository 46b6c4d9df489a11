"""A folder of questions about pets."""

import pytest

from tests.tasks.vqa.questions import write_questions


@pytest.fixture
def pets(tmp_path):
    for split in ("train", "test"):
        write_questions(tmp_path / "pets", split)
    return tmp_path
