"""The record of a run: one JSON file that holds what was run, where, and what came out."""

import hashlib
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flora import __version__
from flora.files import ROOT, write_json
from flora.secrets import without_secrets

SCHEMA_VERSION = 2
STATUSES = ("finished", "failed", "interrupted", "running")
_PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "peft", "timm", "datasets", "numpy")


@dataclass
class Record:
    """Everything a table needs to know of a run.

    Attributes:
        schema_version, method_version: versions of this layout and of the numerics.
        run_id: hash of the semantic config and of ``inputs``.
        config: those; with the digest of what an evaluation tests in the place of its path, and ``outputs/CELL_ID`` in
            that of a run that this one starts from.
        masked: whether secrets were taken out of the config, which then no longer gives the id.
        status: one of finished, failed, interrupted, running.
        metric, value: the task's headline metric on ``split``; ``metrics`` holds all of them.
        trainable_params: parameters of the adapter, or of the trained backbone, without the head; ``head_params`` those
            of the trained head, ``total_params`` those of the base model with its head.
        skipped_layers: targeted layers that the method could not adapt.
        ranks: effective ranks per layer.
        selection: learning-rate choice; empty without a grid. ``values`` on validation by rate, null where the fit
            diverged (``diverged``); rates that the grid was extended by (``added``); whether the chosen one is an
            ``edge`` of those tried, ``top`` or ``bottom``; rates that won but diverged or collapsed in the last fit,
            and why (``fallen``); the rate of the ``head``, and whether it was chosen; seconds spent. The first records
            lack all but values, chosen and seconds.
        train_seconds: the reported run's training time without evaluation, in seconds.
        examples_per_second: training throughput of the reported run.
        steady_examples_per_second: the same after the first quarter of its steps, in which workers start and kernels
            are chosen; None where there are no others.
        gpu_busy_share: share of the training time in which the GPU ran kernels, of any process, as NVML says;
            None on a CPU or where NVML says nothing.
        execution: how the steps were run: captured as CUDA graphs, compiled, with the data kept on the GPU, from which
            steps the reported fit was resumed, and by how many processes, in which way; under ``start`` what a look at
            gradients before it took: seconds, peak memory in bytes, the mean share of them that the factors keep.
        peak_memory_bytes: peak while training (GPU allocator, or resident memory on a CPU), of the first process.
        data: facts of the splits: sources, counts, checksums.
        weights: facts of the pretrained weights: source and sha256.
        adapter_path: the folder of what was trained, or was evaluated.
        lock: sha256 of requirements.lock, where the source has one.
        history: logged training losses and validation metrics of the reported run.
    """

    run_id: str
    method_version: int
    task: str
    dataset: str
    model: str
    adapter: str
    protocol: str
    mode: str
    seed: int
    config: dict[str, Any]
    command: str
    dtype: str
    device: str
    started: str
    status: str = "running"
    schema_version: int = SCHEMA_VERSION
    metric: str | None = None
    value: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    split: str = "test"
    lr: float | None = None
    selection: dict[str, Any] = field(default_factory=dict)
    trainable_params: int | None = None
    head_params: int | None = None
    total_params: int | None = None
    skipped_layers: list[str] = field(default_factory=list)
    ranks: dict[str, list[int]] = field(default_factory=dict)
    train_seconds: float | None = None
    examples_per_second: float | None = None
    steady_examples_per_second: float | None = None
    gpu_busy_share: float | None = None
    execution: dict[str, Any] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    data: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    adapter_path: str | None = None
    deterministic: bool = False
    commit: str | None = field(default_factory=lambda: commit()[0])
    dirty: bool | None = field(default_factory=lambda: commit()[1])
    versions: dict[str, str] = field(default_factory=lambda: versions())
    lock: str | None = field(default_factory=lambda: lock_digest())
    masked: bool = False
    error: str | None = None
    finished: str | None = None

    def write(self, path: Path) -> None:
        """Write atomically: a reader sees the old file or the whole new one."""
        write_json(path, asdict(self) | {"masked": without_secrets(self.config) != self.config})


def named(task: str, dataset: str) -> str:
    """What a run is about, for people: ``vtab/eurosat``, ``digits``, ``imagefolder /home/me/photos``."""
    return task if task == dataset else f"{task}{' ' if Path(dataset).is_absolute() else '/'}{dataset}"


def now() -> str:
    """The time in UTC, ISO 8601 with seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def device_name(use_cpu: bool) -> str:
    """The accelerator's name, or the processor's with the number of threads torch uses."""
    import torch  # here, as reading records needs none

    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"cpu: {model}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    numbers = {"python": platform.python_version(), "flora": __version__}  # of the code, wherever it is installed
    for package in _PACKAGES:
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            continue
    return numbers


def lock_digest() -> str | None:
    """Sha256 of requirements.lock, the exact versions that the source was tested with; None where it is not there."""
    path = ROOT / "requirements.lock"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def commit() -> tuple[str | None, bool | None]:
    """The source's git commit and whether tracked files outside results/ differ from it; (None, None) outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    carried = os.environ.get("FLORA_COMMIT")  # where only the tree travels: `git describe --always --dirty --abbrev=40`
    if carried:
        return carried.removesuffix("-dirty"), carried.endswith("-dirty")
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return None, None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
        return git("rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.SubprocessError):
        return None, None


def command() -> str:
    """The command line of this process, as a user would type it, with the names of secrets in their place."""
    return " ".join(["python", Path(sys.argv[0]).name, *without_secrets(sys.argv[1:])])
