"""Image classifiers from timm: which network, which weights, how images enter it."""

import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from flora.errors import ConfigError, WeightsError, first_line
from flora.launch import processes
from flora.methods import heads
from flora.methods.heads import in_head
from flora.models.spec import Kind
from flora.models.weights import Source, Weights, as_source, facts_of, read, resolve

UNTRAINED = "model.pretrained=false"
_HEAD_INITS = ("zero", "linear")
_LARGE = 2  # standard deviation of a fresh head, times sqrt(inputs), from which on it is worth a line


class Pictures:
    """How images enter a classifier.

    Args:
        image_size: side of the square input in pixels.
        mean, std: per-channel statistics of images in [0, 1].
        interpolation: how images are resized, ``bicubic`` and the like.

    Raises:
        ConfigError: values out of range.
    """

    def __init__(self, image_size: int, mean: Sequence[float], std: Sequence[float], interpolation: str) -> None:
        self.image_size, self.interpolation = image_size, interpolation
        self.mean, self.std = tuple(mean), tuple(std)
        self._statistics: dict[torch.device, Tensor] = {}  # mean and std, [2, 3, 1, 1]
        if not isinstance(self.image_size, int) or self.image_size < 1:
            raise ConfigError(f"model.image_size must be a positive number of pixels, got {image_size!r}")
        numbers = all(isinstance(value, int | float) for value in (*self.mean, *self.std))
        if not numbers or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError("model.mean and model.std need three numbers each, the deviations above zero")

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 images ``[N, 3, H, W]`` to float ``(x / 255 - mean) / std`` on their device."""
        if images.device not in self._statistics:  # made once: a copy to a GPU waits for what the GPU is doing
            both = torch.tensor([self.mean, self.std], device=images.device)
            self._statistics[images.device] = both[:, :, None, None]
        mean, std = self._statistics[images.device]
        return images.float().div_(255).sub_(mean).div_(std)


class TimmModel(Pictures):
    """A timm architecture with its weights and its way to take images: an ``ImageSpec`` (flora.models.spec).

    Args:
        timm_name: a model name of timm, with or without a tag (``resnet18.a1_in1k``).
        name: the name in records; ``timm_name`` by default.
        pretrained: load weights; otherwise the network starts random.
        weights: where they lie: a path, a ``Source`` or its fields as a mapping. Files must hold the tensors of the
            timm network, under its names or, with ``by_order``, in its order. None: what timm names on the hub.
        image_size: side of the square input in pixels; None: that of timm's weights.
        mean, std: per-channel statistics of images in [0, 1]; None: those of timm's weights.
        interpolation: how images are resized, ``bicubic`` and the like; None: that of timm's weights.
        adapter_targets: what adapters adapt by default: ``all`` (every convolution and linear layer except the
            classifier, stem included), or names or a regular expression as PEFT reads them.
        architecture: arguments of timm's constructor for a network of other sizes than the name's; its weights, if
            any, must then be named.
        head_init: how the fresh head starts: ``zero``, or ``linear``, as torch starts an ``nn.Linear``; None: as timm
            does. For EfficientNets and MobileNets that is uniform in +-1 / sqrt(classes), meant for ImageNet's thousand
            and far too large for ten.

    Raises:
        ConfigError: an unknown name, one without a classifier, or values out of range.
    """

    kind: Kind = "image"

    def __init__(
        self,
        timm_name: str,
        name: str | None = None,
        pretrained: bool = True,
        weights: Weights | None = None,
        image_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str | None = None,
        adapter_targets: str | Sequence[str] = "all",
        architecture: Mapping[str, Any] | None = None,
        head_init: str | None = None,
    ) -> None:
        published = _published(timm_name)
        self.timm_name = timm_name
        self.name = name or timm_name
        self.pretrained = pretrained
        self.weights = as_source(weights) if weights else None
        self.adapter_targets = adapter_targets
        self.architecture = dict(architecture or {})
        self.head_init = head_init
        self._published = published
        if not published.classifier:
            raise ConfigError(f"model.timm_name={timm_name} has no classifier to train: choose an image classifier")
        size = published.input_size[1] if image_size is None else image_size
        way = interpolation or published.interpolation
        super().__init__(size, mean or published.mean, std or published.std, way)
        if head_init not in (None, *_HEAD_INITS):
            raise ConfigError(f"model.head_init must be null, {' or '.join(_HEAD_INITS)}, got {head_init!r}")
        if self.architecture and pretrained and self.weights is None:
            raise ConfigError(f"model.architecture: timm has no weights for it; name a file or set {UNTRAINED}")

    @property
    def classifier(self) -> list[str]:
        """Names of the modules that classify: the head, which training replaces.

        FCMAE pretrains a ConvNeXt-V2 without its last norm, which is then as fresh as the classifier.
        """
        names = self._published.classifier
        fresh = ["head.norm"] if self._published.tag == "fcmae" else []
        return [*fresh, *([names] if isinstance(names, str) else names)]

    @property
    def facts(self) -> dict[str, Any]:
        """What a record says of the weights: architecture, place and checksum."""
        facts: dict[str, Any] = {"timm_name": self.timm_name, "pretrained": self.pretrained}
        if not self.pretrained:
            return facts
        return facts | facts_of(self.weights or self._hub())

    def build(self, num_classes: int, drop_path: float = 0.0) -> nn.Module:
        """Make the network: backbone as the weights say, head fresh from torch's global seed.

        Args:
            num_classes: outputs of the head.
            drop_path: largest probability of skipping a residual branch in training.

        Returns:
            a module in training mode on the CPU: float ``[N, 3, image_size, image_size]`` to logits
            ``[N, num_classes]``.

        Raises:
            ConfigError: the architecture refuses a setting.
            WeightsError: the weights are missing, damaged or those of another network.
        """
        if not self.pretrained:
            _say_random(self.name)
        options: dict[str, Any] = {"num_classes": num_classes}
        if drop_path:
            options["drop_path_rate"] = drop_path
        if self.pretrained and self.weights is None:
            # timm converts the files that it names itself. A class count that matches none drops the file's own head.
            options["pretrained"] = True
            options["pretrained_cfg_overlay"] = {"file": str(resolve(self._hub())), "num_classes": -1}
        model = self._create(options)
        if self.pretrained and self.weights is not None:
            self._load(model, resolve(self.weights), self.weights.by_order)
        self._start_head(model, num_classes)
        return model

    def skeleton(self, num_classes: int | None = None) -> nn.Module:
        """The network on the meta device, without values, to count with.

        Args:
            num_classes: outputs of the head; None: as many as timm's weights have.
        """
        with torch.device("meta"):
            return self._create({} if num_classes is None else {"num_classes": num_classes})

    def _create(self, options: dict[str, Any]) -> nn.Module:
        options = self.architecture | options
        if self._published.fixed_input_size and self.image_size != self._published.input_size[1]:
            options["img_size"] = self.image_size
        try:
            return timm.create_model(self.timm_name, **options)
        except Exception as error:  # timm raises almost any type on arguments that do not fit
            raise ConfigError(f"model {self.timm_name} cannot be built with {options}: {first_line(error)}") from error

    def _start_head(self, model: nn.Module, num_classes: int) -> None:
        if self.head_init is not None:
            try:
                heads.start(model, self.classifier, num_classes, self.head_init)
            except ValueError as error:
                raise ConfigError(f"model.head_init={self.head_init}: {error}: leave it null") from error
        elif (spread := heads.spread(model, self.classifier, num_classes)) > _LARGE:
            _say_large(self.name, num_classes, round(spread * math.sqrt(3)))

    def _hub(self) -> Source:
        if not self._published.hf_hub_id:
            raise WeightsError(f"timm has no weights for {self.timm_name}: set {UNTRAINED} or model.weights=PATH")
        return Source(hub=self._published.hf_hub_id, file=self._published.hf_hub_filename or "model.safetensors")

    def _load(self, model: nn.Module, path: Path, by_order: bool) -> None:
        stored = read(path, load_state_dict)
        own = model.state_dict()
        if by_order and len(stored) == len(own):
            stored = dict(zip(own, stored.values(), strict=True))
        load_backbone(model, stored, self.classifier, path, self.timm_name)


@cache
def _say_random(name: str) -> None:
    if processes.first():
        print(f"model {name}: random weights, nothing in it is pretrained", file=sys.stderr, flush=True)


@cache
def _say_large(name: str, classes: int, times: int) -> None:
    if processes.first():
        print(
            f"model {name}: its fresh head of {classes} outputs has weights {times} times as large as torch's own, "
            "and can collapse at large learning rates; model.head_init=linear starts it as torch does",
            file=sys.stderr,
            flush=True,
        )


def load_backbone(model: nn.Module, stored: Mapping[str, Tensor], head: Sequence[str], path: Path, name: str) -> None:
    """Put stored tensors into a network, but for those of its head; WeightsError where they are of another one."""
    own = model.state_dict()
    expected = {key: tensor.shape for key, tensor in own.items() if not in_head(key, head)}
    backbone = {key: tensor for key, tensor in stored.items() if not in_head(key, head)}
    misfits = sorted(
        key
        for key in expected.keys() | backbone.keys()
        if key not in expected or key not in backbone or backbone[key].shape != expected[key]
    )
    if misfits:
        raise WeightsError(
            f"{path} is not of {name}: {len(misfits)} tensors differ, first {misfits[0]}; "
            "name weights of this architecture"
        )
    for key, tensor in backbone.items():
        if tensor.is_floating_point() != own[key].is_floating_point() or tensor.is_complex():
            raise WeightsError(f"{path}: {key} is {tensor.dtype}, which {name} has not: fetch it again")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise WeightsError(f"{path}: {key} holds numbers that are not finite: fetch it again")
    model.load_state_dict(backbone, strict=False)


def _published(timm_name: str) -> Any:
    """What timm knows of a model without building it."""
    if not timm.is_model(timm_name):
        near = difflib.get_close_matches(timm_name, timm.list_models(), n=3, cutoff=0.5)
        raise ConfigError(
            f"model {timm_name!r} is unknown to timm: "
            + (f"did you mean {', '.join(near)}?" if near else "see timm.list_models()")
        )
    try:
        return timm.get_pretrained_cfg(timm_name, allow_unregistered=False)
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{timm_name.split('.')[0]}.*")
        raise ConfigError(f"model {timm_name!r}: {error}; timm has {', '.join(tags) or 'no weights of it'}") from error
