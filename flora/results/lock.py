"""One owner per run among processes that share a folder, on one machine or several.

A lock is a file ``.locks/RUN_ID.GENERATION.lock`` made with O_EXCL. Its owner touches it now and then (the heartbeat).
On its own machine an owner lives as long as its process, however long that was stopped; on others a lock without a
heartbeat is stale. A stale lock is taken over by creating the next generation, which only one process can do: nobody
deletes what another has just taken. Who was taken over finds out by its claim, which is checked before all writing.
"""

import contextlib
import json
import os
import platform
import re
import secrets
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flora.errors import AlreadyRunning, CheckpointError
from flora.results.record import now

HEARTBEAT = 15.0  # seconds between two touches
STALE_AFTER = 120.0  # seconds without a touch after which an owner on another machine counts as dead
_NAME = re.compile(r"([^.]+)\.(\d{1,9})\.lock", re.ASCII)
_LAST = 999_999_999  # generation that a name can say
_FACTS: dict[str, Any] = {"token": str, "machine": str, "host": str, "pid": int, "after_boot": int | float}
_SAME_BIRTH = 5.0  # seconds by which two readings of when a process began may differ


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        path, generation: the lock's file.
        alive: whether its process exists, or on another machine whether the heartbeat is fresh.
        facts: what the owner wrote: ``token``, ``machine``, ``host``, ``pid``, ``since``, ``cell``, ``about``; empty
            while it is written.
    """

    path: Path
    generation: int
    alive: bool
    facts: dict[str, Any]

    def __str__(self) -> str:
        who = f"process {self.facts.get('pid', '?')} on {self.facts.get('host', '?')}"
        return f"{who}, which is suspended" if self.facts and _state(self.facts) == psutil.STATUS_STOPPED else who


@dataclass(frozen=True)
class Claim:
    """A process's right to write what belongs to a run; it ends when another process takes the run over.

    Attributes:
        run_id: the run.
        path, token: the lock's file, and what it says as long as the claim holds.
    """

    run_id: str
    path: Path
    token: str

    def held(self) -> bool:
        """Whether the run is still this process's: false after a pause so long that another took over."""
        try:
            return json.loads(self.path.read_bytes())["token"] == self.token
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return False

    def check(self) -> None:
        """Raise AlreadyRunning when the run is another's."""
        if not self.held():
            raise AlreadyRunning(
                f"run {self.run_id} was taken over by another process while this one had stopped: "
                "nothing more of it is written here"
            )


def owners(folder: Path, stale_after: float = STALE_AFTER) -> tuple[dict[str, Owner], list[str]]:
    """The newest owner of each locked run under a records folder, dead ones included, and a line for each odd entry."""
    locks, newest, problems = folder / ".locks", dict[str, Owner](), list[str]()
    paths = sorted(locks.glob("*.lock")) if locks.is_dir() else []
    clock = _clock(locks) if paths else 0.0
    for path in paths:
        if (name := _NAME.fullmatch(path.name)) is None:
            problems.append(f"{shown(path)}: not the name of a lock: delete it")
            continue
        try:
            age, facts = clock - path.lstat().st_mtime, _facts(path)
            if age < -stale_after and path.is_file():
                with contextlib.suppress(OSError):
                    os.utime(path)  # else it would be fresh for long; a living owner touches it again
        except FileNotFoundError:
            continue  # released meanwhile
        fresh = age < stale_after
        if not path.is_file():
            problems.append(f"{path}: not the file of a lock: delete it")
            fresh = False
        elif not facts and not fresh:
            problems.append(f"{path}: does not say whose lock it is: it counts as a dead process's")
        state = _state(facts)
        owner = Owner(path, int(name[2]), fresh if state is None else state != "gone", facts)
        if name[1] not in newest or newest[name[1]].generation < owner.generation:
            newest[name[1]] = owner
    return newest, problems


class Lock:
    """The lock of one run, as a context manager that gives a claim.

    Args:
        folder: the records folder that the processes share.
        run_id: the run.
        heartbeat, stale_after: seconds, see above.
        cell_id: the cell of the run, which who looks for the cell finds in the lock.
        about: what else the lock says of the run, for who lists runs.

    Raises:
        AlreadyRunning: on entry, while another process holds the lock.
        CheckpointError: on entry, where the lock cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        run_id: str,
        heartbeat: float = HEARTBEAT,
        stale_after: float = STALE_AFTER,
        cell_id: str | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.run_id, self.cell_id, self.about = folder, run_id, cell_id, dict(about or {})
        self.heartbeat, self.stale_after = heartbeat, stale_after
        self._claim: Claim | None = None
        self._stop = threading.Event()
        self._beat: threading.Thread | None = None

    def __enter__(self) -> Claim:
        (self.folder / ".locks").mkdir(parents=True, exist_ok=True)
        before = self._files()
        found, problems = owners(self.folder, self.stale_after)
        for problem in problems:
            print(f"warning: left out: {problem}", file=sys.stderr)
        owner = found.get(self.run_id)
        if owner is not None and owner.alive:
            raise self._running(owner)
        generation = owner.generation + 1 if owner else 1
        if generation > _LAST:
            assert owner is not None
            raise CheckpointError(f"{owner.path}: no run was taken over that often: delete it and start again")
        claim = self._taken(self.folder / ".locks" / f"{self.run_id}.{generation}.lock")
        if self._files().items() - before.items() - {(claim.path, claim.token)}:
            claim.path.unlink()  # another process came between the two looks at the folder
            raise self._running(None)
        for stale in before:
            stale.unlink(missing_ok=True)
        self._claim = claim
        self._beat = threading.Thread(target=self._touch, daemon=True, name=f"heartbeat {self.run_id}")
        self._beat.start()
        return claim

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        assert self._beat is not None
        assert self._claim is not None
        self._beat.join()
        with contextlib.suppress(OSError):  # what is left counts as a dead process's
            if self._claim.held():
                self._claim.path.unlink()

    def _taken(self, path: Path) -> Claim:
        """Create the file of a lock, whole or not at all."""
        claim = Claim(self.run_id, path, secrets.token_hex(8))
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            raise self._running(None) from None
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(_written(claim.token) | {"cell": self.cell_id, "about": self.about}, file)
        except OSError as error:
            path.unlink(missing_ok=True)
            reason = error.strerror or error
            raise CheckpointError(f"lock {path} cannot be written ({reason}): make room and start again") from error
        return claim

    def _files(self) -> dict[Path, str]:
        files = (path for path in (self.folder / ".locks").glob(f"{self.run_id}.*.lock") if _NAME.fullmatch(path.name))
        return {path: _facts(path).get("token", "") for path in files if path.is_file()}

    def _touch(self) -> None:
        assert self._claim is not None
        while not self._stop.wait(self.heartbeat):
            with contextlib.suppress(OSError):
                if not self._claim.held():
                    return  # a file of this name is another's
                os.utime(self._claim.path)

    def _running(self, owner: Owner | None) -> AlreadyRunning:
        who = str(owner) if owner is not None and owner.alive else "another process"
        return AlreadyRunning(f"run {self.run_id} is being done by {who}: wait for it, or stop it first")


def shown(path: Path) -> str:
    """A path as text that can be printed and kept, whatever bytes its name has."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _facts(path: Path) -> dict[str, Any]:
    """What the file of a lock says of its owner; nothing where it is none, or its owner is about to write."""
    try:
        facts: Any = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return {}
    sound = isinstance(facts, dict) and all(isinstance(facts.get(key), kind) for key, kind in _FACTS.items())
    return facts if sound else {}


def _written(token: str) -> dict[str, Any]:
    process = psutil.Process()
    return {
        "token": token,
        "machine": _machine(),
        "host": platform.node(),
        "pid": process.pid,
        "after_boot": _after_boot(process),
        "since": now(),
    }


def _clock(folder: Path) -> float:
    """The time by the folder's own clock, so that machines need not agree on theirs."""
    probe = folder / f".clock-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()  # a folder that we may only read
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _machine() -> str:
    """Names a machine, boot and process namespace, within which a process number means the same process."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return "/".join(parts)


def _after_boot(process: psutil.Process) -> float:
    """When a process began, in seconds from the machine's start, which no setting of its clock changes."""
    return process.create_time() - psutil.boot_time()


def _state(facts: dict[str, Any]) -> str | None:
    """What psutil says of an owner's process, ``gone`` where there is none any more; None: it is of another machine."""
    if facts.get("machine") != _machine():
        return None
    try:
        process = psutil.Process(facts["pid"])
        if abs(_after_boot(process) - facts["after_boot"]) > _SAME_BIRTH:  # its number was given again
            return "gone"
        status = process.status()
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return "gone"
    return "gone" if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else status
