"""What is opened as an image, how it is turned, and what is refused without a word from anybody's program."""

import io
import subprocess

import numpy as np
import pytest
from PIL import Image, features

from flora.errors import ConfigError, DataError
from flora.tasks import Vtab
from flora.tasks.images.decode import as_rgb
from flora.tasks.images.formats import FORMATS, open_image
from tests.tasks.chats import tiny_llava
from tests.tasks.imagefolder.folders import load
from tests.tasks.vqa.questions import conversation, write_conversations
from tests.tasks.vqa.questions import task as instruct

ORIENTATION = 0x0112
# A red quarter in the upper left, and where each orientation puts it: row, column.
CORNERS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def photograph(orientation=None, kind="JPEG", size=(16, 16)):
    image = Image.new("RGB", size)
    image.paste((255, 0, 0), (0, 0, size[0] // 2, size[1] // 2))
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif, **({"quality": 100} if kind == "JPEG" else {}))
    return buffer.getvalue()


def corner(pixels):
    """Where red is: row, column of a corner of uint8 [H, W, 3]."""
    return next(place for place in CORNERS.values() if pixels[place][0] > 200)


def turned(content, orientation="exif"):
    return as_rgb(lambda: open_image(content), "it", orientation)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_are_turned_as_their_exif_says_or_taken_as_stored(kind):
    for orientation, place in CORNERS.items():
        content = photograph(orientation, kind, (16, 8))
        image = turned(content)
        assert image.size == ((8, 16) if orientation > 4 else (16, 8))
        assert corner(np.asarray(image)) == place
        stored = turned(content, "stored")
        assert (corner(np.asarray(stored)), stored.size) == ((0, 0), (16, 8))


@pytest.mark.parametrize("orientation", [None, 0, 9, 1])
def test_without_an_orientation_pixels_are_as_they_were(orientation):
    content = photograph(orientation)
    assert turned(content).tobytes() == Image.open(io.BytesIO(content)).convert("RGB").tobytes()


def test_a_broken_exif_does_not_make_an_image_unreadable():
    content = photograph(6)
    at = content.index(b"Exif\0\0") + 6
    broken = content[:at] + b"\xff" * 8 + content[at + 8 :]
    assert corner(np.asarray(turned(broken))) == (0, 0)


def tree(folder, content):
    for place in ("train/ant", "train/bee", "val/ant", "val/bee"):
        (folder / place).mkdir(parents=True)
        for number in range(4):
            (folder / place / f"{number}.jpg").write_bytes(content)


@pytest.mark.parametrize(("option", "place"), [({}, (-1, -1)), ({"orientation": "stored"}, (0, 0))])
def test_every_task_turns_images_and_the_record_says_how(tmp_path, write_split, option, place):
    upside_down, said = photograph(3), option.get("orientation", "exif")
    for split, rows in (("train", 12), ("test", 2)):
        write_split(split, rows, replace=dict.fromkeys(range(rows), upside_down))
    vtab = Vtab(name="vtab", dataset="eurosat", epochs=1, **option).load(image_size=16, data_dir=tmp_path)
    tree(tmp_path / "tree", upside_down)
    folder = load(tmp_path / "tree", **option)
    for split in ("train", "validation", "test"):
        write_conversations(tmp_path / "llava_instruct", [conversation("<image>\nis it?", "yes", image="9.jpg")], split)
    (tmp_path / "llava_instruct" / "images" / "9.jpg").write_bytes(upside_down)
    asked = instruct("llava_instruct", **option).load_for(tiny_llava(tmp_path), tmp_path)
    for splits in (vtab, folder, asked):
        pixels = splits.test.__getitems__([0])["pixel_values"][0].permute(1, 2, 0).numpy()
        assert corner(pixels) == place
        assert splits.facts["orientation"] == said


def test_an_unknown_orientation_is_refused():
    with pytest.raises(ConfigError, match=r"task\.orientation=upwards"):
        Vtab(name="vtab", dataset="eurosat", epochs=1, orientation="upwards")
    with pytest.raises(ConfigError, match=r"task\.orientation=upwards"):
        instruct(orientation="upwards")


def test_no_image_starts_a_program_whatever_its_name(tmp_path, monkeypatch):
    def started(*command, **options):
        raise AssertionError(f"started {command}")

    monkeypatch.setattr(subprocess, "check_call", started)  # how Pillow runs Ghostscript
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    (tmp_path / "a.jpg").write_bytes(POSTSCRIPT)
    for place in (POSTSCRIPT, tmp_path / "a.jpg"):
        with pytest.raises(DataError, match="cannot identify image file"):
            turned(place)
    tree(tmp_path / "tree", POSTSCRIPT)
    with pytest.raises(DataError, match=r"bee.*cannot identify image file|ant.*cannot identify image file"):
        load(tmp_path / "tree").test.__getitems__([0])


def test_all_formats_that_are_allowed_open():
    for kind in (*FORMATS, "MPO"):
        if kind == "WEBP" and not features.check("webp"):
            continue
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (9, 9, 9)).save(buffer, kind)
        assert turned(buffer.getvalue()).size == (4, 4)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "ICO")
    with pytest.raises(DataError, match="cannot identify"):
        turned(buffer.getvalue())


@pytest.mark.parametrize("size", [(1, 60000), (60000, 1)])
def test_a_line_of_pixels_is_no_picture(size):
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, "PNG")  # scaled by its short side to 256 pixels: 46 GB
    with pytest.raises(DataError, match=r"60000.* pixels are no picture"):
        turned(buffer.getvalue())
