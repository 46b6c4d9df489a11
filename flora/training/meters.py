"""What a stretch of work took: peak memory of the GPU allocator or the process, and how busy the GPU was."""

import resource
import threading
from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Peak bytes since the last ``reset``.

    On CUDA the sum over visible devices of the allocator's peak. On a CPU the resident peak of the process (VmHWM),
    which Linux resets on request; elsewhere the peak since the process started.

    Args:
        on_gpu: what is measured runs on a GPU: a machine may have one that a run on its CPU must leave alone.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu

    def reset(self) -> None:
        """Forget the peak so far."""
        if self.on_gpu:
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
        elif _CLEAR_REFS.exists():
            try:
                _CLEAR_REFS.write_text("5")
            except OSError:
                return  # some containers forbid it: the peak then covers the whole process

    def read(self) -> int:
        """Peak bytes since the last reset."""
        if self.on_gpu:
            return sum(torch.cuda.max_memory_allocated(d) for d in range(torch.cuda.device_count()))
        if _STATUS.exists():
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class BusyShare:
    """Share of the time between ``start`` and ``stop`` in which the GPU ran kernels, in [0, 1].

    A thread asks NVML ten times a second, as nvidia-smi does; each answer covers the last sixth of a second to second,
    and counts the kernels of every process on the current GPU.

    Args:
        on_gpu: what is measured runs on a GPU; else there is nothing to say.
    """

    INTERVAL = 0.1  # seconds

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.samples: list[int] = []  # percent
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin or go on."""
        if self.on_gpu and self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._sample, args=(torch.cuda.current_device(),), daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop for now."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def read(self) -> float | None:
        """The share so far; None without a GPU, or where NVML does not say (it says nothing of a part under MIG)."""
        return round(sum(self.samples) / len(self.samples) / 100, 3) if self.samples else None

    def _sample(self, device: int) -> None:
        while not self._stop.wait(self.INTERVAL):
            try:
                self.samples.append(torch.cuda.utilization(device))
            except Exception:  # NVML's errors derive from Exception alone
                return
