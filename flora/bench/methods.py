"""What is compared: the frozen model, full fine-tuning, PEFT's LoRA, FLoRA's forms, and the published layer."""

import argparse
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flora.bench.dense import make_dense
from flora.bench.networks import Network, network
from flora.bench.report import DTYPES
from flora.errors import ConfigError
from flora.methods.bitfit import BitFit
from flora.methods.full import Full
from flora.methods.heads import trained
from flora.methods.linear_probe import LinearProbe
from flora.methods.peft import Peft
from flora.training import frozen_norms

METHODS = {
    "floor": "frozen fp32 weights under autocast, gradients through every activation and to the output of every layer"
    " that LoRA adapts: what no adapter undercuts",
    "floor_cast": "the same with the weights of linear layers and convolutions already in the compute dtype",
    "full": "everything trains",
    "lora": "PEFT's LoRA, depthwise and grouped convolutions left out",
    "dora": "PEFT's DoRA, depthwise and grouped convolutions left out",
    "lora_flat": "LoRA with convolutions flattened, depthwise ones too",
    "locon_tucker": "LyCORIS' LoCon with Tucker-2 for convolutions",
    "bitfit": "biases, those of normalisation layers too",
    "linear_probe": "the head alone",
    "flora": "FLoRA, forward=auto, within flora.batched, as train.py runs it",
    "flora_alone": "FLoRA, forward=auto, every layer building its own weights, as without flora.batched",
    "flora_factored": "FLoRA, forward=factored",
    "flora_merged": "FLoRA, forward=merged",
    "dense": "FLoRA as its published layers run it",
}
_CONVOLUTIONS = ["Linear", "Conv1d", "Conv2d", "Conv3d"]
_RIVALS: dict[str, tuple[str, dict[str, Any]]] = {  # config class and options, beside the rank or the budget
    "dora": ("peft.LoraConfig", {"use_dora": True, "lora_alpha": "2r", "skip_depthwise": True}),
    "lora_flat": ("flora.methods.LoraFlatConfig", {"alpha": "2r", "layer_types": ["Linear", "Conv2d"]}),
    "locon_tucker": ("flora.methods.LoconConfig", {"alpha": "r", "layer_types": _CONVOLUTIONS}),
}
_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Ranks:
    """Sizes of the adapters.

    Attributes:
        r: rank of LoRA and of FLoRA's channel modes.
        kernel_rank: rank of FLoRA's kernel modes.
        match: FLoRA trains as many parameters as LoRA of rank ``r``: the budget solver sets its channel ranks.
    """

    r: int = 16
    kernel_rank: int = 2
    match: bool = False


@dataclass
class Prepared:
    """A model that is ready to step.

    Attributes:
        model: in training mode; normalisation statistics of frozen layers are frozen, as the trainer freezes them.
        trainable_params: outside the head.
        layers: how many are adapted; None where all or none train.
        input_requires_grad: the floor's images ask for a gradient, so that it flows through every activation.
        batched: the forward pass runs within flora.batched.
        starts: other tensors at which the floor's gradients end.
    """

    model: nn.Module
    trainable_params: int
    layers: int | None = None
    input_requires_grad: bool = False
    batched: bool = False
    starts: list[Tensor] = field(default_factory=list)


class Methods:
    """Applies methods to copies of a network.

    Args:
        network: which network.
        ranks: of the adapters.
        layers: ``all`` that the network's config names, or those in ``common``, which every method can adapt.

    Raises:
        ValueError: the ranks cannot be had on this network.
    """

    def __init__(self, network: Network, ranks: Ranks, layers: str = "all") -> None:
        self.network = network
        self.ranks = ranks
        spec = network.spec
        self.head = spec.classifier
        self.targets: str | list[str] = spec.adapter_targets
        self._rank_pattern: dict[str, Any] = {}
        with torch.device("meta"):
            lora = self._lora().apply(spec.skeleton(), self.head)
            self._adapted = list(lora.ranks)
            if layers == "common":
                self.targets = "|".join(re.escape(name) for name in sorted(lora.ranks))
            self._matched = trained(lora.model, self.head)[0] if ranks.match else None
            if ranks.match:
                solved: Any = self._flora("flora", self._matched)
                self._rank_pattern = solved.apply(spec.skeleton(), self.head).model.peft_config["default"].rank_pattern

    def prepare(self, method: str, model: nn.Module, compiled: bool = False) -> Prepared:
        """Turn a fresh copy of the network, on its device, into what the method trains; ``compiled``: later on."""
        if method.startswith("floor"):
            model.requires_grad_(False)
            if method == "floor_cast" and not self.network.casts_weights:
                _cast(model, self.network.dtype)
            starts: list[Tensor] = []
            if self.network.kind != "image":
                starts = self._reach_outputs(model, compiled)
            return Prepared(_still(model), 0, input_requires_grad=self.network.kind == "image", starts=starts)
        adapted = self.tuning(method).apply(model, self.head)
        if method == "full":
            return Prepared(adapted.model, sum(trained(adapted.model, ())))
        params = trained(adapted.model, self.head)[0]
        if method == "dense":
            make_dense(adapted.model)
        batched = method in ("flora", "flora_factored", "flora_merged")
        batched = batched and not self.network.checkpointing  # as the trainer runs it
        return Prepared(_still(adapted.model.train()), params, len(adapted.ranks), batched=batched)

    def _reach_outputs(self, model: nn.Module, compiled: bool) -> list[Tensor]:
        """Let gradients reach the embeddings, and adapted layers that no activation reaches: DeBERTa's, on positions.

        Autograd keeps those gradients, a copy of each call's output that an adapter would not make. torch.compile
        cannot have an output ask for its gradient; there a tensor of zeros that does is added, and given back.
        """
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        layers = [model.get_submodule(name) for name in self._adapted]
        unreached: dict[nn.Module, list[Tensor]] = {}

        def look(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            if output.requires_grad:
                return None
            unreached.setdefault(layer, []).append(output)
            return output.requires_grad_() if layer is embeddings else None

        hooks = [layer.register_forward_hook(look) for layer in (embeddings, *layers)]
        self.network.loss(model, self.network.inputs(next(model.parameters()).device))
        for hook in hooks:
            hook.remove()
        if not compiled:
            for layer in unreached:
                layer.register_forward_hook(_require_grad)
            return []
        starts = {layer: torch.zeros_like(outputs[0], requires_grad=True) for layer, outputs in unreached.items()}
        for layer, start in starts.items():
            layer.register_buffer("start", start, persistent=False)
            layer.register_forward_hook(_add_start)
        return list(starts.values())

    def tuning(self, method: str) -> Full | Peft | BitFit | LinearProbe:
        """The fine-tuning method behind a name other than the floors."""
        simple: dict[str, Any] = {"full": Full("full"), "bitfit": BitFit("bitfit", norms=True)}
        simple["linear_probe"] = LinearProbe("linear_probe")
        if method in simple:
            return simple[method]
        if method in _RIVALS:
            config, options = _RIVALS[method]
            rival = Peft(method, config, self.targets, **{"r": self.ranks.r, **options})
            rival.set_budget(self._matched)
            return rival
        return self._lora() if method == "lora" else self._flora(method)

    def _lora(self) -> Peft:
        # Updates that are not zero: arithmetic on zeros takes less power, and so less time, on some devices.
        r = self.ranks.r
        options: dict[str, Any] = {"r": r, "lora_alpha": r, "init_lora_weights": False}
        return Peft("lora", "peft.LoraConfig", self.targets, skip_depthwise=True, **options)

    def _flora(self, method: str, budget: int | None = None) -> Peft:
        forward = {"flora": "auto", "flora_alone": "auto", "dense": "factored"}.get(
            method, method.removeprefix("flora_")
        )
        options: dict[str, Any] = {"r": self.ranks.r, "kernel_rank": self.ranks.kernel_rank, "init_weights": False}
        options["rank_pattern"] = dict(self._rank_pattern)
        tuning = Peft("flora", "flora.FloraConfig", self.targets, forward=forward, **options)
        tuning.set_budget(budget)
        return tuning


def asked_for(
    arguments: argparse.Namespace, device: torch.device, match: bool = False, layers: str = "all"
) -> tuple[Methods, dict[str, Any]]:
    """Methods on the network that a script's options name, and what its result says of them.

    Raises:
        ConfigError: an option that cannot be used.
    """
    dtype = arguments.dtype or ("bf16" if device.type == "cuda" else "fp32")
    shape = {"size": arguments.size, "tokens": arguments.tokens, "channels_last": arguments.channels_last}
    shape |= {"cast": arguments.cast, "quantize": getattr(arguments, "quantize", None)}
    shape["checkpointing"] = getattr(arguments, "gradient_checkpointing", False)
    try:
        net = network(arguments.model, arguments.batch, DTYPES[dtype], **shape)
        methods = Methods(net, Ranks(arguments.r, arguments.kernel_rank, match), layers)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    size = net.spec.image_size if net.kind == "image" else None
    said = {"model": arguments.model, "batch": net.batch, "size": size, "tokens": net.tokens, "dtype": dtype}
    said |= {
        "channels_last": arguments.channels_last,
        "cast": net.cast,
        "quantize": net.quantize,
        "gradient_checkpointing": net.checkpointing,
        "r": arguments.r,
        "kernel_rank": arguments.kernel_rank,
    }
    return methods, said


def _still(model: nn.Module) -> nn.Module:
    """Frozen batch norms keep their statistics."""
    for norm in frozen_norms.of(model):
        norm.eval()
    return model


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        if isinstance(module, _CAST):
            module.to(dtype)


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_()


def _add_start(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output + module.start  # the layer may have calls of both kinds
