"""TFRecord files of ``tf.train.Example``, read without TensorFlow: what VTAB's DMLab comes in.

A record is its length (8 bytes, little-endian), a checksum of that (4), the content, and a checksum of the content (4).
The content is a protocol buffer: https://protobuf.dev/programming-guides/encoding, message ``Example`` of TensorFlow's
example.proto. Checksums are not verified.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Offset and content of each record; ValueError where the file breaks off."""
    with path.open("rb") as stream:
        while head := stream.read(12):
            length = int.from_bytes(head[:8], "little")
            place = stream.tell()
            content = stream.read(length)
            if len(head) < 12 or len(content) < length or len(stream.read(4)) < 4:
                raise ValueError(f"{path} breaks off: fetch it again")
            yield place, content


def record_at(path: Path, place: int, length: int) -> bytes:
    """The content of one record."""
    with path.open("rb") as stream:
        stream.seek(place)
        return stream.read(length)


def example(content: bytes) -> dict[str, bytes | int]:
    """The features of an ``Example`` that hold one text of bytes or one whole number; ValueError for anything else."""
    found: dict[str, bytes | int] = {}
    for features in _inner(content, 1):
        for entry in _inner(features, 1):
            (name,) = _inner(entry, 1)
            for feature in _inner(entry, 2):
                for values in _inner(feature, 1):  # bytes_list
                    (found[name.decode()],) = _inner(values, 1)
                for values in _inner(feature, 3):  # int64_list, packed or not
                    (found[name.decode()],) = _numbers(values)
    return found


def _inner(message: bytes, wanted: int) -> list[bytes]:
    return [value for number, value in _fields(message) if number == wanted and isinstance(value, bytes)]


def _numbers(message: bytes) -> list[int]:
    numbers: list[int] = []
    for number, value in _fields(message):
        if number == 1 and isinstance(value, int):
            numbers.append(value)
        elif number == 1 and isinstance(value, bytes):
            place = 0
            while place < len(value):
                one, place = _varint(value, place)
                numbers.append(one)
    return numbers


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind, value = key & 7, 0
        if kind == _VARINT:
            value, place = _varint(message, place)
            yield key >> 3, value
        elif kind in (_BYTES, _FIXED64, _FIXED32):
            size = {_FIXED64: 8, _FIXED32: 4}.get(kind)
            if size is None:
                size, place = _varint(message, place)
            if place + size > len(message):
                raise ValueError("a record is no tf.train.Example")
            yield key >> 3, message[place : place + size]
            place += size
        else:
            raise ValueError("a record is no tf.train.Example")


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(message):
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
    raise ValueError("a record is no tf.train.Example")
