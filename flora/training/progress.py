"""What a run has done so far, in checkpoints that are whole or do not count."""

import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from transformers.trainer import TRAINER_STATE_NAME

from flora.errors import CheckpointError, ConfigError, first_line
from flora.files import read_object
from flora.launch import processes
from flora.results.lock import Claim

KEPT = 2  # checkpoints: the newest, and one to fall back on
SECONDS = 60.0  # between two checkpoints, at least
SHARE = 0.02  # of a run's time that writing them may take
_STATE, _SUMS, _OWNER = "state.pt", "sha256.json", "owner"


class Checkpoints:
    """Numbered folders under one folder.

    Each is written under another name, synced to the disk and renamed, and says whose it is and the sha256 of its
    files; only then do older ones go. Nothing in them is unpickled but tensors and plain containers.

    Args:
        folder: holds them.
        claim: to the run; None: no other process can have it.
    """

    def __init__(self, folder: Path, claim: Claim | None = None) -> None:
        self.folder, self.claim = folder, claim
        self.owner = secrets.token_hex(8) if claim is None else claim.token
        self._damaged: set[int] = set()

    def write(self, state: dict[str, Any], trainer_state: str) -> Path:
        """Write tensors in containers, and transformers' state as JSON.

        Raises:
            AlreadyRunning: the run is another process's now; nothing is touched.
            CheckpointError: the disk is full or refuses; what was there is intact.
        """
        self._check()
        path, temporary = self._next(), self.folder / f".{self.owner}.tmp"
        try:
            for torn in self.folder.glob(".*.tmp"):  # of a process that was killed
                shutil.rmtree(torn, ignore_errors=True)
            temporary.mkdir(parents=True)
            sums = {
                _STATE: _written(temporary / _STATE, lambda file: torch.save(state, file)),
                TRAINER_STATE_NAME: _written(
                    temporary / TRAINER_STATE_NAME, lambda file: file.write(trainer_state.encode())
                ),
            }
            _written(temporary / _SUMS, lambda file: file.write(json.dumps(sums | {_OWNER: self.owner}).encode()))
            _sync(temporary)
            self._check()  # once more, as the disk takes its time
            path = self._next()
            temporary.rename(path)
            _sync(self.folder)
        except OSError as error:
            self._check()  # it may have swept the folder
            before = max(self._numbers() - self._damaged, default=None)
            left = f"{self.folder / str(before)} is intact" if before else "there is none before it"
            raise CheckpointError(
                f"checkpoint {path} cannot be written ({error.strerror or error}); {left}: "
                "make room and start the run again to go on"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._check()
        whole = sorted(self._numbers() - self._damaged)
        for old in {*self._damaged, *whole[:-KEPT]}:
            shutil.rmtree(self.folder / str(old), ignore_errors=True)
        return path

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint, on the CPU; damaged ones are passed over with a warning."""
        for number in sorted(self._numbers(), reverse=True):
            path = self.folder / str(number)
            try:
                return path, _read(path)
            except (OSError, ValueError, KeyError, TypeError, RuntimeError, UnpicklingError) as error:
                reason = first_line(error)
                print(f"warning: checkpoint {path} is damaged ({reason}): using the one before", file=sys.stderr)
                self._damaged.add(number)
        return None

    def remove(self) -> None:
        """Delete all, also where the folder is a link.

        Raises:
            CheckpointError: some are left.
        """
        for path in self.folder.glob("*"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._numbers():
            raise CheckpointError(f"the checkpoints in {self.folder} cannot be deleted: delete them, then start again")

    def _check(self) -> None:
        if self.claim is not None:
            self.claim.check()

    def _next(self) -> Path:
        return self.folder / str(max(self._numbers(), default=0) + 1)

    def _numbers(self) -> set[int]:
        return {int(path.name) for path in self.folder.glob("*") if path.name.isdecimal() and path.name.isascii()}


class _Hashed:
    # A file that keeps the sha256 of what is written to it, and the error that stopped it.

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        self.sum.update(content)
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _written(path: Path, write: Callable[[Any], object]) -> str:
    with path.open("wb") as file:
        hashed = _Hashed(file)
        try:
            write(hashed)
        except RuntimeError as error:  # torch's writer hides the disk's error
            raise hashed.error or error from error
        file.flush()
        os.fsync(file.fileno())
    return hashed.sum.hexdigest()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path) -> dict[str, Any]:
    sums = read_object(path / _SUMS)
    for name in (_STATE, TRAINER_STATE_NAME):
        with (path / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sums.get(name):
                raise ValueError(f"{name} does not match its sha256")
    return torch.load(path / _STATE, map_location="cpu", weights_only=True)


@dataclass
class Fit:
    """A fit that is done.

    Attributes:
        state: transformers' state at its end: the history, the best metric.
        meters: what it took.
        weights: gives what it trained, or None where nobody will need it.
        lost: why it counts for nothing, as it diverged or collapsed; None: it counts.
    """

    state: dict[str, Any]
    meters: dict[str, Any]
    weights: Callable[[], Any] | None
    lost: str | None = None


@dataclass
class Progress:
    """The fits of a run that are done, and the one it is in.

    Args:
        folder: of its checkpoints.
        every: optimiser steps between two of them; None: by the clock, at most SHARE of the time and one in SECONDS.
        resume: go on from the newest; otherwise they are deleted.
        claim: to the run, checked before each is written; None: no other process can have it.
        inputs: identifies the run, its data and the weights that it starts from.

    Raises:
        ConfigError: the checkpoint there is of other inputs.
    """

    folder: Path
    every: int | None = None
    resume: bool = True
    claim: Claim | None = None
    inputs: str = ""
    done: dict[str, Fit] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    unfinished: dict[str, Any] | None = None
    newest: Path | None = None

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.folder, self.claim)
        self._began = self._last = time.monotonic()
        self._cost = 0.0
        if not self.resume:
            if processes.first():
                self.checkpoints.remove()
        elif (checkpoint := self.checkpoints.newest()) is not None:
            self.newest, state = checkpoint
            if state.get("inputs", "") != self.inputs:
                raise ConfigError(
                    f"checkpoint {self.newest} is of another run, or of data or weights that have changed since: put "
                    "them back to go on, or set force=true to train anew"
                )
            self._began -= state["seconds"]
            self.notes = state["notes"]
            for label, (facts, meters, weights) in state["done"].items():
                self.done[label] = Fit(json.loads(facts), meters, None if weights is None else partial(dict, weights))
            for label, reason in state.get("lost", {}).items():  # older checkpoints know of none
                self.done[label].lost = reason
            self.unfinished = state["fit"]

    @property
    def seconds(self) -> float:
        """Wall time that the run has taken, in this process and in those before it up to their last checkpoint."""
        return time.monotonic() - self._began

    def resumable(self, label: str) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint that lies within a fit, and what it holds of it."""
        if self.newest is None or self.unfinished is None or self.unfinished["label"] != label:
            return None
        return self.newest, self.unfinished

    def due(self, step: int | None = None) -> bool:
        """Whether to write now, after so many steps; None: at the end of a fit."""
        if self.every is not None:
            return step is None or step % self.every == 0
        return time.monotonic() - self._last >= max(SECONDS, self._cost / SHARE)

    def write(self, unfinished: dict[str, Any] | None, trainer_state: str) -> Path | None:
        """Write a checkpoint of all that is done, and of the fit that the run is in; all processes must ask."""
        started = time.monotonic()
        done = {
            label: (json.dumps(fit.state), fit.meters, None if fit.weights is None else fit.weights())
            for label, fit in self.done.items()
        }
        lost = {label: fit.lost for label, fit in self.done.items() if fit.lost}
        state = {"seconds": self.seconds, "notes": self.notes, "done": done, "lost": lost, "fit": unfinished}
        state |= {"inputs": self.inputs}
        if processes.first():
            self.newest = self.checkpoints.write(state, trainer_state)
        self.unfinished = None
        self._last = time.monotonic()
        self._cost = self._last - started
        return self.newest
