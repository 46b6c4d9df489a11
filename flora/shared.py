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
    place = cache_dir().absolute() / "shared"  # a process may run elsewhere
    with contextlib.ExitStack() as held:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with FileLock(place / _STARTS):  # a folder is there with its lock held, or not there
                _remove_stale(place)
                own = Path(tempfile.mkdtemp(dir=place))
                held.callback(_remove, own)
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
    asked = key() if on() else None
    if asked is None:
        return make()
    entry = Path(os.environ[VARIABLE]) / hashlib.sha256(asked.encode()).hexdigest()
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(f"{entry}.lock"))
        except OSError:  # the disk is full
            return make()
        if (found := _mapped(entry)) is not None:
            return found
        made = make()
        found = _mapped(entry) if key() == asked and _kept(entry, made) else None
        return made if found is None else found


def on() -> bool:
    """Whether this process belongs to a sweep whose folder is there: who outlives a killed one finds it removed."""
    folder = os.environ.get(VARIABLE)
    return folder is not None and Path(folder, _OWNER).exists()  # FileLock would make the folder again


def _mapped(entry: Path) -> Arrays | None:
    """The arrays of an entry; None where there is none, or it is removed meanwhile."""
    import numpy as np

    try:
        return {path.stem: np.load(path, mmap_mode="c") for path in entry.glob("*.npy")} or None
    except OSError:
        return None


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
                    _remove(left)


def _remove(folder: Path) -> None:
    """Remove a folder, its name first: who reads from it finds all of an entry or none."""
    gone = folder.with_name(f"{folder.name}.gone")
    with contextlib.suppress(OSError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
