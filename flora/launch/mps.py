"""CUDA's multi-process service: processes that share a GPU compute side by side instead of in turns.

Source: NVIDIA, Multi-Process Service (docs.nvidia.com/deploy/mps). A daemon of its own user and folders is started for
a sweep and ends with it, however that ends: it is told to quit by a shell whose input the sweep's process keeps open.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from omegaconf import DictConfig

from flora.launch.sweep import Throughout, visible_gpus

CONTROL = "nvidia-cuda-mps-control"
FOLDERS = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
# Numbers of GPUs count among those that the daemon sees, so that it must see all. A sweep hands signals on to its
# processes, of which this is one: it stays until they have ended.
_GUARD = (
    f"trap : TERM; unset CUDA_VISIBLE_DEVICES; {CONTROL} -d && echo up && cat >/dev/null; echo quit | {CONTROL}; "
    'rm -rf "$1"'
)


@contextmanager
def shared(processes: int) -> Iterator[bool]:
    """The service for so many processes over the visible GPUs, for the time of a ``with`` block; whether it runs.

    Processes that are started inside use it. It is not started where no GPU is shared, where there is no such program,
    for GPUs in parts (MIG), and where a daemon runs that they use anyway. One that cannot be started is said on stderr.
    """
    gpus = visible_gpus()
    alone = not gpus or processes <= len(gpus) or any(gpu.startswith("MIG") for gpu in gpus)
    if alone or shutil.which(CONTROL) is None or _running():
        yield False
        return
    with tempfile.TemporaryDirectory(prefix="flora-mps-") as folder:  # short: a socket's path has 108 bytes
        before = {name: os.environ.get(name) for name in FOLDERS}
        os.environ.update(dict.fromkeys(FOLDERS, folder))
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        guard = subprocess.Popen(["sh", "-c", _GUARD, "sh", folder], start_new_session=True, text=True, **pipes)
        try:
            assert guard.stdout is not None
            said = guard.stdout.readline().strip()
            if said != "up":
                reason = said or "it ended at once"
                print(f"warning: {CONTROL}: {reason}: runs on one GPU take turns", file=sys.stderr, flush=True)
            yield said == "up"
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            assert guard.stdin is not None
            guard.stdin.close()
            guard.wait()


def _running() -> bool:
    """Whether a daemon answers in the folder that this process's environment names."""
    asked = subprocess.run([CONTROL], input="get_server_list\n", text=True, capture_output=True, check=False)
    return asked.returncode == 0


class Service(Throughout):
    """Hydra callback of configs/launcher/gpu_pool.yaml: the service for the processes of a sweep."""

    def context(self, config: DictConfig) -> AbstractContextManager[bool]:
        """See ``shared``."""
        return shared(config.workers)
