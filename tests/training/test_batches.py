"""Batches of texts: grouped by length, in an order that follows the seed; images keep theirs."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import RandomSampler

from flora.errors import ConfigError
from flora.tasks.text.dataset import TextDataset, starts_of
from flora.training import TrainerSettings
from flora.training.trainer import Trainer
from tests.training.test_run import channels

LENGTHS = np.random.RandomState(0).permutation(np.arange(1, 257)).tolist()


@pytest.fixture
def texts():
    tokens = {"input_ids": torch.ones(sum(LENGTHS), dtype=torch.int32)}
    return TextDataset(tokens, starts_of(LENGTHS), {"labels": torch.zeros(256, dtype=torch.int64)}, {"input_ids": 0})


def trainer(folder, data, seed=0, **settings):
    settings = TrainerSettings(epochs=1, lr=1, batch_size=8, eval_batch_size=8, device="cpu", **settings)
    return Trainer(
        nn.Linear(1, 1), settings, None, [], None, "accuracy", folder, train=data, validation=data, seed=seed
    )


def padded(order):
    batches = np.array(LENGTHS)[np.array(order)].reshape(-1, 8)
    return int(8 * batches.max(axis=1).sum())


def test_training_batches_are_of_similar_length_and_follow_the_seed(tmp_path, texts):
    first, again, other = (trainer(tmp_path, texts, seed)._get_train_sampler() for seed in (0, 0, 1))
    order = list(first)
    assert sorted(order) == list(range(256))
    assert padded(order) < 1.3 * sum(LENGTHS) < padded(range(256))
    assert order == list(again) != list(other)
    assert order != list(first), "every epoch has its own order"


def test_evaluation_starts_with_the_longest(tmp_path, texts):
    order = list(trainer(tmp_path, texts)._get_eval_sampler(texts))
    assert [LENGTHS[i] for i in order] == list(range(256, 0, -1))
    assert padded(order) < 1.05 * sum(LENGTHS)


def test_texts_to_train_on_are_filled_up_to_few_lengths(tmp_path, texts):
    filled = trainer(tmp_path, texts, pad_to_multiple_of=32)
    widths = {batch["input_ids"].shape[1] for batch in filled.get_train_dataloader()}
    assert widths <= set(range(32, 257, 32))
    assert len({batch["input_ids"].shape[1] for batch in trainer(tmp_path, texts).get_train_dataloader()}) > 20
    assert next(iter(filled.get_eval_dataloader()))["input_ids"].shape[1] == 256
    assert {batch["input_ids"].shape[1] % 32 for batch in filled.get_eval_dataloader()} == {0, 24, 16, 8}


def test_only_texts_can_be_filled_up(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.pad_to_multiple_of is for tasks of texts"):
        trainer(tmp_path, channels(16, 0), pad_to_multiple_of=8)


def test_images_are_drawn_as_before(tmp_path):
    assert isinstance(trainer(tmp_path, channels(16, 0))._get_train_sampler(), RandomSampler)
