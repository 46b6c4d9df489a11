"""What a setting asks for against what the machine has, before anything is allocated."""

import resource
from pathlib import Path

import psutil

from flora.errors import ConfigError

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def total() -> int:
    """Bytes that a process may have here: the machine's, or what its container or ulimit leaves of them."""
    limits = [psutil.virtual_memory().total]
    limits += [int(text) for path in _LIMITS if (text := _read(path)).isdecimal()]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return min(limits if soft == resource.RLIM_INFINITY else [*limits, soft])


def check(needed: float, what: str, remedy: str) -> None:
    """Refuse what cannot fit.

    Args:
        needed: bytes, a lower bound.
        what: takes them.
        remedy: what to set.

    Raises:
        ConfigError: the machine has less.
    """
    if needed > (here := total()):
        raise ConfigError(
            f"{what} would take at least {needed / 2**30:,.0f} GB of memory, and there are {here / 2**30:,.0f} GB "
            f"here: {remedy}"
        )


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
