"""Arrays that the processes of a sweep compute once and all read, from files that each maps into its memory.

A sweep has a folder in FLORA_CACHE as long as it runs (``folder``), and its processes find it in their environment.
Who dies by a kill leaves it, unlocked: the next sweep removes it. Without a folder each process computes for itself.
"""

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from flora import memory
from flora.errors import first_line
from flora.files import cache_dir

if TYPE_CHECKING:
    from numpy import ndarray

VARIABLE = "FLORA_SHARED"
Arrays = dict[str, "ndarray"]
_SHARE = 0.5  # of the machine's memory that all files may take, and of the disk's free room that one may
_OWNER, _STARTS = "owner.lock", "starts.lock"


@contextlib.contextmanager
def folder() -> Iterator[None]:
    """A folder for the time of a ``with`` block, for processes that are started inside; at the end its size is said."""
    place = cache_dir() / "shared"
    with contextlib.ExitStack() as held:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with FileLock(place / _STARTS):  # a folder is there with its lock held, or not there
                _remove_stale(place)
                own = Path(tempfile.mkdtemp(dir=place))
                held.callback(shutil.rmtree, own, ignore_errors=True)
                held.enter_context(FileLock(own / _OWNER))
        except OSError as error:
            print(f"warning: {place} cannot be used ({first_line(error)}): runs share no data", file=sys.stderr)
            yield
            return
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = str(own)
        try:
            yield
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before
            if size := _size(own):
                print(f"shared among runs: {size / 1e6:,.0f} MB of decoded images", file=sys.stderr, flush=True)


def once(key: Callable[[], str | None], make: Callable[[], Arrays]) -> Arrays:
    """What ``make`` gives, made by one process of the sweep; the others wait and map its files.

    Args:
        key: names all that decides the arrays, contents and not places; None: nobody can say. Asked again when they are
            made: what has changed meanwhile is not kept.
        make: computes them.

    Returns:
        The arrays by name. Writing to a mapped one changes it for this process alone.
    """
    asked = key() if os.environ.get(VARIABLE) else None
    if asked is None:
        return make()
    entry = Path(os.environ[VARIABLE]) / hashlib.sha256(asked.encode()).hexdigest()
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(f"{entry}.lock"))
        except OSError:  # the sweep was killed, and its folder is gone
            return make()
        if entry.is_dir():
            return _mapped(entry)
        made = make()
        return _mapped(entry) if key() == asked and _kept(entry, made) else made


def _mapped(entry: Path) -> Arrays:
    import numpy as np

    return {path.stem: np.load(path, mmap_mode="c") for path in entry.glob("*.npy")}


def _kept(entry: Path, arrays: Arrays) -> bool:
    """Write arrays, whole or not at all; says why where they are not written, which costs time alone."""
    import numpy as np

    size, place = sum(array.nbytes for array in arrays.values()), entry.parent
    try:
        most = min(memory.total() * _SHARE - _size(place), shutil.disk_usage(place).free * _SHARE)
        if size > most:
            raise OSError(f"they take {size / 1e9:.2f} GB, and there is room for {max(most, 0) / 1e9:.2f} GB")
        with tempfile.TemporaryDirectory(dir=place) as temporary:
            whole = Path(temporary) / entry.name
            whole.mkdir()
            for name, array in arrays.items():
                np.save(whole / f"{name}.npy", array)
            whole.rename(entry)
    except OSError as error:
        print(f"images are not shared in {place.parent}: {first_line(error)}", file=sys.stderr)
        return False
    return True


def _size(place: Path) -> int:
    """Bytes that the files of a sweep take."""
    return sum(path.stat().st_size for path in place.glob("*/*.npy"))


def _remove_stale(place: Path) -> None:
    """Remove the folders whose sweep has gone; its processes keep what they have mapped."""
    for left in place.iterdir():
        with contextlib.suppress(OSError, Timeout):
            if left.is_dir():
                with FileLock(left / _OWNER, timeout=0):
                    shutil.rmtree(left, ignore_errors=True)
