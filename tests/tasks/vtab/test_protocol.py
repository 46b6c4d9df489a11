"""protocol=vtab1k is VTAB-1K's: 800/200, the 1000, the test once; images resized to 224 and nothing else."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from flora.config import composed, instantiate
from flora.results import cells

MINI = ("eurosat", "vtab", "budget_curve", "ratios", "rank_sweep", "defaults", "starts", "small_budgets")
MINI += ("kernel_rank_ablation", "structure_ablation", "figure4_norms")


def test_the_paper_scale_is_vtab1k_with_nothing_but_a_resize():
    """Zhai et al. 2019; PETL-ViT's convpass/vtab/train.py @0f1c47f: 224 px, bicubic, ImageNet's statistics."""
    table = cells.load("vtab", "paper")
    assert len({cell.task for cell in table.cells}) == 19
    for cell in {cell.task: cell for cell in table.cells}.values():
        cfg = composed(cell.overrides)
        protocol = instantiate(cfg.protocol)
        assert (protocol.name, protocol.select, protocol.final_train) == ("vtab1k", "last", "train+validation")
        assert (cfg.trainer.epochs, cfg.trainer.warmup_ratio, cfg.trainer.batch_size) == (100, 0.1, 64)
        assert (cfg.trainer.drop_path, cfg.trainer.weight_decay, cfg.task.test_size) == (0.1, 1e-4, "full")
        task, model = instantiate(cfg.task), instantiate(cfg.model)
        assert task.augment() is None
        shown = task.preprocessing(model)
        assert (shown["resize"], shown["interpolation"], shown["image_size"]) == ("squash", "bicubic", 224)
        assert shown["mean"] == pytest.approx((0.485, 0.456, 0.406))
        assert shown["std"] == pytest.approx((0.229, 0.224, 0.225))


def test_what_is_trained_on_is_the_resized_image(tmp_path, write_split):
    noise = np.random.RandomState(0).randint(0, 256, (90, 60, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    for split in ("train", "validation", "test"):
        write_split(split, 4, replace={i: stream.getvalue() for i in range(4)})
    cfg = composed(["task=vtab", "task.dataset=eurosat", "model=convnext", "model.image_size=224"])
    task, model = instantiate(cfg.task), instantiate(cfg.model)
    splits = task.read(model, tmp_path)
    resized = np.asarray(Image.fromarray(noise).resize((224, 224), Image.Resampling.BICUBIC)) / 255
    expected = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    seen = []

    class Network(torch.nn.Module):
        def forward(self, images):
            seen.append(images)
            return images.mean((2, 3))

    batch = {"pixel_values": splits.train.images, "labels": splits.train.labels}
    task.forward(model)(Network(), batch, True)
    for image in seen[0]:
        assert torch.allclose(image, torch.from_numpy(expected.transpose(2, 0, 1)).float(), atol=1e-5)


@pytest.mark.parametrize("name", MINI)
def test_a_small_table_with_crop_and_flip_says_so_and_does_not_call_itself_vtab1k(name):
    table = cells.load(name)
    images = [cell for cell in table.cells if cell.settings["task"] == "vtab"]
    assert images
    assert all(cell.settings["task.augment"] == "auto" for cell in images)
    assert "VTAB-1K" not in table.title
    (note,) = [note for note in table.notes if "augment" in note]
    assert "cropped and flipped" in note
