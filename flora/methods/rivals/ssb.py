"""SSB: a linear layer's weight scaled on both sides (arXiv 2407.05417); SSL, on inputs alone, is PEFT's (IA)^3."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from flora.methods.rivals.inserted import Inserted, InsertedModel
from flora.replaced.config import PeftMethod


@dataclass
class SsbConfig(PeftConfig):
    """diag(b) W diag(a) for W ``[out, in]``: in + out parameters a layer, all of them one at the start."""

    method: ClassVar[PeftMethod] = PeftMethod("SSB")

    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Linear layers to scale: names, endings, or a regular expression."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules besides the factors to train fully and save with them."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


class Ssb(Inserted):
    """A linear layer with factors on inputs and outputs; the bias keeps its size, as in the authors' code."""

    adapter_layer_names = ("ssb_inputs", "ssb_outputs")

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: SsbConfig) -> None:
        super().__init__(base_layer, adapter_name)
        self.ssb_inputs = nn.ParameterDict()
        self.ssb_outputs = nn.ParameterDict()
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SsbConfig) -> None:
        """Create the factors of an adapter."""
        self.ssb_inputs[adapter_name] = nn.Parameter(torch.ones(self.base_layer.in_features))
        self.ssb_outputs[adapter_name] = nn.Parameter(torch.ones(self.base_layer.out_features))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer with its scaled weight; several adapters multiply."""
        adapters = [a for a in self.active_adapters if a in self.ssb_inputs and not self.disable_adapters]
        if not adapters:
            return self.base_layer(x)
        for adapter in adapters:
            x = x * self.ssb_inputs[adapter].to(x.dtype)
        y = F.linear(x, self.base_layer.weight)
        for adapter in adapters:
            y = y * self.ssb_outputs[adapter].to(y.dtype)
        return y if self.base_layer.bias is None else y + self.base_layer.bias


class SsbModel(InsertedModel):
    """The PEFT tuner of SSB."""

    prefix = "ssb_"
    tuner_layer_cls = Ssb

    @override
    def make(self, config: Any, adapter_name: str, target: nn.Module, name: str) -> Inserted:
        if not isinstance(target, nn.Linear):
            raise ValueError(f"target_modules: {name} ({type(target).__name__}) is no linear layer, which ssb scales")
        return Ssb(target, adapter_name, config)

    @override
    def extend(self, config: Any, adapter_name: str, layer: Inserted) -> None:
        assert isinstance(layer, Ssb)
        layer.update_layer(adapter_name, config)
