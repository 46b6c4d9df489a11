"""Pictures beside a run's numbers: one that cannot be drawn is left out, and said."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from flora.errors import first_line


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
