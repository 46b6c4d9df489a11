"""Gliding Vertex: what it learns of an object and back, its losses by hand, and detectors over small backbones."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

from flora.methods import Peft
from flora.methods.base import load
from flora.methods.heads import in_head, trained
from flora.models import TimmModel, get, quads
from flora.models.detection import Sizes
from flora.models.oriented import (
    AMBIGUOUS,
    UPRIGHT,
    GlidingPredictor,
    OrientedModel,
    corners_of,
    glide_losses,
    glides_of,
    united,
)
from tests.models.test_quads import rotated

SMALL = Sizes(
    short_sides=(64,), longest_side=64, anchors=(8, 16, 32, 64, 128), channels=16, hidden=32, proposals=(200, 100)
)


def turned(degrees, sides=(24.0, 8.0), middle=(50.0, 40.0)):
    """A rectangle, float64 ``[1, 4, 2]``."""
    return torch.tensor(rotated(np.array([sides]), np.array([math.radians(degrees)])) + middle)


def overlap(one, other):
    return quads.overlaps(one, other).item()


@pytest.mark.parametrize("turn", [0, 1, 2, 3])
@pytest.mark.parametrize("degrees", [12, 30, 45, 60, 89.5 - 20, 100, 135, 170, 200, 300])
def test_what_is_learnt_of_a_rectangle_tells_it_again(degrees, turn):
    rectangle = turned(degrees).roll(turn, dims=1)  # whichever corner the file begins with
    rectangle = rectangle.flip(1) if turn % 2 else rectangle

    glides = glides_of(rectangle)

    assert glides[0, 4] < UPRIGHT
    again = corners_of(quads.hulls(rectangle), glides)
    found = sorted(map(tuple, again[0].round(decimals=9).tolist()))
    assert found == sorted(map(tuple, rectangle[0].round(decimals=9).tolist()))


def test_the_places_of_corners_by_hand():
    diamond = torch.tensor([[[3.0, 0.0], [4.0, 1.0], [1.0, 4.0], [0.0, 3.0]]])  # in a box of 4 by 4

    (glides,) = glides_of(diamond)

    torch.testing.assert_close(glides, torch.tensor([3 / 4, 1 / 4, 3 / 4, 1 / 4, 6 / 16]))


@pytest.mark.parametrize("degrees", [0, 90, 180, 1e-7, -1e-7, 90 + 1e-6, 0.3, -0.3])
def test_an_almost_upright_rectangle_is_its_box(degrees):
    rectangle = turned(degrees)

    glides = glides_of(rectangle)

    assert glides[0, :4].eq(0).all()
    assert glides[0, 4] > AMBIGUOUS
    assert overlap(corners_of(quads.hulls(rectangle), glides), rectangle) > AMBIGUOUS


def test_a_square_on_its_corner_has_them_in_the_middle_from_either_side():
    for degrees in (45 - 1e-6, 45, 45 + 1e-6):
        torch.testing.assert_close(glides_of(turned(degrees, (10.0, 10.0)))[0], torch.full((5,), 0.5).double())


def test_objects_without_area_give_finite_numbers():
    points = torch.zeros(1, 4, 2)
    line = torch.tensor([[[0.0, 0], [4, 4], [4, 4], [0, 0]]])

    assert glides_of(torch.cat([points, line])).isfinite().all()


def test_losses_by_hand():
    glides = torch.full((4, 3, 5), 0.5)
    glides[1, 2] = torch.tensor([0.1, 0.5, 0.5, 0.9, 0.3])
    labels = torch.tensor([0, 2, 1, 0])
    wanted = torch.tensor([[0.0] * 5, [0.2, 0.5, 0.0, 0.9, 0.4], [0.0, 0.0, 0.0, 0.0, 0.99], [1.0] * 5])

    places, obliqueness = glide_losses(glides, labels, wanted)

    # Smooth L1 with a kink at 1/3: 1.5 d^2 below, d - 1/6 above; the third region is ambiguous, the others background.
    assert places.item() == pytest.approx((1.5 * 0.1**2 + (0.5 - 1 / 6)) / 4)
    assert obliqueness.item() == pytest.approx(16 * (1.5 * 0.1**2 + (0.49 - 1 / 6)) / 4)


def test_losses_without_any_object_are_zero_and_train_nothing():
    glides = torch.rand(3, 2, 5, requires_grad=True)

    sum(glide_losses(glides, torch.zeros(3, dtype=torch.int64), torch.zeros(3, 5))).backward()

    assert glides.grad.eq(0).all()


def test_the_predictor_has_torchvisions_classes_and_boxes():
    predictor = GlidingPredictor(8, 4)
    theirs = FastRCNNPredictor(8, 4)
    theirs.load_state_dict({n: p for n, p in predictor.state_dict().items() if not n.startswith("glides")})
    features = torch.rand(5, 8)

    scores, changes, glides = predictor(features)

    assert torch.equal(scores, theirs(features)[0])
    assert torch.equal(changes, theirs(features)[1])
    assert glides.shape == (5, 4, 5)
    assert ((glides > 0) & (glides < 1)).all()


def model(name="resnet18", **architecture):
    backbone = TimmModel(name, pretrained=False, architecture=architecture or {"channels": (8, 8, 16, 16)})
    return OrientedModel(backbone, SMALL, 20)


def built(classes=3):
    torch.manual_seed(0)
    return model().build(classes)


def examples():
    """Two images, the second without an object."""
    images = list(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    shapes = torch.cat([turned(30), turned(0, (20.0, 20.0), (20.0, 20.0))]).float()
    targets = [
        {"quads": shapes, "labels": torch.tensor([1, 3])},
        {"quads": torch.zeros(0, 4, 2), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    return images, targets


def test_a_detector_that_is_certain_finds_what_it_is_told():
    """Heads that answer with the objects themselves: what is decoded, suppressed and scaled back is them."""
    detector, (_, targets) = built().eval(), examples()
    images = list(torch.rand(2, 3, 32, 32))  # seen at twice the size
    shapes = targets[0]["quads"]
    halves = quads.hulls(shapes)

    class Told(nn.Module):
        def forward(self, features):
            scores = torch.full((len(features), 4), -20.0)
            glides = torch.zeros(len(features), 4, 5)
            for row, label in enumerate((1, 3)):
                scores[row, label] = 20.0
                glides[row, label] = glides_of(shapes)[row]
            return scores, torch.zeros(len(features), 16), glides

    detector.roi_heads.box_predictor = Told()
    detector.rpn.forward = lambda *args: ([halves, halves[:0]], {})
    with torch.no_grad():
        found = detector(images)["detections"]

    assert found.shape == (2, 20, 10)
    assert found[1].eq(-100).all()
    rows = found[0][found[0][:, 9] >= 0]
    assert rows[:, 9].tolist() == [0, 2]
    for row, shape in zip(rows, shapes, strict=True):
        assert overlap(row[:8].view(1, 4, 2), shape[None] / 2) == pytest.approx(1, abs=1e-4)


def test_it_learns_directions():
    detector, (images, targets) = built(), examples()
    optimizer = torch.optim.AdamW(detector.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        torch.manual_seed(0)
        loss = detector(images, targets)["losses"]
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        losses.append(loss.detach())

    assert losses[0].shape == (6,)
    assert (losses[-1][[2, 5]] < losses[0][[2, 5]]).all()  # classes, obliqueness
    assert losses[-1].sum() < 0.7 * losses[0].sum()


def test_evaluation_gives_losses_as_well_and_needs_no_targets():
    detector, (images, targets) = built().eval(), examples()

    with torch.no_grad():
        told, again, alone = detector(images, targets), detector(images, targets), detector(images)

    assert torch.equal(told["losses"], again["losses"])
    assert torch.equal(told["detections"], alone["detections"])


def test_boxes_stay_in_single_precision_where_the_network_computes_in_less():
    detector, (images, targets) = built(), examples()
    seen = []
    detector.roi_heads.box_roi_pool.register_forward_pre_hook(lambda module, args: seen.extend(args[1]))

    with torch.autocast("cpu", torch.bfloat16):
        detector(images, targets)["losses"].sum().backward()
        detector.eval()
        found = detector(images)["detections"]

    assert {boxes.dtype for boxes in seen} == {found.dtype} == {torch.float32}
    (first, _) = seen[:2]
    assert (first[:, None] == quads.hulls(quads.rectangles(targets[0]["quads"]))).all(-1).any(0).all()  # not rounded


@pytest.mark.parametrize("method", ["flora.FloraConfig", "peft.LoraConfig"])
def test_adapters_go_to_the_backbone_alone_and_what_was_trained_comes_back(tmp_path, method):
    spec, (images, targets) = model(), examples()
    way = Peft("it", method, "all", r=2)
    adapted = way.apply(built(), spec.classifier).model
    adapters = [n for n, p in adapted.named_parameters() if p.requires_grad and not in_head(n, spec.classifier)]
    assert adapters
    assert all(name.startswith("base_model.model.backbone.network.") for name in adapters)
    adapted(images, targets)["losses"].sum().backward()
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.1).step()
    way.save(adapted, tmp_path)
    torch.manual_seed(0)
    base = model().build(3)
    for name, parameter in base.named_parameters():
        if in_head(name, spec.classifier):
            nn.init.normal_(parameter)  # other heads

    again = load(base, spec.classifier, tmp_path).model

    adapted.eval(), again.eval()
    again.load_state_dict({n: b for n, b in adapted.state_dict().items() if "running" in n}, strict=False)
    with torch.no_grad():
        assert torch.equal(adapted(images, targets)["losses"], again(images, targets)["losses"])
        assert torch.equal(adapted(images)["detections"], again(images)["detections"])


@pytest.mark.parametrize("name", ["convnext", "resnet"])
def test_the_shipped_networks_carry_an_oriented_detector(name):
    spec = OrientedModel(get(name), SMALL)
    network, (images, targets) = spec.build(3), examples()
    assert {"losses"} == network(images, targets).keys()
    count = sum(p.numel() for n, p in network.named_parameters() if in_head(n, spec.classifier))
    assert count == sum(p.numel() for n, p in spec.skeleton(3).named_parameters() if in_head(n, spec.classifier))


def test_lora_flat_of_the_published_size_is_counted_without_weights():
    spec = OrientedModel(TimmModel("convnextv2_large", pretrained=False), Sizes(), 2000)
    with torch.device("meta"):
        adapted = Peft("lora_flat", "flora.methods.LoraFlatConfig", "all", layer_types=["Linear", "Conv2d"], r=8).apply(
            spec.skeleton(15), spec.classifier
        )
    assert trained(adapted.model, spec.classifier)[0] == 12946080


def test_what_two_tiles_find_is_united():
    def row(shape, score, label):
        return torch.cat([shape.float().flatten(), torch.tensor([score, label])])

    plane = turned(30)
    rows = torch.stack(
        [
            row(plane, 0.6, 0.0),
            row(plane + 1, 0.9, 0.0),
            row(plane, 0.5, 1.0),
            torch.full((10,), -100.0),
            row(plane + 60, 0.1, 0.0),
        ]
    )

    assert united(rows).tolist() == rows[[1, 2, 4]].tolist()
    assert united(rows[3:4]).shape == (0, 10)
