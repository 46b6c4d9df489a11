"""Around an entry point: bad input ends in one line on stderr and exit code 2, whoever raises it."""

import codecs
import contextlib
import errno
import locale
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from flora import extras
from flora.config import one_line
from flora.errors import ConfigError, FloraError, Interrupted, enough_memory
from flora.launch import hints, pipes, preemption, processes, sweep
from flora.secrets import unspoken, without_secrets


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Around a Hydra job: keep bad input from Hydra, which would print more than the one line; ``main`` raises it.

    In a multirun Hydra needs the exception, to mark the job as failed and go on to the next. A signal ends only jobs
    where a launcher's processes run them.
    """
    try:
        preemption.check()
        with unspoken(), enough_memory():  # in the process of a launcher too
            yield
    except preemption.Preempted as end:
        if not preemption.adopted():
            raise
        preemption.hand_on()
        raise Interrupted(str(end)) from None
    except (FloraError, OSError) as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            error.args = (one_line(error),)  # a launcher may write it down
            print(f"error: {error}", file=sys.stderr)
            raise
        _kept.append(error)
    except Exception as error:
        error.args = tuple(without_secrets(error.args))  # a launcher may write it down
        raise


_kept: list[Exception] = []


@pipes.while_read()
@unspoken()
def main(entry: Callable[[], Any], trace: Callable[[], bool]) -> None:
    """Run a Hydra entry point; bad input ends in one ``error:`` line on stderr and exit code 2, a sweep in a summary.

    Hydra prints its own composition errors and exits 1. With HYDRA_FULL_ERROR set it lets exceptions through, so that
    one place decides what the user sees.
    """
    _speak_utf8()
    if problem := processes.misplaced():  # so that nobody can say who of them tells
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    try:
        _run(entry, trace)
    finally:
        preemption.uninstall()


def _run(entry: Callable[[], Any], trace: Callable[[], bool]) -> None:
    try:
        preemption.install()
        processes.hush()
        _check_names()
        if hasattr(entry, "__wrapped__") and (problem := hints.flags(sys.argv[1:])):  # Hydra's, which reads the words
            raise ConfigError(problem)
        if processes.launched() and {"-m", "--multirun"} & set(sys.argv):
            raise ConfigError("a sweep cannot be shared out by torchrun: start it once for each run")
        try:
            with enough_memory():
                entry()
        except sweep.Refused as refused:
            raise refused.args[0] from None
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
        sys.exit(preemption.BY_HAND)
    except (FloraError, HydraException, OmegaConfBaseException) as error:
        _tell(f"error: {without_secrets(hints.explained(error))}", trace())
        sys.exit(error.exit_code if isinstance(error, FloraError) else 2)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and pipes.unread():
            raise
        where = f"{error.filename}: " if error.filename else ""
        _tell(f"error: {where}{error.strerror or error}{_remedy(error)}", trace())
        sys.exit(2 if error.filename else 1)
    except ModuleNotFoundError as error:
        if (said := extras.explained("this", error)) is None:
            processes.tells()
            raise
        _tell(f"error: {said}", trace())
        sys.exit(ConfigError.exit_code)
    except Exception:
        processes.tells()  # Python prints the trace, where it is heard
        raise


def _speak_utf8() -> None:
    """Where the locale cannot say every name, start this process again in Python's UTF-8 mode."""
    if not sys.flags.utf8_mode and codecs.lookup(locale.getencoding()).name != "utf-8":
        os.environ["PYTHONUTF8"] = "1"  # of the processes that it starts
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _check_names() -> None:
    """Refuse a working directory that is gone, and names that no record could hold."""
    try:
        names = [*sys.argv[1:], os.getcwd()]
    except FileNotFoundError as error:
        raise ConfigError("the working directory does not exist any more: cd to one that does") from error
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{name!a}: the name's bytes are not UTF-8: rename what it names") from error


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ": make room and start the same command again to go on"
    home, place = Path(os.environ.get("HOME") or "/"), Path(os.fsdecode(error.filename or "."))
    if (place.is_relative_to(home) or home.is_relative_to(place)) and not os.access(home, os.W_OK):
        return f" (the home folder {home} cannot be used: set HOME to one that can be written)"
    return ""


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
