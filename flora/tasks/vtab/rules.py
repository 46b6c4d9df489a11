"""VTAB's label rules: what its structured tasks make of the original annotations (Zhai et al. 2019)."""

from collections.abc import Iterable, Sequence

import numpy as np

_CLEVR_DEPTHS = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
_KITTI_DEPTHS = (-100.0, 8.0, 20.0, 999.0)
_NO_VEHICLE = 1000.0
_VEHICLES = ("Car", "Van", "Truck")


def clevr_count(objects: int) -> int:
    """CLEVR scenes hold three to ten objects: 0..7."""
    return objects - 3


def clevr_distance(depths: Sequence[float]) -> int:
    """Where the depth of the nearest object lies between fixed bounds: 0..5."""
    return _above(min(depths), _CLEVR_DEPTHS)


def kitti(vehicles: Iterable[tuple[str, float]]) -> int:
    """Where the nearest car, van or truck lies, of (type, depth in metres): 0 within 8 m, 1, 2, and 3 for none."""
    return _above(min([depth for kind, depth in vehicles if kind in _VEHICLES] + [_NO_VEHICLE]), _KITTI_DEPTHS)


def _above(value: float, bounds: Sequence[float]) -> int:
    """The last bound below a value."""
    return int(np.flatnonzero(np.array(bounds) < value).max())
