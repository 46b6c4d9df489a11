"""Output that nobody reads any more, as after `| head`: the script ends without a word, like Unix tools."""

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


def unread() -> list[int]:
    """Those of stdout and stderr (1, 2) that are pipes whose other end is closed."""
    poll = select.poll()
    for stream in _STREAMS:
        poll.register(stream, 0)  # no event but a reader that has gone
    return [stream for stream, event in poll.poll(0) if event & (select.POLLERR | select.POLLHUP)]
