"""Visual prompt tuning: learned tokens among those of a vision transformer (VPT, arXiv 2203.12119)."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import Tensor, nn
from typing_extensions import override

from flora.methods.rivals.inserted import Inserted, InsertedModel
from flora.replaced.config import PeftMethod


@dataclass
class VptConfig(PeftConfig):
    """``num_tokens`` prompts in front of the patches: new ones in every block (deep), or once before the first."""

    method: ClassVar[PeftMethod] = PeftMethod("VPT")

    num_tokens: int = field(default=10, metadata={"help": "Prompts in a block."})
    deep: bool = field(default=True, metadata={"help": "New prompts for every block instead of once for all."})
    target_modules: list[str] | set[str] | str | None = field(
        default=r"blocks\.\d+", metadata={"help": "The transformer blocks, all of them."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Blocks to leave out."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules besides the prompts to train fully and save with them."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method
        if isinstance(self.num_tokens, bool) or not isinstance(self.num_tokens, int) or self.num_tokens < 1:
            raise ValueError(f"num_tokens: must be a positive integer, got {self.num_tokens!r}")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


class PromptedBlock(Inserted):
    """A block that sees prompts between the class token and the patches: tokens [N, T, D] in and out.

    Args:
        base_layer: the block.
        adapter_name: the adapter.
        config: its configuration.
        prefix: tokens in front of the prompts (class token, registers).
        size: features of a token.
        enters, leaves: whether prompts are put in before the block and taken out after it.
        patch: inputs of a patch, for the start that the paper takes from Xavier's rule.
    """

    adapter_layer_names = ("vpt_prompts",)
    other_param_names = ("places",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: VptConfig, **place: Any) -> None:
        super().__init__(base_layer, adapter_name)
        self.vpt_prompts = nn.ParameterDict()
        self.places: dict[str, dict[str, Any]] = {}
        self.place = place
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: VptConfig) -> None:
        """Create the prompts of an adapter: num_tokens x size where they enter, none elsewhere."""
        place = self.place
        enters, leaves = config.deep or place["first"], config.deep or place["last"]
        self.places[adapter_name] = {"enters": enters, "leaves": leaves, "count": config.num_tokens}
        if enters:
            bound = math.sqrt(6 / (place["patch"] + place["size"]))
            prompts = torch.empty(config.num_tokens, place["size"]).uniform_(-bound, bound)
            self.vpt_prompts[adapter_name] = nn.Parameter(prompts)
            self._move_adapter_to_device_of_base_layer(adapter_name, device=next(self.base_layer.parameters()).device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block with the prompts of the first active adapter."""
        active = [a for a in self.active_adapters if a in self.places and not self.disable_adapters]
        if not active:
            return self.base_layer(x, *args, **kwargs)
        place, prefix = self.places[active[0]], self.place["prefix"]
        if place["enters"]:
            prompts = self.vpt_prompts[active[0]].to(x.dtype).expand(len(x), -1, -1)
            x = torch.cat([x[:, :prefix], prompts, x[:, prefix:]], dim=1)
        x = self.base_layer(x, *args, **kwargs)
        if place["leaves"]:
            x = torch.cat([x[:, :prefix], x[:, prefix + place["count"] :]], dim=1)
        return x


class VptModel(InsertedModel):
    """The PEFT tuner of VPT for timm's vision transformers."""

    prefix = "vpt_"
    tuner_layer_cls = PromptedBlock

    @override
    def make(self, config: Any, adapter_name: str, target: nn.Module, name: str) -> Inserted:
        model: Any = self.model
        parts = ("blocks", "patch_embed", "num_prefix_tokens", "embed_dim")
        if not all(hasattr(model, part) for part in parts) or not name.startswith("blocks."):
            raise ValueError(f"target_modules: vpt needs a vision transformer of timm, got {type(model).__name__}")
        index, last = int(name.split(".")[1]), len(model.blocks) - 1
        projection = model.patch_embed.proj.weight
        return PromptedBlock(
            target,
            adapter_name,
            config,
            prefix=model.num_prefix_tokens,
            size=model.embed_dim,
            patch=math.prod(projection.shape[1:]),
            first=index == 0,
            last=index == last,
        )

    @override
    def extend(self, config: Any, adapter_name: str, layer: Inserted) -> None:
        assert isinstance(layer, PromptedBlock)
        layer.update_layer(adapter_name, config)
