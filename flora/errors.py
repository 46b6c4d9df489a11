"""Errors that a user can mend: each message is one line that says what is wrong and what to do."""

import contextlib
import traceback
from collections.abc import Iterator

# How C++ and the system say it, through torch, CUDA's libraries or the loading of a file.
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "bad_alloc")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it says nothing: to quote in a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class FloraError(Exception):
    """Base of the errors below; ``train.py`` prints the message after ``error: `` and exits with ``exit_code``."""

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        # torch hands on an error of a data-loading process as the text of its whole trace
        super().__init__(message.rpartition(f"\n{type(self).__module__}.{type(self).__qualname__}: ")[2].strip())


class ConfigError(FloraError):
    """A setting that cannot be used: an unknown name, a value out of range, settings that contradict each other."""


class TrainingDiverged(FloraError):
    """A loss, a weight or a result became NaN or infinite; the run leaves a failed record."""

    exit_code = 3


class CheckpointError(FloraError):
    """A file of a run cannot be written, as on a full disk; what was there is intact, and the run can go on."""


class CaptureFailed(FloraError):
    """The training step cannot be recorded as a CUDA graph; the run leaves a failed record."""

    exit_code = 3


class DataError(FloraError):
    """Missing, unreadable or inconsistent data."""


class WeightsError(FloraError):
    """Pretrained weights that are missing, unreachable or do not match their checksum."""


class FailedBefore(FloraError):
    """The run has a failed record, and nobody asked to try again."""

    exit_code = 1


class Interrupted(FloraError):
    """A scheduler wants the machine back: this cell of a sweep goes on when the sweep is started again."""

    exit_code = 75


class WorkerLost(FloraError):
    """A process that loaded data or ran cells of a sweep was killed; the run or the sweep ended with it."""

    exit_code = 1


class OutOfMemory(FloraError):
    """The machine or the GPU has too little memory for a run; with more it goes on."""

    exit_code = 1


class ProcessLost(FloraError):
    """Another of the processes that do this run together has ended; the run can be resumed."""

    exit_code = 1


class AlreadyRunning(FloraError):
    """Another process is doing this run; a sweep goes on to its next cell."""

    exit_code = 75  # sysexits.h: temporary failure, try again later


# What a run ends with that the same command goes on from, once the cause is mended.
MENDABLE = (CheckpointError, DataError, OutOfMemory, ProcessLost, WorkerLost)


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """Inside, what says that memory has run out is an OutOfMemory, whoever says it."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in _NO_MEMORY):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what filled it
        raise OutOfMemory(
            f"out of memory ({first_line(error):.160}): start the same command again where there is more, and it goes "
            "on; a larger trainer.gradient_accumulation or smaller batches, images or models need less"
        ) from error
