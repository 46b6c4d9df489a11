"""A saved run as an object that predicts: its network, its preprocessing and its class names."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from flora.config import instantiate
from flora.errors import ConfigError
from flora.tasks.base import Split
from flora.training import saved
from flora.training.run import restored
from flora.training.settings import TrainerSettings
from flora.training.tested import check_weights, trained_with
from flora.training.trainer import Trainer


@dataclass(frozen=True)
class Prediction:
    """What a network says of one input.

    Attributes:
        label: the likeliest class; None where the network gives no classes.
        probability: of that class, in [0, 1].
        probabilities: of each class, in the order of the network's outputs.
        value: what a regression gives.
        text: what a language model writes.
        classes: int16 ``[H, W]``, a class for each pixel of an image, numbers of ``Predictor.class_names``.
        objects: what a detector finds, the highest score first: see ``flora.tasks.detect.found.Found``.
    """

    label: str | None = None
    probability: float | None = None
    probabilities: dict[str, float] = field(default_factory=dict)
    value: float | None = None
    text: str | None = None
    classes: np.ndarray | None = None
    objects: list[Any] = field(default_factory=list)


def load(
    run: str | os.PathLike[str],
    *,
    model: Mapping[str, Any] | None = None,
    device: str = "auto",
    batch_size: int | None = None,
) -> Predictor:
    """A saved run, ready to predict, from its folder alone.

    >>> predictor = flora.load("outputs/RUN_ID")
    >>> predictor.predict("photo.jpg").label

    Args:
        run: folder of the run, or of its adapter.
        model: settings of the model that are others here: ``{"weights": PATH}`` where the base weights have moved,
            ``{"trust_remote_code": True}`` to run code that a tokenizer brings along, ``{"allow": ["my_package"]}`` to
            run that of the package which holds the network.
        device: ``auto`` (a GPU where there is one) or ``cpu``.
        batch_size: inputs in a forward pass; None: as the run evaluates.

    Raises:
        ConfigError: no run there, one that does not say how it was trained, or one whose files are not whole.
        WeightsError: its base weights cannot be had, or are others than it was trained on.
        TrainingDiverged: its weights are not finite.
    """
    folder = saved.adapter_folder(os.fspath(run), "predict")
    config = trained_with(folder)
    if config is None:
        raise ConfigError(f"{run} does not say how it was trained (run.json holds no config): train it again")
    config = config | {"model": config["model"] | dict(model or {})}
    trainer = config["trainer"] | {"device": device} | ({"eval_batch_size": batch_size} if batch_size else {})
    return Predictor(config | {"trainer": trainer}, folder)


class Predictor:
    """A saved run that predicts, by the preprocessing and the forward pass of its evaluation.

    Args:
        config: what decided the run, as ``flora.training.tested.trained_with`` gives it.
        folder: of the weights.

    Attributes:
        model: the network with what was trained, an ``nn.Module`` on its device, in evaluation mode.
        num_classes: outputs of a classifier, 1 for a regression, 0 for a language model.
        class_names: in the order of the outputs; empty for a language model.
        spec: the pretrained model, see ``flora.models.spec``.
        task: what it was trained for, see ``flora.tasks.base``.

    Raises:
        As ``load``.
    """

    model: nn.Module

    def __init__(self, config: Mapping[str, Any], folder: Path) -> None:
        groups: Any = OmegaConf.create({key: config[key] for key in ("task", "model", "trainer")})
        facts = saved.facts(folder)
        self.task = instantiate(groups.task)
        self.spec = self.task.network(instantiate(groups.model))
        if groups.trainer.get("lr") is None:  # it was chosen from a grid
            groups.trainer.lr = 1.0
        settings: TrainerSettings = instantiate(groups.trainer)
        self.task.accepts(self.spec)
        if hasattr(self.spec, "tokenizer"):
            self.spec.tokenizer = cache(self.spec.tokenizer)  # read once
        saved.check_same_model(folder, self.spec.name)
        check_weights(folder, self.spec)
        count, names = facts.get("num_classes"), facts.get("class_names")
        if type(count) is not int or not isinstance(names, list) or (count > 1 and len(names) != count):
            raise ConfigError(f"{folder}/run.json names no classes: copy the whole folder again, or train again")
        self.num_classes = count
        try:
            self.task.remember(facts.get("data") or {})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{folder}/run.json says too little of its data ({error}): copy it again") from error
        self.class_names = _distinct([str(name) for name in names])
        plain: Any = {
            "deterministic": False,
            "compile": False,
            "channels_last": False,
            "cuda_graph": False,
            "distributed": None,
        }
        with tempfile.TemporaryDirectory() as scratch, _generators_kept():  # transformers' trainer wants a folder
            _seed_of_cpu(config["seed"])
            base = self.spec.build(self.num_classes, drop_path=settings.drop_path)
            adapted = restored(base, self.spec.classifier, folder)
            self._trainer = Trainer(
                adapted.model,
                replace(settings, gradient_checkpointing=False, **plain),
                lambda *batch: self._forward(*batch),
                self.spec.classifier,
                self,
                "",
                Path(scratch),
                loss=_no_loss,
            )
        self.model = adapted.model.eval()

    def predict(self, inputs: Any) -> Any:
        """What the network says of one input, or of each of a list.

        Args:
            inputs: an image (a path, an image of Pillow's, the bytes of a file), a text, a tuple of texts in the order
                of the run's columns, or a tuple (image, question); or a list of them.

        Returns:
            A ``Prediction``, or a list of one for each input; None for an image that cannot be decoded and is left out
            (a run with ``task.unreadable=skip``).

        Raises:
            ConfigError: inputs that are not of the run's kind.
            DataError: an image that cannot be decoded, by its name.
        """
        if not isinstance(inputs, list):
            return self.predict([inputs])[0]
        if not inputs:
            return []
        kept, outputs = self.outputs(inputs)
        found: list[Prediction | None] = [None] * len(inputs)
        for number, row in zip(kept, outputs, strict=True):
            found[number] = self.prediction(row)
        return found

    __call__ = predict

    def preprocess(self, inputs: Sequence[Any]) -> Any:
        """A list of inputs as ``model`` takes them.

        Floats ``[N, 3, H, W]`` of images to classify, and of those to segment, filled up at the bottom and on the
        right; a list of ``[3, H, W]`` of those to find objects in, or of their tiles; else the arguments by name.
        """
        batch = self._trainer.on_device(self.task.unlabelled(self.spec, inputs).__getitems__(range(len(inputs))))
        if self.spec.kind == "image":
            return self.task.normalised(self.spec, batch["pixel_values"])
        if self.spec.kind == "segmentation":
            return self.spec.normalize(batch["pixel_values"])
        if self.spec.kind == "detection":
            return self.task.entered(self.spec, batch)
        if "pixel_values" in batch:
            batch["pixel_values"] = self.spec.normalize(batch["pixel_values"])
        return {name: value for name, value in batch.items() if name != "labels"}

    def outputs(self, inputs: Sequence[Any]) -> tuple[list[int], np.ndarray]:
        """The network's outputs for inputs, at least one: which of them were not left out, and their rows.

        Rows are logits ``[N, C]``, numbers ``[N]`` or ``[N, 1]``, written tokens ``[N, T]``, or what the task
        understands; errors as ``predict``.
        """
        split: Split = self.task.unlabelled(self.spec, inputs)
        self._forward = self.task.predicting(self.spec)
        with _generators_kept():  # a data loader draws
            self._trainer.evaluate(split)
        self._trainer.state.log_history.clear()
        outputs, numbers = self._found
        order = np.argsort(numbers, kind="stable")
        kept = numbers[order].tolist()
        if self.num_classes and not np.isfinite(outputs).all():
            number = kept[int(np.flatnonzero(~np.isfinite(outputs[order]).reshape(len(order), -1).all(axis=1))[0])]
            raise ConfigError(f"input {number}: the network's outputs are not finite: set trainer.dtype=fp32")
        return kept, outputs[order]

    def compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        """Take what an evaluation hands to a metric."""
        self._found = np.asarray(predictions), np.asarray(references)
        return {}

    def prediction(self, row: np.ndarray) -> Prediction:
        """What a row of ``outputs`` says."""
        if self.task.leaves_files:
            return Prediction(**self.task.understood(row, self.class_names))
        if not self.num_classes:
            return Prediction(text=self.task.written(self.spec, row))
        if self.num_classes == 1:
            return Prediction(value=float(row.reshape(-1)[0]))
        shares = probabilities(row)
        best = int(row.argmax())
        names = self.class_names
        return Prediction(names[best], float(shares[best]), dict(zip(names, shares.tolist(), strict=True)))


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Shares of classes ``[..., C]`` from logits, float64."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _no_loss(outputs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    return torch.zeros((), device=outputs.device)


def _distinct(names: list[str]) -> list[str]:
    """Names, those that occur twice with their numbers."""
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]


def _seed_of_cpu(seed: int) -> None:
    """As a run seeds what its model is built with; a network is built on the CPU."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Afterwards the generators of the process are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
