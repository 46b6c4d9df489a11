"""A script's streams: one whose reader has gone, as after `| head`, ends it like a Unix tool; a closed one does not."""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator

EXIT_CODE = 128 + signal.SIGPIPE  # what a shell shows of a tool that this signal ended
_STREAMS = (1, 2)


@contextlib.contextmanager
def while_read() -> Iterator[None]:
    """Around a whole script, to end it where its output has no reader; any other broken pipe stays an error."""
    _open_closed()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # a short output would break only as Python ends, which tells of it
    except BrokenPipeError:
        if not (closed := unread()):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in closed:
            os.dup2(nowhere, stream)  # takes what is still in Python's buffers
        sys.exit(EXIT_CODE)


def _open_closed() -> None:
    """Give streams that were closed, as by `>&-`, the null device: else the next file opened is printed into."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115  it gets the lowest number that is free, the stream's own
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def unread() -> list[int]:
    """Those of stdout and stderr (1, 2) that are pipes whose other end is closed."""
    poll = select.poll()
    for stream in _STREAMS:
        poll.register(stream, 0)  # no event but a reader that has gone
    return [stream for stream, event in poll.poll(0) if event & (select.POLLERR | select.POLLHUP)]
