"""Which files are opened as images."""

import io
from pathlib import Path

from PIL import Image

# What an image may be, whatever its name says; JPEG includes MPO. Pillow hands others to programs, EPS to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def open_image(file: Path | bytes) -> Image.Image:
    """An image of one of ``FORMATS``, not decoded yet; OSError where it is none of them."""
    return Image.open(file if isinstance(file, Path) else io.BytesIO(file), formats=FORMATS)
