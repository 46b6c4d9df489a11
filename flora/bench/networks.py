"""The networks that benchmarks run: by name, with random weights, and a batch of random inputs for each."""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from flora.bench.quantised import KINDS, check, quantise
from flora.errors import ConfigError
from flora.files import ROOT
from flora.models import TimmModel, TransformersModel, get

# Configs of transformers networks in configs/model, and what is smaller here.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert_large", {}),
    "deberta": ("deberta_v3_base", {}),
    "llama": ("llama_7b", {"num_hidden_layers": 8}),
    "llama_7b": ("llama_7b", {}),
}
TOKENS = {"sequence_classification": 128, "causal_lm": 1024, "image_text": 64}
BATCH = {"sequence_classification": 32, "causal_lm": 4, "image_text": 16}
IMAGE_BATCH = 32
IMAGE_CLASSES = 1000


@dataclass
class Network:
    """A network and what it runs on.

    Attributes:
        spec: its architecture, of ``flora.models``; no weights are loaded.
        batch: examples per step.
        dtype: of the arithmetic. A causal language model holds its weights in it, as is usual at that size; every other
            network keeps fp32 weights, and autocast computes in it.
        tokens: per text, without those of its image.
        channels_last: images and the weights of 2-d convolutions in channels-last order.
        cast: every network holds its weights in the dtype of the arithmetic, as servers do.
        quantize: to what its linear layers are quantised, a key of ``flora.bench.quantised.KINDS``; None: they are not.
        checkpointing: blocks keep their inputs alone and run again in the backward pass.
    """

    spec: Any
    batch: int
    dtype: torch.dtype = torch.float32
    tokens: int | None = None
    channels_last: bool = False
    cast: bool = False
    quantize: str | None = None
    checkpointing: bool = False
    kind: str = field(init=False)

    def __post_init__(self) -> None:
        self.kind = self.spec.kind

    @property
    def casts_weights(self) -> bool:
        """Whether the weights are held in the dtype of the arithmetic, so that nothing is left to autocast."""
        return self.cast or self.kind == "causal_lm" or self.dtype == torch.float32

    def build(self, device: torch.device) -> nn.Module:
        """The network on the CPU, with random weights of torch's global seed, drawn on ``device``, which is faster."""
        with torch.device(device):
            model = self.spec.build(IMAGE_CLASSES if self.kind == "image" else 2)
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and not parameter.any():
                nn.init.ones_(parameter)  # the last scale of a residual branch; zeros there would zero its gradients
        if self.casts_weights:
            model = model.to(self.dtype)
        if self.kind in ("causal_lm", "image_text"):
            model.config.get_text_config().use_cache = False  # made for generation; it only copies keys and values here
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return model.cpu().train()

    def copied(self, base: nn.Module, device: torch.device) -> nn.Module:
        """A copy of what ``build`` gave, on the device: quantised and with checkpoints where it shall be so."""
        model: Any = copy.deepcopy(base)
        if self.quantize is not None:
            quantise(model, self.dtype, device, self.spec.classifier)
        model = model.to(device)
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        return model

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """A batch of noise with random labels."""
        if self.kind == "image":
            images = torch.randn(self.batch, 3, self.spec.image_size, self.spec.image_size, device=device)
            if self.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            return {
                "images": images.to(self.dtype) if self.cast else images,
                "labels": torch.randint(IMAGE_CLASSES, (self.batch,), device=device),
            }
        vocabulary = self.spec.config().get_text_config().vocab_size
        texts = torch.randint(vocabulary, (self.batch, int(self.tokens or 0)), device=device)
        if self.kind == "image_text":
            return self._shown(texts)
        if self.kind == "causal_lm":
            return {"input_ids": texts, "labels": texts}
        labels = torch.randint(2, (self.batch,), device=device)
        return {"input_ids": texts, "attention_mask": torch.ones_like(texts), "labels": labels}

    def _shown(self, texts: Tensor) -> dict[str, Tensor]:
        """Texts after an image each; the loss is on the text."""
        texts = torch.where(texts == self.spec.image_id, texts + 1, texts)
        places = texts.new_full((self.batch, self.spec.image_tokens), self.spec.image_id)
        size = self.spec.image_size
        return {
            "input_ids": torch.cat([places, texts], 1),
            "pixel_values": torch.randn(self.batch, 3, size, size, device=texts.device),
            "labels": torch.cat([torch.full_like(places, -100), texts], 1),
        }

    def loss(self, model: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
        """The training loss of a batch."""
        with self.autocast(next(iter(inputs.values())).device):
            if self.kind != "image":
                return model(**inputs).loss
            return F.cross_entropy(model(inputs["images"]).float(), inputs["labels"])

    def outputs(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The logits of a batch."""
        with self.autocast(next(iter(inputs.values())).device):
            return model(inputs["images"]) if self.kind == "image" else model(**unlabelled(inputs)).logits

    def autocast(self, device: torch.device) -> Any:
        """The context in which the network computes."""
        return torch.autocast(device.type, self.dtype, enabled=not self.casts_weights)


def unlabelled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch without its labels."""
    return {name: tensor for name, tensor in inputs.items() if name != "labels"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a network and its batch."""
    parser.add_argument("--model", required=True, help=f"a name of timm, llava_mini, {', '.join(TRANSFORMERS)}")
    parser.add_argument("--batch", type=int, help="examples; default: 32, or as fits the model")
    parser.add_argument("--tokens", type=int, help="per text; default: 128, or as fits the model")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--cast", action="store_true", help="hold all weights in the dtype of the arithmetic")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how the network is trained, whichever method trains it."""
    told = "; ".join(f"{kind}: {what}" for kind, what in KINDS.items())
    parser.add_argument("--quantize", choices=KINDS, help=f"the frozen linear layers. {told}")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="networks of transformers")


def network(
    name: str,
    batch: int | None = None,
    dtype: torch.dtype = torch.float32,
    size: int | None = None,
    tokens: int | None = None,
    channels_last: bool = False,
    cast: bool = False,
    quantize: str | None = None,
    checkpointing: bool = False,
) -> Network:
    """Look up a network: any classifier of timm, a preset of ``flora.models``, or a key of TRANSFORMERS.

    Args:
        name: which.
        batch: examples; None: 32 images or texts, 4 for a causal language model, 16 for a vision-language model.
        dtype: of the arithmetic.
        size: side of the images in pixels; None: that of the model's weights.
        tokens: per text; None: 128 for a classifier, 1024 for a causal language model, 64 beside an image.
        channels_last: for images.
        cast, quantize, checkpointing: see ``Network``.

    Raises:
        ConfigError: an unknown name, or a setting that the network does not have.
    """
    spec = _transformers(name) if name in TRANSFORMERS else get(name)
    spec.pretrained = False
    for option, value in {"batch": batch, "size": size, "tokens": tokens}.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{option} must be at least 1, got {value}")
    if quantize is not None:
        check(quantize)
    if isinstance(spec, TimmModel):
        if quantize is not None:
            raise ConfigError(f"--quantize: {name} is a network of images; leave it out")
        if checkpointing:
            raise ConfigError(f"--gradient-checkpointing: {name} has none; leave it out")
        spec.head_init = None  # of a thousand classes, as timm starts it
        if tokens is not None:
            raise ConfigError(f"--tokens: {name} reads images; leave it out")
        if size is not None:
            spec.image_size = size
        return Network(spec, batch or IMAGE_BATCH, dtype, channels_last=channels_last, cast=cast)
    if size is not None or channels_last:
        raise ConfigError(f"--size, --channels-last: {name} reads text, or images of one size; leave them out")
    net = Network(
        spec, batch or BATCH[spec.kind], dtype, tokens or TOKENS[spec.kind], False, cast, quantize, checkpointing
    )
    if net.tokens and net.tokens > spec.max_length:
        raise ConfigError(f"--tokens: {name} reads at most {spec.max_length}, got {net.tokens}")
    return net


def _transformers(name: str) -> TransformersModel:
    config, smaller = TRANSFORMERS[name]
    path = ROOT / "configs" / "model" / f"{config}.yaml"
    if not path.exists():
        raise ConfigError(f"--model {name}: there is no configs/model/{config}.yaml yet; choose another")
    fields = yaml.safe_load(path.read_text())
    sizes = fields["architecture"] | smaller
    targets = fields["adapter_targets"]
    kind = fields["kind"].removeprefix("${oc.select:task.network,").removesuffix("}")  # what it is without a task
    return TransformersModel(name, kind, sizes, fields["classifier"], False, adapter_targets=targets)
