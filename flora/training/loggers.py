"""Loggers: W&B (offline by default), TensorBoard, CSV or none. None of them can end a run."""

import csv
import json
import logging
import os
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback

from flora import extras
from flora.errors import ConfigError
from flora.results.record import Record
from flora.secrets import without_secrets

MODES = ("online", "offline", "disabled")
SECONDS = 30.0  # to wait for a W&B server that does not answer; what was logged stays on disk
_LONGEST_TAG, _LONGEST_NAME = 64, 128  # W&B refuses longer ones
_FACTS = ("run_id", "commit", "dirty", "versions", "device", "dtype", "command", "data", "weights")


@dataclass(frozen=True)
class About:
    """What a logger is told of a run.

    Attributes:
        run_id: names the run, now and when it is resumed or repeated.
        name: for people.
        group, cell: the table and the cell that it belongs to; runs of a cell differ in the seed.
        tags: words to find it by.
        config: what was run, and where.
        anew: the run is done again although it was finished, so that numbers of before are another run's.
    """

    run_id: str
    name: str
    group: str
    cell: str
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    anew: bool = False

    def __post_init__(self) -> None:
        for entry in fields(self):  # no logger is told a secret
            object.__setattr__(self, entry.name, without_secrets(getattr(self, entry.name)))


def about(record: Record, name: str, table: str | None = None, cell: str | None = None, anew: bool = False) -> About:
    """What loggers are told of the run of a record; outside a table its group is the data set."""
    words = [record.task, record.dataset, record.model, record.adapter, record.protocol, record.mode]
    return About(
        record.run_id,
        name,
        table or f"{record.task}/{record.dataset}",
        cell or f"{record.dataset} {record.model} {record.adapter}",
        words + ([table] if table else []),
        record.config | {key: getattr(record, key) for key in _FACTS},
        anew,
    )


class Log(TrainerCallback):
    """Takes a run's numbers as they come, and hands them to ``write``; at its first failure it says so and stops.

    A resumed run hands over its history first: all processes of a run hand over the same rows, counted from the start.

    Args:
        write: ``(numbers by name, optimiser step, epoch) -> None``.
        show: ``(name, file of a picture, optimiser step) -> None``; None: pictures are left in the run's folder.
    """

    def __init__(
        self,
        write: Callable[[dict[str, float], int, float], None],
        show: Callable[[str, Path, int], None] | None = None,
    ) -> None:
        self._write, self._show = write, show
        self._fit = ""

    def fit(self, label: str) -> "Log":
        """The callback of one fit; ``label`` names it where a run has several, one per learning rate."""
        self._fit = "" if label == "train" else f"{label}/"
        return self

    def on_train_begin(self, args, state, control, **kwargs):
        """Repeat what was logged before a run was resumed."""
        if state.is_world_process_zero:
            self.repeat(state.log_history)

    def repeat(self, history: list[dict[str, float]]) -> None:
        """Log the history of what an earlier process did."""
        for row in history:
            self.write(self._named(row), int(row.get("step", 0)), row.get("epoch", 0.0))

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Log what the trainer logs."""
        if state.is_world_process_zero:
            self.write(self._named(logs or {}), state.global_step, state.epoch or 0.0)

    def result(self, metrics: dict[str, float], selection: dict[str, Any], step: int) -> None:
        """Log what came out: test metrics, and what each learning rate reached on validation."""
        values = selection.get("values", {}).items()
        chosen = {f"selection/lr {lr}": value for lr, value in values if value is not None}  # None: it diverged
        self.write({f"test/{name}": value for name, value in metrics.items()} | chosen, step)

    def picture(self, path: Path, step: int) -> None:
        """Log a picture of the test."""
        if self._show is not None:
            self._guarded(self._show, f"test/{path.stem}", path, step)

    def write(self, numbers: dict[str, float], step: int, epoch: float = 0.0) -> None:
        """Log numbers at an optimiser step."""
        if numbers:
            self._guarded(self._write, numbers, step, epoch)

    def _guarded(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:
            warn(f"stopped ({_reason(error)})")
            self._write, self._show = _nowhere, None

    def _named(self, logs: dict[str, Any]) -> dict[str, float]:
        named = {}
        for name, value in logs.items():
            if name in ("step", "epoch") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            kind, _, rest = name.partition("_")
            if kind != "test":  # `result` logs it
                named[self._fit + (f"validation/{rest}" if kind == "eval" else f"train/{name}")] = float(value)
        return named


@contextmanager
def opened(logger: Any, about: About, folder: Path) -> Iterator[Log]:
    """A logger's log for a run: what fails as it is opened or closed, as on a full disk, is said and ends nothing.

    Args:
        logger: one of the classes below, or another with their ``run``.
        about, folder: of the run.
    """
    with _muted():
        place = logger.run(about, folder)
        try:
            log = place.__enter__()
        except Exception as error:
            warn(f"logging nothing ({_reason(error)})")
            place, log = nullcontext(), Log(_nowhere)
        try:
            yield log
        except BaseException as error:
            _close(place, error)
            raise
        _close(place, None)


@contextmanager
def _muted() -> Iterator[None]:
    """Inside, TensorBoard's thread and Python's logging, which W&B uses, print no traces of what we warn of."""
    hook, told = threading.excepthook, logging.raiseExceptions
    threading.excepthook = lambda end: None if type(end.thread).__module__.startswith("tensorboard.") else hook(end)
    logging.raiseExceptions = False
    try:
        yield
    finally:
        threading.excepthook, logging.raiseExceptions = hook, told


def _close(place: AbstractContextManager[Log], ended_by: BaseException | None) -> None:
    try:
        place.__exit__(type(ended_by) if ended_by else None, ended_by, ended_by.__traceback__ if ended_by else None)
    except Exception as error:
        if error is not ended_by:
            warn(f"not finished ({_reason(error)})")


class NoLogger:
    """Logs nowhere; the record still holds the history."""

    @contextmanager
    def run(self, about: About, folder: Path) -> Iterator[Log]:
        """A log that forgets."""
        yield Log(_nowhere)


class Csv:
    """``metrics.csv`` in the run's folder: a line per number, with its optimiser step and epoch."""

    @contextmanager
    def run(self, about: About, folder: Path) -> Iterator[Log]:
        """Write to a new file while the run is on."""
        with (folder / "metrics.csv").open("w", newline="", buffering=1) as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(["step", "epoch", "name", "value"])
            yield Log(lambda numbers, step, epoch: lines.writerows([step, epoch, *item] for item in numbers.items()))


class TensorBoard:
    """Event files in ``tensorboard/`` of the run's folder.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(f"{extras.needs('logger=tensorboard', 'tensorboard')} ({error})") from error
        self._writer = SummaryWriter

    @contextmanager
    def run(self, about: About, folder: Path) -> Iterator[Log]:
        """Write new event files while the run is on."""
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        writer = self._writer(str(folder / "tensorboard"))
        writer.add_text("config", f"```\n{json.dumps(about.config, indent=1)}\n```")

        def write(numbers: dict[str, float], step: int, epoch: float) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        def show(name: str, path: Path, step: int) -> None:
            with Image.open(path) as picture:
                writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

        try:
            yield Log(write, show)
        finally:
            writer.close()


class Wandb:
    """Weights & Biases: one run per run id, in the group of its table; repeated and resumed runs continue it.

    A row's number is its W&B step. A server leaves out rows that it has; offline, rows that lie in files of earlier
    processes are not written again. So a resumed run shows each row once, also those that a killed process lost.

    Args:
        project: W&B project.
        mode: ``offline``, ``online`` or ``disabled``; the environment's WANDB_MODE wins.
        tags: extra tags.
    """

    def __init__(self, project: str = "flora", mode: str = "offline", tags: list[str] | None = None) -> None:
        if mode not in MODES:
            raise ConfigError(f"logger.mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.project = project
        self.mode = mode
        self.tags = tags or []

    @contextmanager
    def run(self, about: About, folder: Path) -> Iterator[Log]:
        """Open a run around a job and always finish it, so that the next job of a sweep gets its own."""
        before = _rows(folder)
        run, failed = self._open(about, folder), True
        log = Log(_nowhere) if run is None else Log(*_rows_to(run, before, about.anew))
        try:
            yield log
            failed = False
        finally:
            try:
                if run is not None:
                    run.finish(exit_code=int(failed))
            except Exception as error:
                warn(f"not finished ({error})")

    def _open(self, about: About, folder: Path) -> Any:
        """The W&B run: as asked; offline where no server can be reached; None where that fails too."""
        os.environ.setdefault("WANDB_SILENT", "true")
        asked = os.environ.get("WANDB_MODE", self.mode)
        for mode in dict.fromkeys((asked, "offline")):
            try:
                import wandb

                return self._init(wandb, about, folder, mode)
            except Exception as error:
                then = "logging offline" if mode != "offline" else "logging nothing"
                warn(f"{then} ({_reason(error)})")
                with suppress(Exception):
                    wandb.teardown()  # else the run id stays in use
        return None

    def _init(self, wandb: Any, about: About, folder: Path, mode: str) -> Any:
        secret = without_secrets(sys.argv) != sys.argv
        run = wandb.init(
            project=self.project,
            id=about.run_id,
            resume="allow" if mode == "online" else None,  # offline files of one id become one run when synced
            name=about.name[:_LONGEST_NAME],
            group=about.group[:_LONGEST_NAME],
            job_type=about.cell[:_LONGEST_NAME],
            tags=[tag[:_LONGEST_TAG] for tag in dict.fromkeys([*self.tags, *about.tags]) if tag],
            config=about.config,
            dir=str(folder.resolve()),  # its service may have been started in another folder
            mode=mode,
            settings=wandb.Settings(
                init_timeout=SECONDS if mode == "online" else 4 * SECONDS,  # a busy machine starts its service slowly
                x_service_wait=4 * SECONDS,
                finish_timeout=SECONDS if mode == "online" else 0.0,  # offline: until it is written
                x_disable_meta=secret,  # it holds the command line
                console="off" if secret else "auto",
            ),
        )
        run.define_metric("*", step_metric="step")
        return run


def _rows_to(run: Any, before: int, anew: bool) -> tuple[Callable[..., None], Callable[[str, Path, int], None]]:
    """What writes rows to a W&B run, and pictures; ``before`` of the rows lie in files of earlier processes."""
    first = (before if run.offline else run.starting_step) if anew else 0
    skipped = before if run.offline and not anew else 0
    numbers_of_rows = count()

    def write(cells: dict[str, Any], step: int, epoch: float) -> None:
        row = next(numbers_of_rows)
        if row >= skipped:
            run.log(cells | {"step": step, "epoch": epoch}, step=first + row)

    def show(name: str, path: Path, step: int) -> None:
        import wandb

        write({name: wandb.Image(str(path))}, step, 0.0)

    return write, show


def _rows(folder: Path) -> int:
    """How many rows the W&B files of a run's earlier processes hold."""
    try:
        return sum(_rows_in(path.read_bytes()) for path in folder.glob("wandb/*run-*/*.wandb"))
    except Exception as error:  # W&B does not promise the format
        warn(f"rows may show twice ({error})")
        return 0


def _rows_in(content: bytes) -> int:
    # LevelDB's log format after a header of 7 bytes: parts with checksum, length and kind, none across 32 KiB blocks.
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2
    at, whole, rows = 7, b"", 0
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(content):  # a whole record, or the last part of one
            rows += messages.Record.FromString(whole).HasField("history")
            whole = b""
    return rows


def warn(text: str) -> None:
    """A line on stderr."""
    print(f"warning: logger: {text}; the run goes on", file=sys.stderr, flush=True)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _nowhere(numbers: dict[str, float], step: int, epoch: float) -> None:
    pass
