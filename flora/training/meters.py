"""Peak memory of a stretch of work: the GPU allocator's peak, or the process's resident peak on a CPU."""

import resource
from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Peak bytes since the last ``reset``.

    On CUDA the sum over visible devices of the allocator's peak. On a CPU the resident peak of the process (VmHWM),
    which Linux resets on request; elsewhere the peak since the process started.
    """

    def reset(self) -> None:
        """Forget the peak so far."""
        if torch.cuda.is_available():
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
        elif _CLEAR_REFS.exists():
            try:
                _CLEAR_REFS.write_text("5")
            except OSError:
                return  # some containers forbid it: the peak then covers the whole process

    def read(self) -> int:
        """Peak bytes since the last reset."""
        if torch.cuda.is_available():
            return sum(torch.cuda.max_memory_allocated(d) for d in range(torch.cuda.device_count()))
        if _STATUS.exists():
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
