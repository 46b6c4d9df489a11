"""A network of a user's own package as an image classifier: built by a function that a setting names."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import load_state_dict
from torch import nn

from flora.errors import ConfigError, FloraError, first_line
from flora.models.spec import Kind
from flora.models.vision import Pictures, load_backbone
from flora.models.weights import Weights, as_source, facts_of, read, resolve, sha256_of

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class OwnModule(Pictures):
    """A network that a package outside flora builds: an ``ImageSpec`` (flora.models.spec).

    Args:
        target: ``package.module.name`` of a class of modules or a function that builds one; it is called with
            ``num_classes`` and ``arguments``, and takes floats ``[N, 3, image_size, image_size]`` to logits
            ``[N, num_classes]``.
        allow: packages whose code may run. Nothing is imported that is not in one of them.
        arguments: further keyword arguments of the target.
        classifier: names of the modules that classify: the head, which is trained in full.
        name: the name in records; None: the target's last part.
        weights: a file of the network's tensors, by name, which may lack those of the head; None: as it is built.
        image_size: side of the square input in pixels.
        mean, std: per-channel statistics of images in [0, 1]; None: ImageNet's.
        interpolation: how images are resized.
        adapter_targets: what adapters adapt by default.

    Raises:
        ConfigError: a target that is not allowed or cannot be imported, or values out of range.
    """

    kind: Kind = "image"

    def __init__(
        self,
        target: str | None = None,
        allow: Sequence[str] = (),
        arguments: Mapping[str, Any] | None = None,
        classifier: Sequence[str] = ("head",),
        name: str | None = None,
        weights: Weights | None = None,
        image_size: int = 224,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str = "bicubic",
        adapter_targets: str | Sequence[str] = "all",
    ) -> None:
        super().__init__(image_size, mean or _MEAN, std or _STD, interpolation)
        self.target, self.arguments = target, dict(arguments or {})
        self.name = name or str(target).rpartition(".")[2]
        self.classifier = [classifier] if isinstance(classifier, str) else list(classifier)
        self.weights = as_source(weights) if weights else None
        self.adapter_targets = adapter_targets
        self._make = _imported(target, [allow] if isinstance(allow, str) else list(allow))

    @property
    def facts(self) -> dict[str, Any]:
        """What a record says of the network: its target, a checksum of the file with its code, its weights."""
        code = inspect.getsourcefile(self._make)
        facts = {"target": self.target, "code_sha256": sha256_of(Path(code)) if code else None}
        return facts | (facts_of(self.weights) if self.weights else {"pretrained": False})

    def build(self, num_classes: int, drop_path: float = 0.0) -> nn.Module:
        """See ModelSpec.build."""
        if drop_path:
            raise ConfigError(f"trainer.drop_path must be 0: nobody knows which branches {self.name} could skip")
        model = self._built(num_classes)
        if self.weights is not None:
            path = resolve(self.weights)
            load_backbone(model, read(path, load_state_dict), self.classifier, path, self.name)
        self._check_output(model, num_classes)
        return model.float().train()

    def skeleton(self, num_classes: int | None = None) -> nn.Module:
        """See ModelSpec.skeleton; two outputs by default."""
        try:
            with torch.device("meta"):
                return self._built(num_classes or 2)
        except FloraError:  # some networks look at their own numbers while they are built
            return self._built(num_classes or 2).to("meta")

    def _built(self, num_classes: int) -> nn.Module:
        try:
            model = self._make(num_classes=num_classes, **self.arguments)
        except Exception as error:  # it is anybody's code
            raise ConfigError(
                f"model.target={self.target} with num_classes={num_classes} and model.arguments={self.arguments} "
                f"failed: {type(error).__name__}: {first_line(error)}"
            ) from error
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model.target={self.target} gave {type(model).__name__} instead of a torch module")
        parts = dict(model.named_modules())
        if missing := [name for name in self.classifier if name not in parts]:
            there = ", ".join(name for name, _ in model.named_children())
            raise ConfigError(f"model.classifier: {self.name} has no module {missing[0]}; it has {there}")
        return model

    def _check_output(self, model: nn.Module, num_classes: int) -> None:
        images = torch.zeros(1, 3, self.image_size, self.image_size)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                outputs: Any = model.eval()(images)
        except Exception as error:  # it is anybody's code
            raise ConfigError(
                f"model.target={self.target} fails on an image of model.image_size={self.image_size}: "
                f"{first_line(error)}"
            ) from error
        if not isinstance(outputs, torch.Tensor) or outputs.shape != (1, num_classes):
            given = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
            raise ConfigError(
                f"model.target={self.target} gives {given} for one image instead of logits (1, {num_classes})"
            )


def _imported(target: str | None, allow: Sequence[str]) -> Any:
    """What a target names, once its package is allowed: importing it runs its code."""
    module, _, name = (target or "").rpartition(".")
    if target is None or not module or not all(part.isidentifier() for part in target.split(".")):
        raise ConfigError(f"model.target must be PACKAGE.MODULE.NAME, got {target!r}")
    if not any(target.startswith(f"{package}.") for package in allow):
        raise ConfigError(
            f"model.target={target} runs code of {target.partition('.')[0]}: where you trust it, say so with "
            f"model.allow=[{target.partition('.')[0]}] on the command line or in configs/local/default.yaml"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs anybody's code
        raise ConfigError(
            f"model.target={target} cannot be imported ({first_line(error)}): install the package, or start with "
            "PYTHONPATH=FOLDER python train.py ..."
        ) from error
    if not callable(found):
        raise ConfigError(f"model.target={target} is {type(found).__name__}: name a class or a function")
    return found
