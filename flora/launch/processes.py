"""The processes that train one model together, as torchrun, accelerate launch or Slurm through submitit start them.

The first of them writes and speaks, and the others are silent. Alone, a process is the first of one.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from flora.errors import ConfigError, ProcessLost
from flora.secrets import Masked

if TYPE_CHECKING:
    import torch

_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# What tells a process its place. A process that a process of ours starts for work of its own must not inherit it.
ENVIRONMENT = (
    *(*_PLACE, "LOCAL_WORLD_SIZE", "SUBMITIT_EXECUTOR"),
    *("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),  # accelerate counts processes by these
)
_TOLD = "flora/told"  # in the store that the processes share
_GRACE, _GLANCE = 3.0, 0.2  # seconds that the first process has to tell of an error, and between two looks

T = TypeVar("T")
_tells: bool | None = None


def misplaced() -> str | None:
    """What is wrong with the place among others that the environment gives this process; None where nothing is."""
    place = {name: os.environ.get(name) for name in (*_PLACE, "MASTER_ADDR", "MASTER_PORT")}
    alone = place["LOCAL_RANK"] is None and place["WORLD_SIZE"] in (None, "0", "1")
    if alone or _tasks_of_submitit() > 1:
        return None
    remedy = "start the processes with torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK"
    if missing := [name for name, value in place.items() if value is None]:
        there = " and ".join(name for name in _PLACE if name not in missing)
        return (
            f"{there} says that this is one of several processes, but there is no {' and no '.join(missing)}: {remedy}"
        )
    for name in (*_PLACE, "MASTER_PORT"):
        if not re.fullmatch(r"[0-9]{1,9}", place[name] or ""):
            return f"{name}={place[name]} is not a number: {remedy}"
    rank, size, local = (int(place[name] or 0) for name in _PLACE)
    here = os.environ.get("LOCAL_WORLD_SIZE", str(size))
    if not re.fullmatch(r"[0-9]{1,9}", here):
        return f"LOCAL_WORLD_SIZE={here} is not a number: {remedy}"
    port = int(place["MASTER_PORT"] or 0)
    for wrong, said in (
        (rank >= size, f"RANK={rank} is not below WORLD_SIZE={size}"),
        (not 0 < int(here) <= size, f"LOCAL_WORLD_SIZE={here} is not between 1 and WORLD_SIZE={size}"),
        (local >= int(here), f"LOCAL_RANK={local} is not below the number of processes here, {here}"),
        (local > rank, f"LOCAL_RANK={local} is above RANK={rank}"),
        (not 0 < port < 1 << 16, f"MASTER_PORT={port} is no port"),
    ):
        if wrong:
            return f"{said}: {remedy}"
    return None


def launched() -> bool:
    """Whether a launcher gave this process a place among others, or in a group of one."""
    return all(name in os.environ for name in _PLACE)


def count() -> int:
    """How many processes there are."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def index() -> int:
    """Which of them this one is, from 0: what torch.distributed calls its rank."""
    return int(os.environ["RANK"]) if launched() else 0


def first() -> bool:
    """Whether this is the process that writes."""
    return index() == 0


def start(cpu: bool) -> None:
    """Meet the other processes, if there are any.

    Args:
        cpu: compute on the CPU although there are GPUs.

    Raises:
        ConfigError: more processes than GPUs, or an engine that accelerate's own settings ask for.
    """
    if not launched() and _tasks_of_submitit() > 1:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    if not launched():
        return
    import torch  # here and below, as scripts that need no network import this module too
    from accelerate import PartialState

    hush()
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(name, "false").lower() == "true":
            raise ConfigError(f"accelerate's {name} is set: leave it out, and choose trainer=ddp or trainer=fsdp")
    cpu = cpu or not torch.accelerator.is_available()
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if not cpu and here > gpus > 0:
        raise ConfigError(f"{here} processes share {gpus} GPUs here: start one for each, or set trainer.device=cpu")
    # What the processes tell each other of signals and errors goes by gloo, which needs no GPU to wait for.
    with _mortal():
        PartialState(cpu=cpu, backend="cpu:gloo,cuda:nccl" if gpus and not cpu else None)


@contextlib.contextmanager
def _mortal() -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C end the process at once: torch waits where no handler of Python's is called."""
    mine = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT) if mine}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _tasks_of_submitit() -> int:
    # Slurm's own variables say nothing by themselves: a batch script with many tasks may start workers of any kind.
    inside = os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
    return int(os.environ.get("SLURM_NTASKS", 1)) if inside else 1


def hush() -> None:
    """Let only the first process be heard from now on."""
    if not first() and getattr(sys.stderr, "unmasked", sys.stderr) is sys.__stderr__:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def finish() -> None:
    """Part, after a run that went well."""
    if count() == 1:
        return
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def once(function: Callable[[], T]) -> T:
    """What a function gives in the first process, in all of them; an error there ends the others, silently."""
    if count() == 1:
        return function()
    from torch import distributed

    shared: list[Any] = [None, None]  # the value, the exit code of an error
    if first():
        try:
            shared[0] = function()
        except Exception as error:
            distributed.broadcast_object_list([None, getattr(error, "exit_code", 1)])
            raise
    distributed.broadcast_object_list(shared)
    if shared[1] is not None:
        sys.exit(shared[1])
    return shared[0]


def collected(value: T) -> list[T]:
    """Everybody's value, in the order of the processes."""
    values = [value] * count()
    if count() > 1:
        from torch import distributed

        distributed.all_gather_object(values, value)
    return values


def anywhere(*flags: bool) -> tuple[bool, ...]:
    """For each flag whether it is set in some process."""
    if count() == 1:
        return flags
    import torch
    from torch import distributed

    totals = torch.tensor(flags, dtype=torch.int64)
    distributed.all_reduce(totals)
    return tuple(total > 0 for total in totals.tolist())


def unite(flags: "torch.Tensor") -> None:
    """Set each of these flags, bool on the CPU, that is set in some process."""
    if count() > 1:
        import torch
        from torch import distributed

        united = flags.to(torch.uint8)
        distributed.all_reduce(united, distributed.ReduceOp.MAX)
        flags.copy_(united)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Inside, the end of another process is a ProcessLost."""
    try:
        yield
    except RuntimeError as error:
        if count() > 1:
            from torch import distributed

            if isinstance(error, distributed.DistError) or "/gloo/" in str(error):
                raise ProcessLost("another process of this run ended; start the same command again to go on") from error
        raise


def tells() -> bool:
    """Whether this process is to tell how the run failed: one does, the first process where all of them failed."""
    global _tells
    if count() > 1 and _tells is None:
        from torch import distributed

        _tells = first()
        if distributed.is_initialized():
            with contextlib.suppress(RuntimeError):  # the process that kept the store is gone
                _tells = _claimed(distributed.distributed_c10d._get_default_store())
        if _tells:
            sys.stderr = Masked(sys.__stderr__)  # type: ignore[assignment]
    return _tells is not False


def _claimed(store: Any) -> bool:
    """Whether nobody has told before; where all have met an error at once, the others leave it to the first process."""
    patience = 0.0 if first() else _GRACE
    while patience > 0 and store.add(_TOLD, 0) == 0:
        time.sleep(_GLANCE)
        patience -= _GLANCE
    ours = store.add(_TOLD, 1) == 1
    if first():
        time.sleep(2 * _GLANCE)  # it may keep the store, at which the others look
    return ours
