"""Quadrilaterals: areas, intersections, rectangles and non-maximum suppression, in batches and on any device.

A quadrilateral is four corners ``[4, 2]``, x and y, in either turn; it need not be convex, but must not cross itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PAIRS = 1 << 17  # that are intersected at once: about 100 MB
_FAN = ((0, 1, 2), (0, 2, 3))  # the triangles of a quadrilateral, of opposite turns where it is not convex
_LINES = ((0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (1, 3))


def hulls(quads: Tensor) -> Tensor:
    """The upright boxes around quadrilaterals ``[..., 4, 2]``: left, top, right, bottom ``[..., 4]``."""
    return torch.cat([quads.amin(dim=-2), quads.amax(dim=-2)], dim=-1)


def corners(boxes: Tensor) -> Tensor:
    """Upright boxes ``[..., 4]`` as quadrilaterals ``[..., 4, 2]``, clockwise on a screen from the upper left."""
    left, top, right, bottom = boxes.unbind(-1)
    return torch.stack([left, top, right, top, right, bottom, left, bottom], dim=-1).unflatten(-1, (4, 2))


def areas(quads: Tensor) -> Tensor:
    """Of quadrilaterals ``[..., 4, 2]``: ``[...]``, not negative."""
    return _cross(quads[..., 2, :] - quads[..., 0, :], quads[..., 3, :] - quads[..., 1, :]).abs() / 2


def intersections(one: Tensor, other: Tensor) -> Tensor:
    """The area that each of ``one`` shares with its partner in ``other``; both ``[N, 4, 2]``, the result ``[N]``."""
    parts = zip(one.split(_PAIRS), other.split(_PAIRS), strict=True)
    return torch.cat([one.new_zeros(0), *(_intersections(*part) for part in parts)])


def overlaps(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of each of ``one`` with its partner in ``other``; both ``[N, 4, 2]``, the result ``[N]``.

    0 for two without area.
    """
    common = intersections(one, other)
    union = areas(one) + areas(other) - common
    return torch.where(union > 0, common / union.clamp(min=torch.finfo(union.dtype).tiny), 0)


def touching(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Which boxes of ``one`` ``[N, 4]`` and of ``other`` ``[M, 4]`` share an area: indices into both, int64 ``[P]``."""
    found = []
    step = max(1, (1 << 24) // max(len(other), 1))
    for start in range(0, len(one), step):
        part = one[start : start + step, None]
        low, high = torch.maximum(part[..., :2], other[:, :2]), torch.minimum(part[..., 2:], other[:, 2:])
        found.append((low < high).all(dim=-1).nonzero() + torch.tensor([start, 0], device=one.device))
    first, second = torch.cat([torch.zeros(0, 2, dtype=torch.int64, device=one.device), *found]).unbind(1)
    return first, second


def suppressed(quads: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression: which detections stay, the best first.

    In the order of their scores, a detection goes if it overlaps by more than ``threshold`` with one of its class that
    stays.

    Args:
        quads: ``[N, 4, 2]``.
        scores: ``[N]``; of equal ones the first comes first.
        classes: ``[N]``.
        threshold: of intersection over union.

    Returns:
        Indices, int64 ``[K]``.
    """
    order = scores.argsort(descending=True, stable=True)
    quads, classes = quads[order], classes[order]
    boxes = hulls(quads)
    better, worse = touching(boxes, boxes)
    rivals = (better < worse) & (classes[better] == classes[worse])
    better, worse = better[rivals], worse[rivals]
    close = overlaps(quads[better], quads[worse]) > threshold
    better, worse = better[close], worse[close]
    stays = torch.ones(len(quads), dtype=torch.bool, device=quads.device)
    while True:  # right of the first n after n rounds, and final once nothing changes; in practice after a few
        again = torch.ones_like(stays)
        again[worse[stays[better]]] = False
        if torch.equal(again, stays):
            return order[stays]
        stays = again


def uncrossed(quads: Tensor) -> tuple[Tensor, Tensor]:
    """Quadrilaterals ``[N, 4, 2]`` in an order of corners in which none crosses itself, and which did: bool ``[N]``.

    Sides that cross are the diagonals of a convex quadrilateral.
    """

    def cross(a: int, b: int, c: int, d: int) -> Tensor:
        start, way, other = quads[:, a], quads[:, b] - quads[:, a], quads[:, d] - quads[:, c]
        apart = _cross(way, quads[:, c] - start) * _cross(way, quads[:, d] - start) < 0
        return apart & (_cross(other, start - quads[:, c]) * _cross(other, quads[:, b] - quads[:, c]) < 0)

    first, second = cross(0, 1, 2, 3), cross(1, 2, 3, 0)
    mended = torch.where(first[:, None, None], quads[:, [0, 2, 1, 3]], quads)
    return torch.where(second[:, None, None], quads[:, [0, 1, 3, 2]], mended), first | second


def rectangles(quads: Tensor) -> Tensor:
    """The smallest rectangle around each quadrilateral, both ``[N, 4, 2]``.

    A side of it lies on a side of the convex hull, which is one of the six lines through two corners.
    """
    ends = torch.tensor(_LINES, device=quads.device)
    lines = quads[:, ends[:, 1]] - quads[:, ends[:, 0]]
    length = lines.norm(dim=-1, keepdim=True)
    upright = torch.tensor([1.0, 0.0], dtype=quads.dtype, device=quads.device)
    along = torch.where(length > 0, lines / length.clamp(min=torch.finfo(quads.dtype).tiny), upright)  # [N, 6, 2]
    across = torch.stack([-along[..., 1], along[..., 0]], dim=-1)
    middle = quads.mean(dim=1, keepdim=True)
    spread = quads - middle
    # No product of matrices: autocast would round it.
    u, v = ((spread[:, :, None] * way[:, None]).sum(dim=-1) for way in (along, across))  # [N, 4, 6]
    low, high = torch.stack([u.amin(1), v.amin(1)], -1), torch.stack([u.amax(1), v.amax(1)], -1)  # [N, 6, 2]
    best = (high - low).prod(dim=-1).argmin(dim=1)
    each = torch.arange(len(quads), device=quads.device)
    places = corners(torch.cat([low[each, best], high[each, best]], dim=-1))
    return middle + places[..., :1] * along[each, best, None] + places[..., 1:] * across[each, best, None]


def _cross(one: Tensor, other: Tensor) -> Tensor:
    return one[..., 0] * other[..., 1] - one[..., 1] * other[..., 0]


def _intersections(one: Tensor, other: Tensor) -> Tensor:
    middle = one.mean(dim=1, keepdim=True)  # small numbers, small errors
    one, other = one - middle, other - middle
    total = one.new_zeros(len(one))
    for first in _FAN:
        for second in _FAN:
            total = total + _of_triangles(one[:, first], other[:, second])
    turns = _turn(one) * _turn(other)
    return (total * turns).clamp(min=0)


def _turn(quads: Tensor) -> Tensor:
    return _cross(quads[:, 2] - quads[:, 0], quads[:, 3] - quads[:, 1]).sign()


def _of_triangles(one: Tensor, other: Tensor) -> Tensor:
    """The area that triangles ``[N, 3, 2]`` share, negative where they turn differently.

    The sides of the first are cut by the lines through those of the second. Along each line, a new side from the first
    to the last cut closes what is left. So there are three sides more at the end, some of them points.
    """
    turn, other_turn = (_cross(t[:, 1] - t[:, 0], t[:, 2] - t[:, 0]).sign() for t in (one, other))
    one, other = (
        torch.where(t[:, None, None] < 0, triangle.flip(1), triangle)
        for t, triangle in ((turn, one), (other_turn, other))
    )
    start, end = one, one.roll(-1, dims=1)
    for i in range(3):
        start, end = _cut(start, end, other[:, i, None], other[:, (i + 1) % 3, None])
    return turn * other_turn * _cross(start, end).sum(dim=1) / 2


def _cut(start: Tensor, end: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """What of a polygon with the sides ``[N, S, 2]`` lies left of the lines from ``a`` to ``b`` ``[N, 1, 2]``."""
    way = b - a
    before, after = _cross(way, start - a), _cross(way, end - a)
    goes_in, goes_out = (before < 0) & (after >= 0), (before >= 0) & (after < 0)
    crosses = goes_in | goes_out
    share = before / torch.where(crosses, before - after, 1)
    cut = start + share[..., None] * (end - start)
    place = ((cut - a) * way).sum(dim=-1)
    first = torch.where(crosses, place, torch.inf).argmin(dim=1)[:, None, None].expand(-1, 1, 2)
    last = torch.where(crosses, place, -torch.inf).argmax(dim=1)[:, None, None].expand(-1, 1, 2)
    some = crosses.any(dim=1)[:, None, None]
    gone = ((before < 0) & (after < 0))[..., None]
    new_start = torch.where(goes_in[..., None], cut, torch.where(gone, a, start))
    new_end = torch.where(goes_out[..., None], cut, torch.where(gone, a, end))
    closing = (torch.where(some, cut.gather(1, end_of), a) for end_of in (first, last))
    return tuple(torch.cat([side, new], dim=1) for side, new in zip((new_start, new_end), closing, strict=True))  # type: ignore[return-value]
