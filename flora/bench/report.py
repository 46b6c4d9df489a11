"""What every benchmark script shares: its options, where it ran, its JSON file, and one line for bad input."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from flora import extras
from flora.errors import ConfigError, FloraError
from flora.files import write_json
from flora.launch import pipes, preemption, processes
from flora.results.record import commit, device_name, versions
from flora.secrets import unspoken, without_secrets

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pipes.while_read()
@unspoken()
def main(entry: Callable[[], None]) -> None:
    """Run a script; bad input ends in one ``error:`` line on stderr and exit code 2."""
    try:
        entry()
    except FloraError as error:
        if processes.tells():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if (said := extras.explained("this", error)) is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.exit(ConfigError.exit_code)


class Measuring:
    """Around what measures: Ctrl-C, or SIGTERM as ``timeout`` sends it, ends that alone; what was measured is told.

    Attributes:
        stopped: whether that happened.
    """

    UNMEASURED = "stopped before it was measured"

    def __init__(self) -> None:
        self.stopped = False
        self._before: Any = None

    def __enter__(self) -> "Measuring":
        self._before = signal.signal(signal.SIGTERM, self._stop)
        return self

    def _stop(self, *_: Any) -> None:
        raise KeyboardInterrupt

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        signal.signal(signal.SIGTERM, self._before)
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            return False
        self.stopped = True
        print("stopped: this is what was measured before", file=sys.stderr, flush=True)
        return True

    def facts(self) -> dict[str, Any]:
        """For the JSON file."""
        return {"stopped": True} if self.stopped else {}

    def end(self) -> None:
        """End the script with the exit code of one that was stopped, if it was."""
        if self.stopped:
            sys.exit(preemption.BY_HAND)


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser of the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--kernel-rank", type=int, default=2)
    parser.add_argument("--size", type=int, help="side of the images in pixels")
    parser.add_argument("--dtype", choices=DTYPES, help="of the arithmetic; default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=_place, help="where to write the results")
    return parser


def _place(name: str) -> Path:
    """A file that can be written, asked before a measurement that may take long; ConfigError for any other."""
    path = Path(name)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"--json {path}: cannot be written")
    return path


def device_of(name: str | None) -> torch.device:
    """The device of that name, by default a GPU where there is one; ConfigError if it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; leave it out or choose cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def positive(**counts: int) -> None:
    """Raise ConfigError for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {count}")


def chosen(option: str, names: str, known: Iterable[str]) -> list[str]:
    """Names given by comma, each known and given once; ConfigError for others."""
    given = [name for name in names.split(",") if name]
    if not given or len(set(given)) < len(given) or set(given) - set(known):
        raise ConfigError(f"{option} must name each method once, of {','.join(known)}; got {names!r}")
    return given


def facts(benchmark: str, device: torch.device) -> dict[str, Any]:
    """Where and from what a benchmark ran, for the head of its JSON file."""
    source, dirty = commit()
    return {
        "benchmark": benchmark,
        "device": device_name(use_cpu=device.type == "cpu"),
        "torch": torch.__version__,
        "command": _command(),
        "commit": source,
        "dirty": dirty,
        "versions": versions(),
    }


def _command() -> str:
    """The command line without the place of the output, which changes nothing that is measured."""
    arguments, kept = iter(sys.argv[1:]), []
    for argument in arguments:
        if argument == "--json":
            next(arguments, None)
        elif not argument.startswith("--json="):
            kept.append(argument)
    return shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *without_secrets(kept)])


def write(path: Path | None, content: dict[str, Any]) -> None:
    """Write the JSON file, if one was asked for; ConfigError where it cannot be."""
    if path is None:
        return
    try:
        write_json(path, content)
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written ({error.strerror})") from error
    print(f"written: {path}", file=sys.stderr)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lines with aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
