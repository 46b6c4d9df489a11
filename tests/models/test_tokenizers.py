"""Tokenizers as people have them: with code of their own, which is not run, or with files that hold something else."""

import json

import pytest

from flora.errors import ConfigError, WeightsError
from tests.models.test_text import SIZES, tiny
from tests.tasks.texts import word_tokenizer

CODE = """
import pathlib
pathlib.Path({!r}).touch()
from transformers import PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast):
    pass
"""
WIDE = SIZES | {"vocab_size": 64}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tokenizer's folder; whoever asks is told yes."""
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr("builtins.input", lambda *said: "y")
    return tmp_path / "tokenizer"


def put(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def with_code(folder):
    """The folder's tokenizer, in a class of its own; returns what there is when the code was run."""
    (folder / "own.py").write_text(CODE.format(str(folder / "was_run")))
    put(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}, tokenizer_class="Own")
    return folder / "was_run"


def test_code_beside_a_tokenizer_is_not_run_and_nobody_is_asked(folder):
    was_run = with_code(folder)
    with pytest.raises(ConfigError, match=r"brings code of its own, which is not run.*model\.trust_remote_code=true"):
        tiny(architecture=WIDE, tokenizer=str(folder)).tokenizer()
    assert not was_run.exists()


def test_code_beside_a_tokenizer_is_run_where_that_is_asked_for_by_name(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    was_run = with_code(folder)
    tokenizer = tiny(architecture=WIDE, tokenizer=str(folder), trust_remote_code=True).tokenizer()
    assert type(tokenizer).__name__ == "Own"
    assert was_run.exists()


@pytest.mark.parametrize("heads", [3, 0, "a"])
def test_sizes_that_fit_no_network_end_in_one_line(heads):
    with pytest.raises(ConfigError, match=r"model\.architecture: "):
        tiny(architecture=SIZES | {"num_attention_heads": heads}).skeleton()


@pytest.mark.parametrize("content", ["[]", "[1, 2]", '"text"', "null", "7", '{"model": []}', '{"added_tokens": 3}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_files_that_hold_something_else_end_in_one_line(folder, name, content):
    (folder / name).write_text(content)
    said = None
    try:
        tokenizer = tiny(architecture=WIDE, tokenizer=str(folder)).tokenizer()
    except WeightsError as error:
        said = str(error)
    if said is None:  # a file that says nothing
        assert tokenizer("the cat")["input_ids"] == word_tokenizer()("the cat")["input_ids"]
    else:
        assert "set model.tokenizer" in said
        assert "\n" not in said
