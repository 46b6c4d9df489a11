"""Tokens in memory: batches against a plain loop, the cache, and what is cut."""

import itertools

import numpy as np
import pytest
import torch

from flora.errors import ConfigError
from flora.tasks.text import TextDataset, padding_of, starts_of, tokenise
from tests.tasks.texts import SPECIAL, WORDS, word_tokenizer

ROWS = [[5, 6, 7], [8], [9, 10], [4, 4, 4, 4]]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenised"


def dataset(rows=ROWS, start=0):
    flat = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    labels = torch.arange(start, start + len(rows))
    return TextDataset({"input_ids": flat}, starts_of(map(len, rows)), {"labels": labels}, {"input_ids": 99})


def rows_of(data):
    return [data[i]["input_ids"].tolist() for i in range(len(data))]


def test_a_batch_is_as_wide_as_its_longest():
    batch = dataset().__getitems__([2, 0])
    assert batch["input_ids"].tolist() == [[9, 10, 99], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [2, 0]
    assert batch["input_ids"].dtype == torch.int64


def test_concat_take_and_subset_keep_the_sequences():
    both = dataset().concat(dataset([[1], [2, 3]], start=4))
    assert rows_of(both) == [*ROWS, [1], [2, 3]]
    assert rows_of(both.take(np.array([5, 0]))) == [[2, 3], [5, 6, 7]]
    some = both.subset(3)
    assert rows_of(some) == [rows_of(both)[i] for i in some.values["labels"]]
    assert some.values["labels"].tolist() == sorted(set(some.values["labels"].tolist()))


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


@pytest.mark.parametrize("change", ["text", "length", "border"])
def test_other_content_is_another_entry(cache, change):
    tokenise([("the cat", "sat")], word_tokenizer(), 9)
    texts = {"text": ("the cat", "ran"), "length": ("the cat", "sat"), "border": ("the", "cat sat")}
    tokenise([texts[change]], word_tokenizer(), 8 if change == "length" else 9)
    assert len(list(cache.glob("*"))) == 2


def test_a_tokenizer_without_a_pad_token_is_refused():
    with pytest.raises(ConfigError, match="no pad token"):
        padding_of(word_tokenizer(pad=False), ["input_ids"])
