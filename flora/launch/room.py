"""How many cells a GPU has room for: by the cores there are, and by the memory that cells were seen to take of it."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pynvml

MOST = 16  # cells on a GPU, beyond which more of them were no faster
_CONTEXT = 600 << 20  # bytes of a GPU that a process takes beside its tensors
_UNSEEN = 4 << 30  # bytes that a cell may take of which nothing is known


@dataclass(frozen=True)
class Seen:
    """What a cell was seen to take of its GPU.

    Attributes:
        need: bytes that its process took at the most.
        room: bytes that there were for it and for others beside it.
    """

    need: int
    room: int


def seen() -> Seen | None:
    """What this process takes of its GPU, since torch's peaks were reset; None where it uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    free, _ = torch.cuda.mem_get_info()
    return Seen(torch.cuda.max_memory_reserved() + _CONTEXT, free + torch.cuda.memory_reserved() + _CONTEXT)


def by_cores(gpus: int) -> int:
    """Cells for each of so many GPUs: a core each, and one that is left for what starts them."""
    return max(1, min(len(os.sched_getaffinity(0)) // gpus - 1, MOST))


def unseen(gpus: Sequence[str]) -> int:
    """Cells for each GPU, where nothing tells what they take: 4 GB of what is free now on the fullest.

    Args:
        gpus: as CUDA_VISIBLE_DEVICES names them.
    """
    try:
        pynvml.nvmlInit()
        free = min(pynvml.nvmlDeviceGetMemoryInfo(_handle(name)).free for name in gpus)
    except pynvml.NVMLError:  # a name that it does not know, such as a shortened one
        return by_cores(len(gpus))
    return max(1, min(by_cores(len(gpus)), free // _UNSEEN))


def _handle(name: str) -> Any:
    return pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID(name)
