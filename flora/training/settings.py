"""Settings that Hydra instantiates: how to train, what to select on, where things live."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora.errors import ConfigError
from flora.launch import processes
from flora.training.grid import FURTHER, distinct, onward

if TYPE_CHECKING:
    from transformers import TrainingArguments

LOSS = "loss"  # the one value of an evaluation that is better the lower it is
CHECKPOINTS = "checkpoints"  # their folder in a run's folder
FOLLOW_METRICS = ("reduce_lr_on_plateau", "greedy")  # schedules that look at validation
_DTYPES = ("fp32", "bf16", "fp16")
_DEVICES = ("auto", "cuda", "cpu")
_WANTS_MORE = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")  # arguments of their own


@dataclass(frozen=True)
class TrainerSettings:
    """Optimisation and hardware.

    Attributes:
        epochs: passes over the training split; ``max_steps`` (optimiser steps) wins when given. 0: nothing is trained,
            and the model is tested as it is before its first step.
        batch_size: examples per optimiser step, split over ``gradient_accumulation`` forward passes and all processes.
        eval_batch_size: examples per forward pass of an evaluation, in each process.
        lr, head_lr: peak learning rates of the adapter (or backbone) and of the head; null: the head takes ``lr``.
        warmup_ratio: share of the steps with rising learning rate; then ``schedule`` (a transformers scheduler name).
        warmup_steps: their number, wins over ``warmup_ratio`` when given.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them; networks of
            transformers only.
        layer_decay: factor of the learning rate from a layer to the one before it, for timm's networks; 0 or 1: none.
        layer_decay_type: what a layer is: ``single`` (null means this too) or, of ConvNeXts, ``group``.
        ema_decay: of the moving average of the trained weights that is evaluated and saved; 0: none.
        eval_steps: steps between two looks at validation; null: once an epoch.
        dtype: ``fp32``, or autocast over fp32 weights: ``bf16``, or ``fp16`` with a loss that is scaled so that small
            gradients do not vanish, which needs a GPU. A step whose gradients overflow is left out.
        frozen_dtype: ``bf16`` keeps frozen weights in bf16, with ``dtype=bf16``; what is trained stays in fp32.
        device: ``auto`` (a GPU when there is one), ``cuda`` (an error where there is none) or ``cpu``.
        max_train_examples: train on so many examples alone, a fixed draw; images in memory are then not augmented.
        max_eval_examples: at most so many validation and test examples, a fixed draw; null for all.
        deterministic: bit-equal repeats on the same machine, where torch has deterministic kernels.
        log_every: steps between training-loss logs.
        cuda_graph: replay steps as CUDA graphs, which pays where launches take longer than arithmetic: true, false, or
            ``auto``, on one GPU for a fit of at least 50 steps. Up to 32 shapes of batches have graphs; what cannot be
            captured runs eagerly, and so does all where ``auto`` fails to capture a step; true makes that an error.
        pad_to_multiple_of: texts to train on are filled up to a multiple of so many tokens, or to the longest of all;
            null: to the longest of their batch. Few lengths make few CUDA graphs.
        compile: train through torch.compile.
        channels_last: images and frozen convolutions in ``torch.channels_last``, see ``flora.training.layout``.
        distributed: how several processes share the work: ``ddp`` (each has the whole model; null means this too) or
            ``fsdp`` (each has a shard of every parameter).
        resume: ``auto`` goes on from a checkpoint of an interrupted run; false starts over.
        checkpoint_every: optimiser steps between two checkpoints; null: by the clock, at most one a minute and 2 % of
            the time.
        group_by_modality: batches either show images or show none, in a random order; else those of like length share
            one. For tasks of images and texts.
        cache_on_device: keep a dataset's examples on the GPU: true, false, or ``auto`` where they take at most a tenth
            of its free memory.
    """

    epochs: float
    lr: float
    head_lr: float | None = None
    batch_size: int = 64
    eval_batch_size: int = 256
    gradient_accumulation: int = 1
    max_steps: int | None = None
    weight_decay: float = 1e-4
    warmup_ratio: float = 0.1
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    drop_path: float = 0.0
    dtype: str = "fp32"
    frozen_dtype: str | None = None
    device: str = "auto"
    max_eval_examples: int | None = None
    max_train_examples: int | None = None
    deterministic: bool = False
    num_workers: int = 0
    log_every: int = 10
    warmup_steps: int | None = None
    eval_steps: int | None = None
    cuda_graph: str | bool = "auto"
    compile: bool = False
    channels_last: bool = False
    distributed: str | None = None
    cache_on_device: str | bool = "auto"
    gradient_checkpointing: bool = False
    layer_decay: float = 0.0
    layer_decay_type: str | None = None
    ema_decay: float = 0.0
    resume: str | bool = "auto"
    checkpoint_every: int | None = None
    group_by_modality: bool = False
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        counted = ("max_steps", "max_eval_examples", "max_train_examples", "warmup_steps", "eval_steps")
        optional = ("head_lr", *counted, "checkpoint_every", "pad_to_multiple_of")
        counts = ("batch_size", "eval_batch_size", "gradient_accumulation", "log_every", *optional[1:])
        for name in ("epochs", "lr", "head_lr", *counts):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if name == "max_steps" and value == 0 and not isinstance(value, bool):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ConfigError(f"trainer.{name} must be a positive number, got {value!r}")
        for name in ("weight_decay", "max_grad_norm", "num_workers"):
            if not isinstance(getattr(self, name), int | float) or getattr(self, name) < 0:
                raise ConfigError(f"trainer.{name} must be a number that is not negative, got {getattr(self, name)!r}")
        for name in (*counts, "num_workers"):
            if not isinstance(getattr(self, name), int | None):
                raise ConfigError(f"trainer.{name} must be a whole number, got {getattr(self, name)!r}")
        for name in ("warmup_ratio", "label_smoothing", "drop_path"):
            if not isinstance(getattr(self, name), int | float) or not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"trainer.{name} must lie in [0, 1), got {getattr(self, name)!r}")
        for name, most in (("layer_decay", 1), ("ema_decay", 0.999999)):
            if not isinstance(getattr(self, name), int | float) or not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"trainer.{name} must lie in [0, {most:g}], got {getattr(self, name)!r}")
        if self.layer_decay_type not in (None, "single", "group"):
            raise ConfigError(f"trainer.layer_decay_type must be single or group, got {self.layer_decay_type!r}")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"trainer.dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if self.device not in _DEVICES:
            raise ConfigError(f"trainer.device must be one of {', '.join(_DEVICES)}, got {self.device!r}")
        if self.device == "cuda" and not self.on_gpu:
            raise ConfigError("trainer.device=cuda, but torch finds no GPU here: leave it auto to train on the CPU")
        from transformers import SchedulerType  # here, as what only reads records and paths needs no transformers

        schedules = [kind.value for kind in SchedulerType if kind.value not in _WANTS_MORE]
        if self.schedule not in schedules:
            raise ConfigError(f"trainer.schedule must be one of {', '.join(schedules)}, got {self.schedule!r}")
        for name in ("compile", "channels_last", "gradient_checkpointing", "deterministic", "group_by_modality"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"trainer.{name} must be true or false, got {getattr(self, name)!r}")
        if self.resume not in ("auto", False):
            raise ConfigError(f"trainer.resume must be auto or false, got {self.resume!r}")
        for name in ("cache_on_device", "cuda_graph"):
            if getattr(self, name) != "auto" and not isinstance(getattr(self, name), bool):
                raise ConfigError(f"trainer.{name} must be auto, true or false, got {getattr(self, name)!r}")
        if self.batch_size % self.gradient_accumulation:
            raise ConfigError("trainer.batch_size must be a multiple of trainer.gradient_accumulation")
        if self.frozen_dtype not in (None, "bf16") or (self.frozen_dtype and self.dtype != "bf16"):
            raise ConfigError(f"trainer.frozen_dtype must be null, or bf16 with dtype=bf16, got {self.frozen_dtype!r}")
        if self.dtype == "fp16" and (self.cuda_graph is True or self.distributed == "fsdp"):
            key = "cuda_graph=true" if self.cuda_graph is True else "distributed=fsdp"
            raise ConfigError(f"trainer.dtype=fp16 does not go with trainer.{key}: take trainer.dtype=bf16")
        self._check_processes()

    def _check_processes(self) -> None:
        if self.distributed not in (None, "ddp", "fsdp"):
            raise ConfigError(f"trainer.distributed must be ddp, fsdp or null, got {self.distributed!r}")
        if self.distributed and not processes.launched():
            raise ConfigError(
                f"trainer.distributed={self.distributed} is for several processes: "
                "start them with torchrun --nproc-per-node 2 train.py ..., or leave it null"
            )
        parts = self.gradient_accumulation * processes.count()
        if self.batch_size % parts:
            raise ConfigError(
                f"trainer.batch_size={self.batch_size} cannot be divided over {processes.count()} processes and "
                f"gradient_accumulation={self.gradient_accumulation}: make it a multiple of {parts}"
            )
        if self.cuda_graph is True and processes.count() > 1:
            raise ConfigError("trainer.cuda_graph=true is for one process: set it to auto or false under torchrun")

    @property
    def on_gpu(self) -> bool:
        """Whether training runs on a GPU."""
        import torch

        return self.device != "cpu" and torch.cuda.is_available()

    @property
    def may_capture(self) -> bool:
        """Whether ``cuda_graph=auto`` may capture steps: not those that are known to fail, or are compiled already."""
        return processes.count() == 1 and not (self.dtype == "fp16" or self.compile or self.gradient_checkpointing)

    def arguments(
        self, folder: Path, seed: int, metric: str, validates: bool, skips_parameters: bool
    ) -> "TrainingArguments":
        """What transformers' trainer takes.

        Args:
            folder: the run's; nothing is written there.
            seed: seeds data order and dropout.
            metric: which metric of an evaluation counts, the higher the better; of the ``loss``, the lower.
            validates: look at validation while training.
            skips_parameters: some steps use only some of the trained parameters.

        Raises:
            ConfigError: fp16 without a GPU.
        """
        import torch
        from transformers import TrainingArguments

        if self.dtype == "fp16" and not self.on_gpu:
            raise ConfigError("trainer.dtype=fp16 needs a GPU: take trainer.dtype=bf16 or fp32 on a CPU")
        checkpointing: dict[str, Any] = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        }
        every = "steps" if self.eval_steps else "epoch"
        return TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=self.epochs,
            max_steps=self.max_steps or -1,
            # Every process draws the whole batch and takes its part (flora.training.parts).
            per_device_train_batch_size=self.batch_size // self.gradient_accumulation,
            per_device_eval_batch_size=self.eval_batch_size,
            gradient_accumulation_steps=self.gradient_accumulation,
            learning_rate=self.lr,
            weight_decay=self.weight_decay,
            lr_scheduler_type=self.schedule,
            warmup_steps=self.warmup_steps or self.warmup_ratio,
            max_grad_norm=self.max_grad_norm,
            **(checkpointing if self.gradient_checkpointing else {}),
            bf16=self.dtype == "bf16",
            fp16=self.dtype == "fp16",
            ddp_find_unused_parameters=skips_parameters,
            use_cpu=self.device == "cpu" or not torch.accelerator.is_available(),
            seed=seed,
            data_seed=seed,
            full_determinism=self.deterministic,
            eval_strategy=every if validates else "no",
            eval_steps=self.eval_steps,
            save_strategy="no",  # see flora.training.resume
            metric_for_best_model=metric,
            greater_is_better=metric != LOSS,
            logging_steps=self.log_every,
            logging_nan_inf_filter=False,
            dataloader_num_workers=self.num_workers,
            dataloader_pin_memory=self.on_gpu,
            accelerator_config={"non_blocking": self.on_gpu},
            remove_unused_columns=False,
            label_names=["labels"],
            report_to="none",  # ours is a callback (flora.training.loggers)
            disable_tqdm=True,
            log_level="error",
        )


@dataclass(frozen=True)
class Protocol:
    """What is selected on which split, and what the reported run trains on.

    Attributes:
        name: the protocol's name in records.
        select: ``best`` keeps the look at validation with the best value, ``last`` the last one.
        select_by: that value, also of a learning rate: the task's ``metric``, or the ``loss``, the lower the better.
        final_train: the reported run's data: ``train``, or ``train+validation`` (then nothing is left to pick the epoch
            on, so ``select`` must be ``last``).
        lr_grid: learning rates to choose from on the validation split before the reported run, in place of
            ``trainer.lr``; where the head alone is trained, of its own (``trainer.head_lr``). Null takes those.
        extend: where the best rate of a grid is its smallest or its largest, try further ones by the grid's own step
            (``flora.training.grid.onward``), at most three each way.
        head_lr_grid: rates of the head beside an adapter to choose from, before ``lr_grid``: the head alone is trained
            at each, and the best on validation takes the place of ``trainer.head_lr``. That costs the fits of a linear
            probe, where a grid over both rates would multiply the adapter's. Null takes ``trainer.head_lr``.
        held_out: share of train that becomes validation where the data has no labelled test split and its development
            set is the test; 0: the development set is both.
    """

    name: str
    select: str
    final_train: str
    lr_grid: list[float] | None = None
    held_out: float = 0.0
    select_by: str = "metric"
    extend: bool = False
    head_lr_grid: list[float] | None = None

    def __post_init__(self) -> None:
        if self.select not in ("best", "last"):
            raise ConfigError(f"protocol.select must be best or last, got {self.select!r}")
        if self.select_by not in ("metric", "loss"):
            raise ConfigError(f"protocol.select_by must be metric or loss, got {self.select_by!r}")
        if self.final_train not in ("train", "train+validation"):
            raise ConfigError(f"protocol.final_train must be train or train+validation, got {self.final_train!r}")
        if self.final_train == "train+validation" and self.select == "best":
            raise ConfigError("protocol.select=best needs a validation split: set protocol.final_train=train")
        if not isinstance(self.held_out, int | float) or not 0 <= self.held_out < 1:
            raise ConfigError(f"protocol.held_out must lie in [0, 1), got {self.held_out!r}")
        for key in ("lr_grid", "head_lr_grid"):
            self._check_grid(key, getattr(self, key))
        if (self.extend or self.head_lr_grid) and not self.lr_grid:
            key = "extend" if self.extend else "head_lr_grid"
            raise ConfigError(f"protocol.{key} needs protocol.lr_grid: give it the rates to choose from")

    def _check_grid(self, key: str, grid: object) -> None:
        if grid is None:
            return
        if not (isinstance(grid, list) and grid and all(_positive(lr) for lr in grid)):
            raise ConfigError(f"protocol.{key} must be a list of positive numbers, got {grid!r}")
        rates = distinct(grid)
        if not self.extend:
            return
        if len(rates) < 2:
            raise ConfigError(
                f"protocol.extend needs two rates in protocol.{key}, whose ratio is its step: got {grid!r}"
            )
        further = [onward(rates, steps) for steps in (*range(-FURTHER, 0), *range(1, FURTHER + 1))]
        if distinct(reached := [*further[:FURTHER], *rates, *further[FURTHER:]]) != reached:
            raise ConfigError(f"protocol.extend: the rates of protocol.{key} lie too close to go on by their ratio")


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


@dataclass(frozen=True)
class Paths:
    """Where things live; relative paths start at the working directory.

    Attributes:
        data: dataset folders, ``DATASET/{train*,validation,test}.parquet``.
        output: adapters, checkpoints and logs, one folder per run id.
        results: records, one JSON file per run.
    """

    data: str
    output: str
    results: str

    def __post_init__(self) -> None:
        for key in ("data", "output", "results"):
            if not isinstance(getattr(self, key), str) or not getattr(self, key).strip():
                raise ConfigError(f"paths.{key} must be a folder, got {getattr(self, key)!r}")

    def prepare(self, run: str) -> Path:
        """Make the run's output folder and the results folder.

        Raises:
            ConfigError: one cannot be written, or in it lies something else where the run is going to write.
        """
        for key, folder in (("output", Path(self.output) / run), ("results", Path(self.results))):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".write-test-{os.getpid()}"
                probe.touch()
                probe.unlink()
            except OSError as error:
                reason = error.strerror or error
                raise ConfigError(
                    f"paths.{key}: cannot write to {folder} ({reason}); choose another folder with paths.{key}=DIR"
                ) from error
        folder = Path(self.output) / run
        adapter, checkpoints = folder / "adapter", folder / CHECKPOINTS
        for path, sound, kind in (
            (adapter, adapter.is_dir() and not adapter.is_symlink(), "a folder"),  # which is replaced, no link to one
            (checkpoints, checkpoints.is_dir(), "a folder"),
            *(
                (file, file.is_file() or file.is_char_device(), "a file")  # /dev/null is one too
                for file in (Path(self.results) / f"{run}.json", folder / "metrics.csv")
            ),
        ):
            if os.path.lexists(path) and not sound:
                raise ConfigError(f"{path} is not {kind}, as this run has to write there: move it away")
        return folder
