"""What a trial is: something done in another library with an adapter, with FLoRA and with LoRA in the same place."""

import importlib
import pkgutil
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import peft
import pytest

import flora

from .methods import Method

HERE = Path(__file__).parent
RIGHT = "right"


@dataclass(frozen=True)
class Trial:
    """One row of docs/compatibility.md.

    Attributes:
        library: the distribution whose version the row names.
        what: what is done with it.
        run: does it with a method, and asserts that it came out right.
        needs: modules that must be there, beside those of the project.
        expected: by method, what is to come out where that is not ``right``: a regular expression.
        skipped: methods that cannot be asked, as they have no such thing.
        slow: whether it takes more than some two seconds.
    """

    library: str
    what: str
    run: Callable[[Method], None]
    needs: tuple[str, ...] = ()
    expected: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    slow: bool = False

    @property
    def name(self) -> str:
        """Module and function: unique, and the name of its test."""
        return f"{self.run.__module__.rpartition('.')[2]}.{self.run.__name__}"


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: ``right``, ``refused``, ``wrong`` (a result), ``fails`` (an error); and the line about it."""

    status: str
    line: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.line}" if self.line else self.status


TRIALS: list[Trial] = []


def trial(library: str, what: str, **settings) -> Callable[[Callable[[Method], None]], Callable[[Method], None]]:
    """Enter a function of a method into the list of trials."""

    def enter(run: Callable[[Method], None]) -> Callable[[Method], None]:
        TRIALS.append(Trial(library, what, run, **settings))
        return run

    return enter


def every_trial() -> list[Trial]:
    """All trials of the folder trials/; their modules import no optional package before they run."""
    for module in pkgutil.iter_modules([str(HERE / "trials")]):
        importlib.import_module(f"{__package__}.trials.{module.name}")
    return TRIALS


def outcome(trial: Trial, method: Method) -> Outcome:
    """Run a trial; what it raises says how it ended."""
    try:
        trial.run(method)
    except pytest.skip.Exception:
        raise
    except AssertionError as error:
        return Outcome("wrong", _first_line(error))
    except Exception as error:
        # A refusal is an error that the method itself raises, on purpose and in words.
        place = traceback.extract_tb(error.__traceback__)[-1]
        packages = [Path(str(package.__file__)).parent for package in (flora, peft)]  # a clone may be called flora too
        within = any(Path(place.filename).is_relative_to(package) for package in packages)
        deliberate = within and (place.line or "").startswith("raise")
        if not deliberate:
            traceback.print_exception(error)
        return Outcome("refused" if deliberate else "fails", _first_line(error))
    return Outcome(RIGHT)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return re.sub(r"0x[0-9a-f]+|/\S*/", "…", kind + (lines[0] if lines else ""))[:160]
