"""Bottleneck adapters in three places: after both halves of a block, after its end, or beside its MLP.

houlsby: arXiv 1902.00751; pfeiffer: arXiv 2005.00052; parallel: arXiv 2110.04366.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import Tensor, nn
from typing_extensions import override

from flora.methods.rivals.inserted import Inserted, InsertedModel
from flora.replaced.config import PeftMethod

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}


@dataclass
class BottleneckConfig(PeftConfig):
    """Adapters up(act(down(x))) of width ``r`` around the targeted modules."""

    method: ClassVar[PeftMethod] = PeftMethod("BOTTLENECK")

    r: int = field(default=16, metadata={"help": "Width of the bottleneck."})
    parallel: bool = field(
        default=False,
        metadata={
            "help": "False: y + scale * adapter(y) on the module's output y. True: the adapter reads the module's "
            "input x, y + scale * adapter(x); a module that takes (hidden, residual) and adds them gets its residual "
            "adapted."
        },
    )
    scale: float = field(default=1.0, metadata={"help": "Constant that multiplies the adapter's output."})
    bias_free: bool = field(default=False, metadata={"help": "Leave both biases of the adapter out."})
    activation: str = field(default="relu", metadata={"help": f"One of {', '.join(ACTIVATIONS)}."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to put adapters around: names, endings, or a regular expression."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules besides the adapters to train fully and save with them."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r: must be a positive integer, got {self.r!r}")
        if not isinstance(self.bias_free, bool):
            raise ValueError(f"bias_free: must be True or False, got {self.bias_free!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


class Bottleneck(Inserted):
    """A module with a bottleneck after or beside it; the features lie in the last dimension, or in dimension 1 of maps.

    The up projection starts at zero, so the adapted module starts as the module.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("settings",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.settings: dict[str, BottleneckConfig] = {}
        self.features = features(base_layer, name)
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Create the parameters of an adapter: 2 r features, and r + features more with biases."""
        self.settings[adapter_name] = config
        biased = not config.bias_free
        down, up = nn.Linear(self.features, config.r, bias=biased), nn.Linear(config.r, self.features, bias=biased)
        for parameter in up.parameters():
            nn.init.zeros_(parameter)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self._move_adapter_to_device_of_base_layer(adapter_name, device=next(self.base_layer.parameters()).device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module and its adapters; of a tuple the first entry is adapted."""
        adapters = [a for a in self.active_adapters if a in self.settings and not self.disable_adapters]
        beside = [adapter for adapter in adapters if self.settings[adapter].parallel]
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()]
        if beside and len(args) == 2 and len(inputs) == 2:
            args = (args[0], args[1] + sum(self._adapted(adapter, args[1]) for adapter in beside))
            beside = []
        result = self.base_layer(*args, **kwargs)
        output = result[0] if isinstance(result, tuple) else result
        for adapter in adapters:
            if not self.settings[adapter].parallel:
                output = output + self._adapted(adapter, output)
        for adapter in beside:
            output = output + self._adapted(adapter, inputs[0])
        return (output, *result[1:]) if isinstance(result, tuple) else output

    def _adapted(self, adapter: str, x: Tensor) -> Tensor:
        config = self.settings[adapter]
        down: Any = self.bottleneck_down[adapter]
        up = self.bottleneck_up[adapter]
        maps = x.dim() == 4 and x.shape[1] == self.features
        hidden = (x.movedim(1, -1) if maps else x).to(down.weight.dtype)
        hidden = config.scale * up(ACTIVATIONS[config.activation](down(hidden)))
        return (hidden.movedim(-1, 1) if maps else hidden).to(x.dtype)


class BottleneckModel(InsertedModel):
    """The PEFT tuner of all three."""

    prefix = "bottleneck_"
    tuner_layer_cls = Bottleneck

    @override
    def make(self, config: Any, adapter_name: str, target: nn.Module, name: str) -> Inserted:
        return Bottleneck(target, adapter_name, config, name)

    @override
    def extend(self, config: Any, adapter_name: str, layer: Inserted) -> None:
        assert isinstance(layer, Bottleneck)
        layer.update_layer(adapter_name, config)


def features(module: nn.Module, name: str) -> int:
    """Features of a module's output: those of its last linear layer or convolution.

    Raises:
        ValueError: it holds neither.
    """
    sizes = [
        part.out_features if isinstance(part, nn.Linear) else part.out_channels
        for part in module.modules()
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    if not sizes:
        raise ValueError(f"target_modules: {name} ({type(module).__name__}) holds no linear layer or convolution")
    return sizes[-1]
