"""Preprocessing and the models that an image task accepts."""

import pytest
import torch
from PIL import Image

import flora.models
from flora.errors import ConfigError
from flora.tasks import Vtab
from flora.tasks.images.decode import as_square
from tests.tasks.imagefolder.folders import task, write_tree


@pytest.mark.parametrize(
    ("normalisation", "expected"),
    [("none", 1.0), ("half", 1.0), ("imagenet", (1 - 0.485) / 0.229), (None, (1 - 0.485) / 0.229)],
)
def test_normalisation_is_a_switch(normalisation, expected):
    task = Vtab(name="vtab", dataset="eurosat", epochs=1, normalisation=normalisation)
    white = {"pixel_values": torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), "labels": torch.tensor([1])}
    seen, _ = task.forward(flora.models.get("convnext"))(torch.nn.Identity(), white, False)
    assert seen[0, 0, 0, 0].item() == pytest.approx(expected, abs=1e-5)


def test_a_crop_keeps_the_aspect_ratio_and_squashing_does_not():
    image = Image.new("RGB", (80, 40))
    image.paste((255, 0, 0), (0, 0, 20, 40))  # a red quarter on the left
    squashed, cropped = (as_square(image, 8, "nearest", how) for how in ("squash", "crop"))
    assert (squashed[:, :2, 0] == 255).all()
    assert (cropped[..., 0] == 0).all(), "the middle of a wide image has no red"
    assert cropped.shape == squashed.shape == (8, 8, 3)


@pytest.mark.parametrize("option", [{"normalisation": "sometimes"}, {"resize": "stretch"}, {"interpolation": "cubic"}])
def test_unknown_switches_are_refused(option):
    with pytest.raises(ConfigError, match=f"task.{next(iter(option))}="):
        Vtab(name="vtab", dataset="eurosat", epochs=1, **option)


@pytest.mark.parametrize("model", ["minilm_l6", "llava_mini"])
def test_models_that_do_not_classify_images_are_refused(tmp_path, model):
    write_tree(tmp_path)
    with pytest.raises(ConfigError, match=f"model={model} does not classify images"):
        task().load_for(flora.models.get(model), tmp_path)
