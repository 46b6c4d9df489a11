"""Pictures beside a run's numbers: one that cannot be drawn is left out, and said; a colour for each class."""

import colorsys
import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flora.errors import first_line

_GOLDEN = 0.618  # of the circle of colours, from each class to the next
_LIGHTS = (0.45, 0.65, 0.3)


@contextlib.contextmanager
def drawing(path: Path) -> Iterator[None]:
    """Around what draws a picture; it may fail, as over a name that no font can write, and costs no run its result."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            yield
    except Exception as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        print(
            f"warning: {path.name} is left out, it cannot be drawn ({first_line(error)})", file=sys.stderr, flush=True
        )


def palette(count: int) -> np.ndarray:
    """A colour for each class, uint8 ``[count, 3]``, neighbours far apart."""
    colours = [colorsys.hls_to_rgb((i * _GOLDEN) % 1, _LIGHTS[i % len(_LIGHTS)], 0.8) for i in range(count)]
    return (255 * np.array(colours)).astype(np.uint8).reshape(count, 3)
