"""SIGTERM and SIGUSR1: a scheduler wants the machine back; training first writes a checkpoint, all else ends."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(KeyboardInterrupt):
    """A scheduler asked the process to end; started again, the run goes on. Not an error that a handler may keep."""

    exit_code = 75  # sysexits.h: temporary failure, try again later


_wanted = _held = False


def install() -> None:
    """Take the signals from now on, in the main thread."""
    global _wanted
    _wanted = False
    for number in SIGNALS:
        signal.signal(number, _take)


def wanted() -> bool:
    """Whether a signal has come."""
    return _wanted


def check() -> None:
    """Raise Preempted if a signal has come."""
    if _wanted:
        raise Preempted("the scheduler asked for the machine")


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Inside, signals wait until somebody asks for them."""
    global _held
    _held = True
    try:
        yield
    finally:
        _held = False


def _take(number: int, frame: FrameType | None) -> None:
    global _wanted
    first, _wanted = not _wanted, True
    if first and not _held:  # a second signal must not disturb what the first one has begun to tidy up
        check()
