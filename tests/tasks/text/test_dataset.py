"""Tokens in memory: batches against a plain loop, subsets and joins."""

import numpy as np
import torch

from flora.tasks.text.dataset import TextDataset, starts_of

ROWS = [[5, 6, 7], [8], [9, 10], [4, 4, 4, 4]]


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


def test_a_batch_is_filled_up_to_a_multiple_or_to_the_longest_of_all():
    padded = dataset().padded_to(3)
    assert [padded.__getitems__(rows)["input_ids"].tolist() for rows in ([1, 2], [0], [1, 3])] == [
        [[8, 99, 99], [9, 10, 99]],
        [[5, 6, 7]],
        [[8, 99, 99, 99], [4, 4, 4, 4]],
    ]
    assert padded.__getitems__([1])["attention_mask"].tolist() == [[1, 0, 0]]
    assert rows_of(padded.take(np.array([1]))) == [[8]], "the longest of those that are left"


def test_on_the_left_it_is_filled_up_to_a_multiple_as_well():
    tokens = {"input_ids": torch.arange(1, 8)}
    padded = TextDataset(tokens, starts_of([2, 5]), {}, {"input_ids": 0}, left=True).padded_to(4)
    assert padded.__getitems__([0])["input_ids"].tolist() == [[0, 0, 1, 2]]


def test_concat_take_and_subset_keep_the_sequences():
    both = dataset().concat(dataset([[1], [2, 3]], start=4))
    assert rows_of(both) == [*ROWS, [1], [2, 3]]
    assert rows_of(both.take(np.array([5, 0]))) == [[2, 3], [5, 6, 7]]
    some = both.subset(3)
    assert rows_of(some) == [rows_of(both)[i] for i in some.values["labels"]]
    assert some.values["labels"].tolist() == sorted(set(some.values["labels"].tolist()))
