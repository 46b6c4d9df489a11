"""Batches of texts: grouped by length, in an order that follows the seed; images keep theirs."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import RandomSampler

from flora.tasks.text.dataset import TextDataset, starts_of
from flora.training import TrainerSettings
from flora.training.trainer import Trainer
from tests.training.test_run import channels

LENGTHS = np.random.RandomState(0).permutation(np.arange(1, 257)).tolist()


@pytest.fixture
def texts():
    tokens = {"input_ids": torch.ones(sum(LENGTHS), dtype=torch.int32)}
    return TextDataset(tokens, starts_of(LENGTHS), {"labels": torch.zeros(256, dtype=torch.int64)}, {"input_ids": 0})


def trainer(folder, data, seed=0):
    settings = TrainerSettings(epochs=1, lr=1, batch_size=8, eval_batch_size=8, device="cpu")
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


def test_images_are_drawn_as_before(tmp_path):
    assert isinstance(trainer(tmp_path, channels(16, 0))._get_train_sampler(), RandomSampler)
