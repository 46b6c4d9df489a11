"""Around an entry point: bad input ends in one line on stderr and exit code 2, whoever raises it."""

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from flora.config import one_line
from flora.errors import ConfigError, FloraError, Interrupted
from flora.launch import pipes, preemption, processes, sweep


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Around a Hydra job: keep bad input from Hydra, which would print more than the one line; ``main`` raises it.

    In a multirun Hydra needs the exception, to mark the job as failed and go on to the next. A signal ends only jobs
    where a launcher's processes run them.
    """
    try:
        preemption.check()
        yield
    except preemption.Preempted as end:
        if not preemption.adopted():
            raise
        preemption.hand_on()
        raise Interrupted(str(end)) from None
    except FloraError as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            print(f"error: {one_line(error)}", file=sys.stderr)
            raise
        _kept.append(error)


_kept: list[FloraError] = []


@pipes.while_read()
def main(entry: Callable[[], Any], trace: Callable[[], bool]) -> None:
    """Run a Hydra entry point; bad input ends in one ``error:`` line on stderr and exit code 2, a sweep in a summary.

    Hydra prints its own composition errors and exits 1. With HYDRA_FULL_ERROR set it lets exceptions through, so that
    one place decides what the user sees.
    """
    preemption.install()
    processes.hush()
    try:
        if processes.launched() and {"-m", "--multirun"} & set(sys.argv):
            raise ConfigError("a sweep cannot be shared out by torchrun: start it once for each run")
        try:
            entry()
        except Exception as error:
            if lost := sweep.lost(error):
                preemption.check()
                sweep.summary()
                raise lost from error
            if said := _refused(error):
                raise ConfigError(said) from error
            if not sweep.unfinished():
                raise
        if _kept:
            raise _kept.pop()
        if code := sweep.summary():
            sys.exit(code)
        processes.finish()
    except KeyboardInterrupt as end:
        sweep.summary()
        if isinstance(end, preemption.Preempted):
            _tell(f"interrupted: {end}; start the same command again to go on")
            sys.exit(end.exit_code)
        sys.exit(130)
    except (FloraError, HydraException, OmegaConfBaseException) as error:
        _tell(f"error: {one_line(error)}", trace())
        sys.exit(error.exit_code if isinstance(error, FloraError) else 2)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and pipes.unread():
            raise
        where = f"{error.filename}: " if error.filename else ""
        _tell(f"error: {where}{error.strerror or error}", trace())
        sys.exit(2 if error.filename else 1)
    except Exception:
        processes.tells()  # Python prints the trace, where it is heard
        raise


def _refused(error: Exception) -> str | None:
    """What Hydra, a launcher or a file of configs refused before anything ran, though not with an error of their own.

    None: the error is another.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    places = [str(frame.f_locals.get("full_path", "")) for frame in frames if frame.f_code.co_name == "load_config"]
    if places and all(frame.f_code.co_name != "run_job" for frame in frames):  # Hydra reads a file
        return one_line(error) if places[-1] in str(error) else f"{places[-1]}: {one_line(error)}"
    of_theirs = isinstance(error, ValueError) and frames[-1].f_globals["__name__"].startswith(("hydra.", "joblib."))
    return one_line(error) if of_theirs else None


def _tell(line: str, trace: bool = False) -> None:
    if processes.tells():
        if trace:
            traceback.print_exc()
        print(line, file=sys.stderr)
