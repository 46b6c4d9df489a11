"""A multirun's outcome: each job leaves a file in the sweep's folder, whoever launches it; a summary ends the sweep."""

import atexit
import contextlib
import json
import os
import sys
import textwrap
from concurrent.futures import BrokenExecutor
from contextlib import AbstractContextManager
from itertools import takewhile
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, flag_override

from flora.errors import AlreadyRunning, ConfigError, Interrupted, WorkerLost
from flora.files import write_json
from flora.launch import preemption, processes
from flora.secrets import without_secrets

_folder: Path | None = None  # of the sweep that this process started
_asked: int | None = None  # cells of that sweep; None where nothing tells
_on: int | None = None  # the cell that is on in this process
_OUTCOMES = {"finished": None, "failed": None, "running elsewhere": AlreadyRunning, "interrupted": Interrupted}


class Outcomes(Callback):
    """Hydra callback of configs/train.yaml: outcomes go to ``SWEEP_DIR/cells/NUMBER.json``, from any process."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse a secret that Hydra would write down, where it was asked to write what it composed."""
        if config.hydra.output_subdir is not None:
            _check_secrets(config, "hydra.output_subdir has overrides written to disk")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember where this process's sweep keeps its outcomes; signals go on to processes of a launcher here."""
        global _folder, _asked
        _check_secrets(config, "a sweep writes its overrides to disk")
        _folder, _asked = _cells(config), _cells_asked(config)
        for left in _folder.glob("*.json"):  # of an earlier sweep
            left.unlink(missing_ok=True)
        if config.hydra.launcher._target_.endswith(("JoblibLauncher", "LocalLauncher")):
            preemption.forward()

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Take signals in the process of a launcher too."""
        global _on
        _on = config.hydra.job.get("num")
        preemption.adopt()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Write what became of a job of a sweep."""
        global _on
        _on = None
        if config.hydra.mode is None or config.hydra.mode.name != "MULTIRUN" or not processes.first():
            return
        outcome, message = "finished", ""
        if job_return.status != JobStatus.COMPLETED:
            error = error_of(job_return)
            outcome = next((name for name, kind in _OUTCOMES.items() if kind and isinstance(error, kind)), "failed")
            message = " ".join(str(error).split()) or type(error).__name__
        overrides = list(job_return.overrides or [])
        cell = {"overrides": overrides, "outcome": outcome, "message": message}
        write_json(_cells(config) / f"{config.hydra.job.num}.json", cell)


def error_of(job_return: JobReturn) -> Any:
    """What a job of a sweep raised; of a job that did not, what it returned."""
    return job_return._return_value  # its property raises


class Refused(BaseException):
    """Takes an error through Hydra, which makes a warning of any Exception of a callback."""


def _check_secrets(config: DictConfig, why: str) -> None:
    """Refuse secrets among overrides and settings as they were written, of ours and of Hydra's launcher."""
    written: Any = OmegaConf.to_container(config)
    hydra = written.pop("hydra")
    settings = [*hydra["overrides"]["task"], *hydra["overrides"]["hydra"]]
    settings += [{"hydra.job.env_set": hydra["job"]["env_set"]}, {"hydra.launcher": hydra["launcher"]}]
    for setting in [*settings, *({key: value} for key, value in written.items())]:
        if (shown := without_secrets(setting)) != setting:
            named = shown if isinstance(shown, str) else json.dumps(shown)
            where = "put it in a variable of the environment and give ${oc.env:NAME} in its place"
            raise Refused(ConfigError(f"{why}, and {textwrap.shorten(named, 200)} holds a secret: {where}"))


class OneGpu(Callback):
    """Hydra callback of configs/launcher/gpu_pool.yaml: a process that runs cells of a sweep sees one GPU, in turn."""

    _chosen = False

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Choose the number of processes, where ``workers=auto`` leaves it open, before the launcher reads it."""
        if config.workers == "auto":
            from flora.launch import room

            gpus = visible_gpus()
            with flag_override(config, ["struct", "readonly"], [False, False]):
                config.workers = room.unseen(gpus) * len(gpus) if gpus else 2

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """At the process's first job, before anything asks CUDA: number n takes the n-th GPU, counted round."""
        gpus = visible_gpus()
        if len(gpus) > 1 and not OneGpu._chosen:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[config.hydra.job.num % len(gpus)]
        OneGpu._chosen = True


class Throughout(Callback):
    """Hydra callback that keeps a context for the time of a sweep; it ends with this process at the latest."""

    _kept: AbstractContextManager[Any] | None = None

    def context(self, config: DictConfig) -> AbstractContextManager[Any]:
        """What is kept."""
        raise NotImplementedError

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Enter it before the launcher starts processes."""
        self._kept = self.context(config)
        self._kept.__enter__()
        atexit.register(self._leave)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Leave it."""
        self._leave()

    def __getstate__(self) -> dict[str, Any]:
        """What a launcher sends to its processes: not what is kept here."""
        return {}

    def _leave(self) -> None:
        atexit.unregister(self._leave)
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.__exit__(None, None, None)


class Shared(Throughout):
    """Hydra callback of configs/launcher/gpu_pool.yaml: processes of a sweep decode images once for all."""

    def context(self, config: DictConfig) -> AbstractContextManager[None]:
        """See ``flora.shared.folder``."""
        from flora import shared

        return shared.folder()


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:  # CUDA looks no further than the first that names none: -1, NoDevFiles
        names = (name.strip() for name in named.split(","))
        return list(takewhile(lambda name: name.isdecimal() or name.startswith(("GPU-", "MIG-")), names))
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def failures() -> list[str]:
    """One line for each failed job of this process's sweep; empty where there is no sweep."""
    return [f"{' '.join(c['overrides'])}: {c['message']}" for c in _outcomes() if c["outcome"] == "failed"]


def unfinished() -> bool:
    """Whether jobs of this process's sweep did not finish here: Hydra then raises the first one's error at the end."""
    return any(cell["outcome"] != "finished" for cell in _outcomes())


def lost(error: Exception) -> WorkerLost | None:
    """What to tell where an error says that a launcher's process was killed."""
    if not isinstance(error, BrokenExecutor) and type(error).__name__ != "UncompletedJobError":  # joblib's, submitit's
        return None
    return WorkerLost("a process of the sweep was killed: start the same command again, it does what is missing")


def summary() -> int:
    """Say on stderr how the sweep went, if this process started one and has not said it; its exit code."""
    global _folder, _asked
    if _folder is None:
        return 0
    kinds = [cell["outcome"] for cell in _outcomes()] + (["interrupted"] if _on is not None else [])
    kinds += ["not begun"] * ((_asked or 0) - len(kinds))
    failed, _folder, _asked = failures(), None, None
    if not kinds:
        return 0
    shown = [kind for kind in (*_OUTCOMES, "not begun") if kind in kinds or kind not in ("interrupted", "not begun")]
    print(f"sweep: {len(kinds)} cells: {', '.join(f'{kinds.count(kind)} {kind}' for kind in shown)}", file=sys.stderr)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return Interrupted.exit_code if "interrupted" in kinds else int(bool(failed))


def _cells(config: DictConfig) -> Path:
    return Path(config.hydra.sweep.dir) / "cells"


def _cells_asked(config: DictConfig) -> int | None:
    """The jobs of a sweep, as Hydra's own sweeper counts them, or the trials of a search."""
    sweeper: Any = OmegaConf.to_container(config.hydra.sweeper)
    if "trials" in sweeper:
        return sweeper["trials"] if isinstance(sweeper["trials"], int) else None
    words = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    words += list(OmegaConf.to_container(config.hydra.overrides.task) or ())  # type: ignore[arg-type]
    with contextlib.suppress(HydraException):  # the sweeper says what is wrong
        overrides = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(words)
        return sum(map(len, BasicSweeper.split_arguments(overrides, None)))
    return None


def _outcomes() -> list[dict[str, Any]]:
    if _folder is None:
        return []
    return [json.loads(path.read_text()) for path in sorted(_folder.glob("*.json"), key=lambda p: int(p.stem))]
