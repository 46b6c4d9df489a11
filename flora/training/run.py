"""One run: build, choose the learning rate, train, test once."""

import contextlib
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerCallback

from flora.errors import ConfigError, TrainingDiverged
from flora.launch import preemption, processes
from flora.methods.base import Adapted, Method, effective_ranks, load
from flora.methods.heads import trained
from flora.models.spec import ModelSpec
from flora.results.lock import Claim
from flora.tasks.base import Split, Splits, Task
from flora.tasks.portions import write_drawn
from flora.training import selection
from flora.training.display import Display
from flora.training.finite import check_metrics, check_weights, masks
from flora.training.loggers import Log
from flora.training.norms import DeltaNorms
from flora.training.progress import Fit, Progress
from flora.training.resume import Keeper, facts, finished, lost
from flora.training.saved import check_whole
from flora.training.settings import CHECKPOINTS, LOSS, Protocol, TrainerSettings
from flora.training.start import Start
from flora.training.trainer import Trainer


@dataclass
class Outcome:
    """What a run comes to.

    Attributes:
        adapted: the trained model.
        trainer: the trainer that trained or evaluated it.
        metrics: all metrics on the test split.
        lr: learning rate of the reported run, None where nothing was trained.
        selection: the learning-rate choice.
    """

    adapted: Adapted
    trainer: Trainer
    metrics: dict[str, float]
    lr: float | None = None
    selection: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """A task, a pretrained model and a fine-tuning method, ready to run.

    Attributes:
        task, model, method: what Hydra instantiated.
        settings, protocol: how to train and what to select on.
        splits: the task's data.
        seed: seeds the head, the adapter, data order and dropout.
        folder: the run's output folder.
        log: takes the numbers of the reported run, and of the fits that may become it; None: nobody does.
        claim: to the run, checked before a checkpoint or the adapter is written; None: no other process can have it.
        analysis: arguments of ``flora.training.norms.DeltaNorms``; None: no analysis.
        watching: further callbacks of its trainers, which change nothing.
        progress: what training has done so far, here and in processes before this one.
    """

    task: Task[Any]
    model: ModelSpec
    method: Method
    settings: TrainerSettings
    protocol: Protocol
    splits: Splits
    seed: int
    folder: Path
    log: Log | None = None
    claim: Claim | None = None
    analysis: dict[str, int] | None = None
    watching: list[TrainerCallback] = field(default_factory=list)
    progress: Progress = field(init=False)
    _display: Display | None = field(init=False, default=None)
    _starts: dict[str, Any] = field(init=False, default_factory=dict)

    def train(self) -> Outcome:
        """Choose the learning rate if the protocol has a grid, train, test once."""
        splits, protocol, settings = self.splits, self.protocol, self.settings
        if settings.max_steps == 0:
            start = self._start(*self._last_splits(), settings.lr)
            adapted = self._adapt(start)
            trainer = self._trainer(adapted, settings, None, None)
            if start is not None:
                start.begin(adapted.model)
            return Outcome(adapted, trainer, self._test(trainer))
        if not len(splits.train):
            raise ConfigError(
                f"task.dataset={self.task.dataset} is a test alone: train on another, then test that run with "
                f"mode=eval checkpoint=RUN task.dataset={self.task.dataset}"
            )
        folder = self.folder / CHECKPOINTS
        resume = settings.resume == "auto"
        self.progress = Progress(folder, settings.checkpoint_every, resume, self.claim, self._inputs())
        self._starts = self.progress.notes.setdefault("starts", {})
        with contextlib.ExitStack() as shown:
            self._display = shown.enter_context(self._shown()) if processes.first() else None
            lr, recorded = settings.lr, dict[str, Any]()
            if protocol.lr_grid:
                adapted, trainer, lr, recorded = selection.choose_and_train(self)
            else:
                adapted, trainer = self.fit(lr, *self._last_splits(), selection.LAST)
        return Outcome(adapted, trainer, self._test(trainer), lr, recorded)

    def _last_splits(self) -> tuple[Split, Split | None]:
        """What the reported fit trains on, and what it looks at meanwhile."""
        train, validation = self.splits.train, self.splits.validation
        if self.protocol.final_train == "train" or not len(train):
            return train, validation
        return train.concat(validation), None

    def _shown(self) -> Display:
        """What shows how far training is: the fits of all rates, and one more where the chosen one trains on both."""
        limit = self.settings.max_eval_examples
        seen = [min(len(part), limit or len(part)) for part in (self.splits.validation, self.splits.test)]
        return Display(selection.fits(self), self.settings.max_steps is not None, self.settings.batch_size, *seen)

    def _inputs(self) -> str:
        run_id = None if self.claim is None else self.claim.run_id
        said = [run_id, self.seed, self.splits.facts, self.model.facts]
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()

    def evaluate(self, adapter: Path, method: str | None = None) -> Outcome:
        """Test the adapter that an earlier run has saved in a folder.

        Args:
            adapter: the folder.
            method: that trained it, where its run.json does not say.

        Raises:
            ConfigError: it does not fit the model or is not whole.
            TrainingDiverged: it holds numbers that are not finite, or gives some.
        """
        adapted = restored(self._base(), self.model.classifier, adapter, method)
        trainer = self._trainer(adapted, self.settings, None, None)
        return Outcome(adapted, trainer, self._test(trainer))

    def counts(self, adapted: Adapted) -> dict[str, int]:
        """Parameters trained outside the head, trained in the head, and of the base model with its head."""
        outside, inside = trained(adapted.model, self.model.classifier)
        return {
            "trainable_params": outside,
            "head_params": inside,
            "total_params": sum(p.numel() for p in self._base().parameters()),
        }

    @property
    def chosen_by(self) -> str:
        """The value of an evaluation that chooses."""
        return LOSS if self.protocol.select_by == "loss" else self.task.metric

    def show(self, label: str, examples: int) -> None:
        """Show a fit among those of the run, of which not all may have been foreseen."""
        if self._display is not None:
            self._display.next(label, examples)

    def between_fits(self, trainer_state: str) -> None:
        """After a fit write a checkpoint if one is due, and end if the machine is wanted back."""
        with preemption.held():
            stop, due = processes.anywhere(preemption.wanted(), processes.first() and self.progress.due())
            if stop or due:
                self.progress.write(None, trainer_state)
            preemption.check(stop)

    def fit(
        self, lr: float, train: Split, validation: Split | None, label: str, reported: bool = True
    ) -> tuple[Adapted, Trainer]:
        """Train, or go on where an earlier process was; ``reported``: this fit may become the run's result."""
        start = self._start(train, validation, lr)
        with self._losing(label):
            adapted = self._adapt(start)
        known = masks(adapted.model)
        if self.settings.gradient_checkpointing and not hasattr(adapted.model, "gradient_checkpointing_enable"):
            raise ConfigError("trainer.gradient_checkpointing is for networks of transformers: leave it false")
        settings = replace(self.settings, lr=lr)
        if self.protocol.lr_grid and not trained(adapted.model, self.model.classifier)[0]:
            settings = replace(settings, head_lr=None)  # a grid is over the rate of what trains, here the head alone
        trainer = self._trainer(adapted, settings, train, validation, label)
        log = self.log.fit(label) if reported and self.log is not None else None
        if (done := self.progress.done.get(label)) is not None:
            newest = self.progress.newest
            print(f"{label}: going on from checkpoint {newest}, where its training is done", file=sys.stderr)
            trainer.stand_for(done)
            if adapted.ranks:
                adapted.ranks.update(effective_ranks(cast(Any, adapted.model)))
            if log is not None:
                log.on_train_begin(trainer.args, trainer.state, trainer.control)
            return adapted, trainer
        if log is not None:
            trainer.add_callback(log)
        if self.analysis is not None:
            if self.settings.distributed == "fsdp":
                raise ConfigError("analysis.every_n_steps looks at whole weights: leave it null with trainer=fsdp")
            trainer.add_callback(DeltaNorms(trainer, self.model.classifier, **self.analysis))
        if start is not None:
            with self._losing(label):
                trainer.start = start.begin(adapted.model)
        keeper = Keeper(trainer, self.progress, label)
        trainer.add_callback(keeper)
        with preemption.held():
            try:
                keeper.train()
                # Before anything of it is kept: the last losses are logged before the last step changes the weights.
                check_weights(adapted.model, known, "{} was not finite when training ended: lower trainer.lr")
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise ConfigError(
                    "batch norm has one value a channel, of a batch of one, and cannot train on it: choose another "
                    "trainer.batch_size (the last batch of an epoch holds what is left), or raise model.image_size"
                ) from error
            except TrainingDiverged as error:
                self.progress.done[label] = lost(trainer, str(error))
                good = self.progress.newest
                raise TrainingDiverged(f"{error} (last good checkpoint: {good})" if good else str(error)) from error
            self.progress.done[label] = finished(trainer, reported)
            self.between_fits(facts(trainer.state))
        return adapted, trainer

    @contextlib.contextmanager
    def _losing(self, label: str) -> Iterator[None]:
        """Inside, a fit that diverges before its first step has lost."""
        try:
            yield
        except TrainingDiverged as error:
            self.progress.done[label] = Fit({"log_history": []}, {}, None, str(error))
            raise

    def _base(self) -> nn.Module:
        transformers.set_seed(self.seed)
        return self.model.build(self.splits.num_classes, drop_path=self.settings.drop_path)

    def _start(self, train: Split, validation: Split | None, lr: float) -> Start | None:
        """What the method looks at before a fit: one for all fits on the same data, but for a head that follows lr."""
        if getattr(self.method, "gradient", None) is None:
            return None
        key = "all" if validation is None else "train"
        kept = self._starts.setdefault(key if self.settings.head_lr else f"{key}, {selection.label(lr)}", {})
        return Start(self, _limited(train, self.settings.max_train_examples), lr, kept)

    def _adapt(self, start: Start | None = None) -> Adapted:
        base = self._base()
        beside = {} if start is None else start.for_ranks(base)
        transformers.set_seed(self.seed)
        try:
            return self.method.apply(base, self.model.classifier, **beside)
        except (ValueError, TypeError, re.error) as error:
            raise ConfigError(f"adapter: {error}") from error

    def _trainer(
        self,
        adapted: Adapted,
        settings: TrainerSettings,
        train: Split | None,
        validation: Split | None,
        label: str | None = None,
    ) -> Trainer:
        return Trainer(
            model=adapted.model,
            settings=settings,
            forward=self.task.forward(self.model),
            head=self.model.classifier,
            metric=self.task.metrics(),
            metric_name=self.chosen_by,
            folder=self.folder,
            train=_limited(train, settings.max_train_examples),
            validation=_limited(validation, settings.max_eval_examples),
            select=self.protocol.select,
            seed=self.seed,
            progress=None if label is None or self._display is None else self._display.fit(label),
            extra_callbacks=[*adapted.callbacks, *self.watching],
            penalty=adapted.penalty,
            lr_scales=adapted.lr_scales,
            loss=self.task.loss,
            condense=self.task.condensed,
        )

    def _test(self, trainer: Trainer) -> dict[str, float]:
        metrics = self._test_on(trainer, self.splits.test)
        for split in (self.splits.train, self.splits.validation, self.splits.test):
            if (unreadable := getattr(split, "unreadable", None)) is not None:
                processes.unite(unreadable)
        if processes.first():
            self.task.report(trainer.metric, self.splits, self.folder)
            for picture in (self.folder / name for name in self.task.pictures):
                if self.log is not None and picture.is_file():  # one that could not be drawn is not there
                    self.log.picture(picture, trainer.state.global_step)
            if self.splits.drawn:
                write_drawn(self.splits.drawn, self.folder / "splits.csv")
        for name, more in self.splits.further_tests.items():
            metrics |= {f"{name}_{metric}": value for metric, value in self._test_on(trainer, more).items()}
        return metrics

    def _test_on(self, trainer: Trainer, test: Split) -> dict[str, float]:
        test = _limited(test, self.settings.max_eval_examples)
        metrics = _metrics(trainer.evaluate(test, metric_key_prefix="test"))
        check_metrics(metrics, "the test")
        return metrics


def restored(base: nn.Module, head: Sequence[str], folder: Path, method: str | None = None) -> Adapted:
    """A base model with what an earlier run has saved in a folder; arguments and errors as of ``Run.evaluate``."""
    known = masks(base)
    try:
        check_whole(folder, base.state_dict().keys(), method)
        adapted = load(base, head, folder)
    except (ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"checkpoint: {error}") from error
    check_weights(adapted.model, known, f"checkpoint={folder}: {{}} is not finite; train it again")
    return adapted


def evaluate(
    module: nn.Module, model: ModelSpec, task: Task[Any], dataset: Split, batch_size: int = 256, device: str = "auto"
) -> dict[str, float]:
    """Metrics of a fine-tuned module on a dataset, as a run computes them.

    Args:
        module: the network.
        model: the model spec (``flora.models``), which says how inputs enter it.
        task: the task, for its forward pass, loss and metrics.
        dataset: a split of the task.
        batch_size: equal to the run's ``trainer.eval_batch_size`` for bit-equal metrics.
        device: ``auto`` or ``cpu``.
    """
    settings = TrainerSettings(epochs=1, lr=1, eval_batch_size=batch_size, device=device)
    with tempfile.TemporaryDirectory() as folder:  # transformers' trainer wants one even where it writes nothing
        forward, metric = task.forward(model), task.metrics()
        hooks: dict[str, Any] = {"loss": task.loss, "condense": task.condensed}
        trainer = Trainer(module, settings, forward, model.classifier, metric, task.metric, Path(folder), **hooks)
        return _metrics(trainer.evaluate(dataset, metric_key_prefix="test"))


def _metrics(evaluated: dict[str, float]) -> dict[str, float]:
    """Test metrics without their prefix and without transformers' timings."""
    skip = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {k.removeprefix("test_"): float(v) for k, v in evaluated.items() if k.startswith("test_")}
    return {k: v for k, v in named.items() if k not in skip}


def _limited(dataset: Any, limit: int | None) -> Any:
    return dataset if dataset is None or limit is None or limit >= len(dataset) else dataset.subset(limit)
