"""The order of examples of a language model that sees."""

import torch

from flora.tasks.text.dataset import TextDataset, starts_of
from flora.tasks.vqa.dataset import Shown
from flora.tasks.vqa.dialogues import Pictures
from flora.training import TrainerSettings
from flora.training.order import ModalityOrder
from flora.training.trainer import Trainer
from tests.training.test_run import ToyModel

SHOWS = [i % 3 > 0 for i in range(29)]  # 19 with an image, 10 without
LENGTHS = [5 + (7 * i) % 29 for i in range(29)]


def test_a_batch_shows_images_or_none_and_goes_from_long_to_short():
    orders = [list(ModalityOrder(LENGTHS, SHOWS, 4, torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(order) == list(range(29))
        batches = [order[i : i + 4] for i in range(0, 24, 4)]  # four whole ones with images, two without
        kinds = [{SHOWS[i] for i in batch} for batch in batches]
        assert sorted(map(sorted, kinds)) == [[False]] * 2 + [[True]] * 4
        for batch in batches:
            lengths = [LENGTHS[i] for i in batch]
            assert lengths == sorted(lengths, reverse=True)
        assert [SHOWS[i] for i in order[24:]] == [True] * 3 + [False] * 2, "what is left of both comes last"


def test_examples_of_one_kind_are_cut_into_batches_at_random():
    order = list(ModalityOrder(LENGTHS, [True] * 29, 8, torch.Generator().manual_seed(0)))
    assert sorted(order) == list(range(29))
    assert order[:8] != sorted(range(29), key=LENGTHS.__getitem__, reverse=True)[:8]


def test_the_trainer_takes_it_where_the_settings_ask_and_the_examples_show_images(tmp_path):
    rows = TextDataset({"input_ids": torch.ones(sum(LENGTHS), dtype=torch.int32)}, starts_of(LENGTHS), {}, {})
    shown = Shown(rows, [(0,) if shows else () for shows in SHOWS], Pictures(), lambda image: image)
    toy = ToyModel()

    def order_of(dataset, **settings):
        settings = TrainerSettings(epochs=1, lr=1e-3, batch_size=8, gradient_accumulation=2, device="cpu", **settings)
        trainer = Trainer(toy.build(3), settings, None, toy.classifier, None, "accuracy", tmp_path, train=dataset)
        return trainer.train_order(dataset)

    order = order_of(shown, group_by_modality=True)
    assert isinstance(order, ModalityOrder)
    assert order.batch == 8, "a step's, over what it accumulates"
    assert not isinstance(order_of(rows, group_by_modality=True), ModalityOrder)
    assert not isinstance(order_of(shown), ModalityOrder)
