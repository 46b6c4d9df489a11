"""Texts as tokens: what the tokenizer says, cut, and kept in the cache."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from flora.errors import ConfigError
from flora.tasks.text.tokenise import padding_of, tokenise
from tests.tasks.texts import SPECIAL, WORDS, word_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenised"


def test_texts_become_what_the_tokenizer_says_whatever_was_set_on_it():
    texts = [("the cat sat", "yes"), ("a dog ran on the mat", "no")]
    tokenizer = word_tokenizer()
    expected = [tokenizer(*text)["input_ids"] for text in texts]
    tokenizer("the", truncation=True, max_length=2, padding="max_length")  # some tokenizer.json come with a limit
    tokens, starts, cut = tokenise(texts, tokenizer, 100)
    assert [tokens["input_ids"][a:b].tolist() for a, b in itertools.pairwise(starts)] == expected
    assert tokens["token_type_ids"][: starts[1]].tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert cut == 0


def test_long_texts_are_cut_and_counted():
    tokens, starts, cut = tokenise([("the cat sat on the mat",), ("yes",)], word_tokenizer(), 5)
    assert cut == 1
    words = [(SPECIAL + WORDS)[i] for i in tokens["input_ids"][: starts[1]]]
    assert words == ["[CLS]", "the", "cat", "sat", "[SEP]"]
    assert starts.tolist() == [0, 5, 8]


@pytest.mark.parametrize(("texts", "marks"), [(("the cat sat",), 2), (("the cat", "sat"), 3)])
def test_a_length_without_room_for_words_is_refused(texts, marks):
    with pytest.raises(ConfigError, match=f"task.max_length={marks} must be above {marks}"):
        tokenise([texts], word_tokenizer(), marks)
    assert tokenise([texts], word_tokenizer(), marks + 1)[1].tolist() == [0, marks + 1]


def test_the_cache_is_asked_before_the_tokenizer_and_survives_damage(cache, monkeypatch):
    texts, tokenizer = [("the cat",), ("a dog ran",)], word_tokenizer()
    first = tokenise(texts, tokenizer, 4)
    (file,) = cache.glob("*")

    def refuse(*args, **kwargs):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(type(tokenizer), "__call__", refuse)
    again = tokenise(texts, tokenizer, 4)
    assert all(torch.equal(first[0][name], again[0][name]) for name in first[0])
    assert torch.equal(first[1], again[1])
    assert again[2] == first[2] == 1
    monkeypatch.undo()
    monkeypatch.setenv("FLORA_CACHE", str(cache.parent))
    file.write_bytes(b"half")
    assert torch.equal(tokenise(texts, tokenizer, 4)[1], first[1])


def test_a_damaged_entry_is_told_by_its_checksum_and_replaced(cache):
    texts, tokenizer = [("the cat",), ("a dog ran",)], word_tokenizer()
    expected = tokenise(texts, tokenizer, 9)
    (file,) = cache.glob("*")
    whole = file.read_bytes()
    for place in range(8, len(whole)):  # after the length of the header
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        tokens, starts, cut = tokenise(texts, tokenizer, 9)
        assert tokens.keys() == expected[0].keys()
        assert all(torch.equal(tokens[name], expected[0][name]) for name in tokens), place
        assert (starts.tolist(), cut) == (expected[1].tolist(), expected[2]), place
    assert tokenise(texts, tokenizer, 9)[1].tolist() == expected[1].tolist()
    assert len(list(cache.glob("*"))) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")])
def test_a_full_disk_is_one_line_and_leaves_no_file(cache, monkeypatch, capsys, error):
    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr("flora.tasks.text.tokenise.save_file", fail)
    assert tokenise([("the cat",)], word_tokenizer(), 9)[1].tolist() == [0, 4]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {cache} cannot be written")
    assert "No space left" in line
    assert "FLORA_CACHE" in line
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("change", ["text", "length", "border"])
def test_other_content_is_another_entry(cache, change):
    tokenise([("the cat", "sat")], word_tokenizer(), 9)
    texts = {"text": ("the cat", "ran"), "length": ("the cat", "sat"), "border": ("the", "cat sat")}
    tokenise([texts[change]], word_tokenizer(), 8 if change == "length" else 9)
    assert len(list(cache.glob("*"))) == 2


def test_a_tokenizer_without_a_pad_token_is_refused():
    with pytest.raises(ConfigError, match="no pad token"):
        padding_of(word_tokenizer(pad=False), ["input_ids"])
