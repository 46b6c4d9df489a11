"""SIGTERM, SIGUSR1 and Ctrl-C: the machine is wanted back; training first writes a checkpoint, all else ends."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from flora.launch import processes

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
BY_HAND = 130  # what a shell shows of a process that Ctrl-C ended


class Preempted(KeyboardInterrupt):
    """The process was asked to end; started again, the run goes on. Not an error that a handler may keep."""

    exit_code = 75  # sysexits.h: temporary failure, try again later

    def __init__(self) -> None:
        if signal.SIGINT in _came[:1]:
            super().__init__("Ctrl-C")
            self.exit_code = BY_HAND
        else:
            who = f"the signal {signal.Signals(_came[0]).name}" if _came else "another process of the run"
            super().__init__(f"{who} asked it to stop")


_wanted = _held = _forwards = _adopted = False
_owner: int | None = None  # the process that these settings are of
_theirs: dict[int, Any] = {}  # handlers of a launcher, that were there before
_before: dict[int, Any] = {}  # handlers that `install` found
_came: list[int] = []


def install() -> None:
    """Take the signals from now on, in the main thread."""
    global _wanted, _forwards, _owner
    _wanted, _forwards, _owner = False, False, os.getpid()
    _came.clear()
    for number in SIGNALS:
        if (before := signal.signal(number, _take)) is not _take:
            _before[number] = before


def uninstall() -> None:
    """Give the signals back to who had them, as nothing is on that they could interrupt."""
    for number, before in _before.items():
        signal.signal(number, signal.SIG_DFL if before is None else before)
    _before.clear()


def adopt() -> None:
    """Take the signals in a process that a sweep's launcher started; that of a requeue is then handed on to it."""
    global _adopted
    if _owner == os.getpid() or threading.current_thread() is not threading.main_thread():
        return
    _theirs.update({n: h for n in (signal.SIGUSR1, signal.SIGUSR2) if callable(h := signal.getsignal(n))})
    install()
    for number in _theirs:
        signal.signal(number, _take)
    _adopted = True


def adopted() -> bool:
    """Whether a launcher started this process."""
    return _adopted


def hand_on() -> None:
    """Call the handler of the launcher that a signal was for, which may end the process."""
    for number in _came:
        if number in _theirs:
            _theirs[number](number, None)


def forward() -> None:
    """From now on tell the processes that this one starts, and wait for them, instead of ending."""
    import psutil  # noqa: F401  now: a signal's handler should find it imported

    global _forwards
    _forwards = True


def wanted() -> bool:
    """Whether a signal has come."""
    return _wanted


def check(elsewhere: bool = False) -> None:
    """Raise Preempted if a signal has come, here or to another process of the run."""
    if _wanted or elsewhere:
        raise Preempted


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Inside, signals wait until somebody asks for them."""
    global _held
    before, _held = _held, True
    try:
        yield
    finally:
        _held = before


def _take(number: int, frame: FrameType | None) -> None:
    global _wanted
    first, _wanted = not _wanted, True
    _came.append(number)
    if first and _held and number == signal.SIGINT and os.getpid() == _owner and processes.first():
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step, with a checkpoint\n")  # print may be at work on another line
    if not first or _held:  # a second signal must not disturb what the first one has begun to tidy up
        return
    if not (_forwards and _terminate_children()):
        check()


def _terminate_children() -> bool:
    """Tell the processes that this one has started to end; whether there are any."""
    import psutil

    children = psutil.Process().children()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    return bool(children)
