"""Around training: what a killed data-loading process ends a run with."""

import contextlib
import time
from collections.abc import Iterator

from flora.errors import WorkerLost
from flora.launch import preemption
from flora.training.internals import raise_for_killed_workers


@contextlib.contextmanager
def data_workers() -> Iterator[None]:
    """Around training: WorkerLost where a data-loading process was killed."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        # A line to the process may break before torch is told of its end.
        killed = str(error) if isinstance(error, RuntimeError) else _killed_worker()
        if not killed.startswith("DataLoader worker"):
            raise
        preemption.check()  # Ctrl-C may reach that process too
        raise WorkerLost(
            f"a data-loading process was killed ({killed.splitlines()[0].rstrip('. ')}): "
            "start the run again to go on, with more memory or a smaller trainer.num_workers"
        ) from error


def _killed_worker() -> str:
    """What torch says of a data-loading process that has ended by a signal, if one does within a second."""
    try:
        for _ in range(10):
            raise_for_killed_workers()
            time.sleep(0.1)
    except RuntimeError as error:
        return str(error)
    return ""
