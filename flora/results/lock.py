"""One owner per run among processes that share a folder, on one machine or several.

A lock is a file ``.locks/RUN_ID.GENERATION.lock`` made with O_EXCL. Its owner touches it now and then (the heartbeat).
A lock without a heartbeat is stale, and so is, at once, one whose process on this machine is gone. A stale lock is
taken over by creating the next generation, which only one process can do: nobody deletes what another has just taken.
"""

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flora.errors import AlreadyRunning
from flora.results.record import now

HEARTBEAT = 15.0  # seconds between two touches
STALE_AFTER = 120.0  # seconds without a touch after which an owner on another machine counts as dead


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        path, generation: the lock's file.
        alive: whether the heartbeat is fresh and the process, if it is on this machine, exists.
        facts: what the owner wrote: ``token``, ``machine``, ``host``, ``pid``, ``since``; empty while it writes.
    """

    path: Path
    generation: int
    alive: bool
    facts: dict[str, Any]

    def __str__(self) -> str:
        return f"process {self.facts.get('pid', '?')} on {self.facts.get('host', '?')}"


def owners(folder: Path, stale_after: float = STALE_AFTER) -> dict[str, Owner]:
    """The newest owner of each locked run under a records folder, dead ones included."""
    locks = folder / ".locks"
    if not locks.is_dir() or not (files := list(locks.glob("*.lock"))):
        return {}
    clock, newest = _clock(locks), dict[str, Owner]()
    for path in files:
        run_id, generation = path.name.split(".")[:2]
        try:
            age, facts = clock - path.stat().st_mtime, _facts(path)
        except FileNotFoundError:
            continue  # released meanwhile
        owner = Owner(path, int(generation), age < stale_after and not _is_gone(facts), facts)
        if run_id not in newest or newest[run_id].generation < owner.generation:
            newest[run_id] = owner
    return newest


class Lock:
    """The lock of one run, as a context manager.

    Args:
        folder: the records folder that the processes share.
        run_id: the run.
        heartbeat, stale_after: seconds, see above.

    Raises:
        AlreadyRunning: on entry, while another process holds the lock.
    """

    def __init__(
        self,
        folder: Path,
        run_id: str,
        heartbeat: float = HEARTBEAT,
        stale_after: float = STALE_AFTER,
    ) -> None:
        self.folder, self.run_id = folder, run_id
        self.heartbeat, self.stale_after = heartbeat, stale_after
        self._token = secrets.token_hex(8)
        self._path: Path | None = None
        self._stop = threading.Event()
        self._beat: threading.Thread | None = None

    def __enter__(self) -> "Lock":
        (self.folder / ".locks").mkdir(parents=True, exist_ok=True)
        before = self._files()
        owner = owners(self.folder, self.stale_after).get(self.run_id)
        if owner is not None and owner.alive:
            raise self._running(owner)
        path = self.folder / ".locks" / f"{self.run_id}.{owner.generation + 1 if owner else 1}.lock"
        try:
            with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "w") as file:
                json.dump(self._written(), file)
        except FileExistsError:
            raise self._running(None) from None
        self._path = path
        if self._files().items() - before.items() - {(path, self._token)}:
            path.unlink()  # another process came between the two looks at the folder
            raise self._running(None)
        for stale in before:
            stale.unlink(missing_ok=True)
        self._beat = threading.Thread(target=self._touch, daemon=True, name=f"heartbeat {self.run_id}")
        self._beat.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        assert self._beat is not None
        assert self._path is not None
        self._beat.join()
        if self.held():
            self._path.unlink(missing_ok=True)

    def held(self) -> bool:
        """Whether this process still owns the run: false after a pause so long that another took over."""
        try:
            return self._path is not None and _facts(self._path).get("token") == self._token
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Raise AlreadyRunning when this process no longer owns the run."""
        if not self.held():
            raise AlreadyRunning(f"run {self.run_id} was taken over: this process had stopped for too long")

    def _files(self) -> dict[Path, str]:
        tokens = {}
        for path in (self.folder / ".locks").glob(f"{self.run_id}.*.lock"):
            with contextlib.suppress(FileNotFoundError):
                tokens[path] = _facts(path).get("token", "")
        return tokens

    def _touch(self) -> None:
        assert self._path is not None
        while not self._stop.wait(self.heartbeat):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def _written(self) -> dict[str, Any]:
        process = psutil.Process()
        return {
            "token": self._token,
            "machine": _machine(),
            "host": platform.node(),
            "pid": process.pid,
            "born": process.create_time(),
            "since": now(),
        }

    def _running(self, owner: Owner | None) -> AlreadyRunning:
        who = str(owner) if owner is not None and owner.alive else "another process"
        return AlreadyRunning(f"run {self.run_id} is being done by {who}: wait for it, or stop it first")


def _facts(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return {}  # its owner is about to write


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


def _is_gone(facts: dict[str, Any]) -> bool:
    if not facts or facts["machine"] != _machine():
        return False
    try:
        return abs(psutil.Process(facts["pid"]).create_time() - facts["born"]) > 60  # its number was given again
    except psutil.NoSuchProcess:
        return True
