"""Quadrilaterals against shapely."""

import numpy as np
import pytest
import shapely
import torch
from torchvision.ops import batched_nms

from flora.models import quads


def random_quads(seed, count=300, spread=40.0):
    """Simple quadrilaterals, float64 ``[count, 4, 2]``: convex and not, in both turns, some of them rectangles."""
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, (count, 4)), axis=1)
    star = rng.uniform(2, 20, (count, 4, 1)) * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    made = rotated(rng.uniform(2, 25, (count, 2)), rng.choice([0, np.pi / 2, *rng.uniform(0, np.pi, 8)], count))
    made = np.where(rng.random((count, 1, 1)) < 0.5, star, made)
    made[::3] = made[::3, ::-1]
    return made + rng.uniform(0, spread, (count, 1, 2)) + 1000


def rotated(sides, angle):
    """Rectangles about the origin."""
    box = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]) * sides[:, None]
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]).transpose(2, 0, 1)
    return box @ turn


def valid(made):
    """Those that do not cross themselves."""
    return made[[shapely.Polygon(quad).is_valid for quad in made]]


def shapely_iou(one, other):
    one, other = shapely.polygons(one), shapely.polygons(other)
    common = shapely.area(shapely.intersection(one, other))
    return common / (shapely.area(one) + shapely.area(other) - common)


@pytest.mark.parametrize("seed", range(4))
def test_overlaps_are_shapelys(seed):
    one, other = valid(random_quads(seed)), valid(random_quads(seed + 100))
    count = min(len(one), len(other))
    one, other = one[:count], other[:count]
    expected = shapely_iou(one, other)
    assert ((expected > 0) & (expected < 1)).sum() > 50

    np.testing.assert_allclose(quads.areas(torch.tensor(one)), shapely.area(shapely.polygons(one)), rtol=1e-9)
    np.testing.assert_allclose(quads.overlaps(torch.tensor(one), torch.tensor(other)), expected, rtol=0, atol=1e-6)


def test_overlaps_of_quadrilaterals_that_share_corners_and_sides():
    square = np.array([[0.0, 0], [10, 0], [10, 10], [0, 10]])
    others = [
        square,
        square[::-1],
        np.roll(square, 1, axis=0),
        square + np.array([10, 0]),  # side by side
        square + np.array([10, 10]),  # corner to corner
        square + np.array([5, 0]),
        square * 0.5,
        square * [1, 0],  # a line
        [[5, -5], [15, 5], [5, 15], [-5, 5]],
        [[0, 0], [10, 0], [2, 2], [0, 10]],  # not convex, on two of its sides
        square + 1e-9,
        square + 100,
    ]
    others = np.array(others)
    expected = shapely_iou(np.broadcast_to(square, others.shape), others)

    for turn in np.linspace(0, 6, 7):
        frame = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        one, other = np.broadcast_to(square @ frame, others.shape) + 3000, others @ frame + 3000
        found = quads.overlaps(torch.tensor(one), torch.tensor(other))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_single_precision_is_enough_far_from_the_origin():
    one, other = (torch.tensor(rotated(np.array([[40.0, 12.0]]), np.array([angle])) + 20000) for angle in (0.3, 0.9))

    double, single = quads.overlaps(one, other), quads.overlaps(one.float(), other.float())

    assert single.item() == pytest.approx(double.item(), abs=1e-3)


def test_nothing_overlaps_nothing():
    none = torch.zeros(0, 4, 2)

    assert quads.overlaps(none, none).shape == (0,)
    assert quads.suppressed(none, torch.zeros(0), torch.zeros(0), 0.5).shape == (0,)
    assert quads.rectangles(none).shape == (0, 4, 2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_suppression_is_greedy(seed, threshold):
    made, rng = valid(random_quads(seed, 150, spread=20.0)), np.random.default_rng(seed)
    scores, classes = np.round(rng.random(len(made)), 2), rng.integers(0, 3, len(made))
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        rivals = [j for j in kept if classes[j] == classes[i]]
        if not rivals or shapely_iou(made[rivals], made[[i] * len(rivals)]).max() <= threshold:
            kept.append(i)

    found = quads.suppressed(*map(torch.tensor, (made, scores, classes)), threshold)

    assert found.tolist() == kept
    assert 10 < len(kept) < len(made) - 10


def test_suppression_of_upright_boxes_is_torchvisions():
    boxes = torch.rand(300, 4, generator=torch.Generator().manual_seed(0)) * 50
    boxes[:, 2:] += boxes[:, :2] + 1
    scores, classes = torch.rand(300, generator=torch.Generator().manual_seed(1)), torch.arange(300) % 4

    found = quads.suppressed(quads.corners(boxes), scores, classes, 0.4)

    assert torch.equal(found, batched_nms(boxes, scores, classes, 0.4))


def test_a_chain_keeps_every_second():
    boxes = torch.tensor([[4.0 * i, 0, 4.0 * i + 10, 5] for i in range(30)])  # each overlaps the next by 6 of 14

    found = quads.suppressed(quads.corners(boxes), torch.linspace(1, 0, 30), torch.zeros(30), 0.4)

    assert found.tolist() == list(range(0, 30, 2))


def test_rectangles_are_the_smallest():
    made = random_quads(7)
    made[0] = [5, 5]  # a point
    made[1] = [[0, 0], [3, 3], [6, 6], [9, 9]]

    found = quads.rectangles(torch.tensor(made)).numpy()

    theirs = shapely.area(shapely.minimum_rotated_rectangle(shapely.polygons(made)))
    np.testing.assert_allclose(quads.areas(torch.tensor(found)), theirs, rtol=1e-6, atol=1e-6)
    sides = np.roll(found, -1, axis=1) - found
    np.testing.assert_allclose((sides * np.roll(sides, -1, axis=1)).sum(-1), 0, atol=1e-6)  # right angles
    grown = shapely.buffer(shapely.polygons(found), 1e-6)
    assert shapely.covers(grown, shapely.multipoints(made)).all()


@pytest.mark.gpu
def test_a_gpu_says_the_same():
    one, other = (torch.tensor(valid(random_quads(seed))[:200]) for seed in (0, 1))
    scores, classes = torch.rand(200, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 3

    overlaps = quads.overlaps(one.cuda(), other.cuda()).cpu()
    kept = quads.suppressed(one.cuda(), scores.cuda(), classes.cuda(), 0.3).cpu()

    torch.testing.assert_close(overlaps, quads.overlaps(one, other), rtol=0, atol=1e-9)
    assert torch.equal(kept, quads.suppressed(one, scores, classes, 0.3))
    torch.testing.assert_close(quads.rectangles(one.cuda()).cpu(), quads.rectangles(one))
