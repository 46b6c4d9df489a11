"""One tiny random model a family, and the adapters of configs/adapter as a run makes them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import OmegaConf
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from flora.config import instantiate_method
from flora.training import TrainerSettings
from flora.training.trainer import Trainer

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "adapter"
ADAPTERS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
CLASSES = 5
EXAMPLES = 8
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
ENCODER = ["attention.output.dense", "intermediate.dense", "output.dense"]
DECODER = r".*(language_model|^model)\.layers.*\.(q|k|v|o|gate|up|down)_proj"


@dataclass
class Family:
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    head: list[str]
    targets: Any = "all"


def _llava() -> nn.Module:
    vision = {**TEXT, "image_size": 16, "patch_size": 8, "projection_dim": 32}
    vision.pop("vocab_size")
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**vision),
            text_config=transformers.LlamaConfig(**TEXT),
            image_token_id=63,
        )
    )


def _deberta() -> nn.Module:
    relative = {"relative_attention": True, "position_buckets": 8, "share_att_key": True}
    config = transformers.DebertaV2Config(**TEXT, **relative, pos_att_type=["p2c", "c2p"], num_labels=CLASSES)
    return transformers.DebertaV2ForSequenceClassification(config)


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 60, (EXAMPLES, 7))}


def _llava_inputs() -> dict[str, Tensor]:
    ids = torch.cat([torch.full((EXAMPLES, 4), 63), torch.randint(3, 60, (EXAMPLES, 3))], dim=1)
    return {"input_ids": ids, "pixel_values": torch.randn(EXAMPLES, 3, 16, 16)}


FAMILIES: dict[str, Family] = {
    "bert": Family(
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=CLASSES)),
        _tokens,
        ["classifier"],
        ["query", "key", "value", *ENCODER],
    ),
    "deberta": Family(_deberta, _tokens, ["classifier"], ["query_proj", "key_proj", "value_proj", *ENCODER]),
    "resnet": Family(
        lambda: ResNet(BasicBlock, (2, 1, 1, 1), CLASSES, channels=(8, 8, 16, 16), stem_width=8, zero_init_last=False),
        lambda: {"x": torch.randn(EXAMPLES, 3, 32, 32)},
        ["fc"],
    ),
    "convnext": Family(
        lambda: ConvNeXt(
            num_classes=CLASSES, depths=(1, 1, 2, 1), dims=(8, 16, 16, 24), use_grn=True, ls_init_value=None
        ),
        lambda: {"x": torch.randn(EXAMPLES, 3, 32, 32)},
        ["head.fc"],
    ),
    "vit": Family(
        lambda: VisionTransformer(16, 4, num_classes=CLASSES, embed_dim=24, depth=3, num_heads=2),
        lambda: {"x": torch.randn(EXAMPLES, 3, 16, 16)},
        ["head"],
    ),
    "llama": Family(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)), _tokens, [], DECODER),
    "llava": Family(_llava, _llava_inputs, ["model.multi_modal_projector"], DECODER),
}


def adapter(name: str, family: Family | None = None, **changes: Any) -> Any:
    """The method that ``adapter=NAME adapter.KEY=VALUE ...`` makes for a family."""
    targets = family.targets if family else "all"
    nodes = {"adapter": OmegaConf.load(CONFIGS / f"{name}.yaml"), "model": {"adapter_targets": targets}}
    config = OmegaConf.create({**nodes, "trainer": {"lr": 1e-3}})
    for key, value in changes.items():
        config.adapter[key] = value
    return instantiate_method(config.adapter)


class Batch(torch.utils.data.Dataset):
    """One batch of examples, fetched whole."""

    def __init__(self, inputs: dict[str, Tensor], labels: Tensor) -> None:
        self.columns = {**inputs, "labels": labels}

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return {name: column[rows] for name, column in self.columns.items()}

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return self.__getitems__([row])


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """``[N, C]``: a classifier's output, or a language model's for the next token."""
    output = model(**{name: column for name, column in batch.items() if name != "labels"})
    output = getattr(output, "logits", output)
    return output[:, -1, :CLASSES] if output.dim() == 3 else output


def trainer(adapted: Any, family: Family, batch: Batch, folder: Path, steps: int, lr: float) -> Trainer:
    """The trainer of a run, over one batch."""
    settings = TrainerSettings(
        epochs=1, max_steps=steps, lr=lr, head_lr=lr, batch_size=EXAMPLES, log_every=1, device="cpu", warmup_ratio=0.0
    )
    return Trainer(
        model=adapted.model,
        settings=settings,
        forward=lambda model, batch, training: (logits(model, batch), batch["labels"]),
        head=family.head,
        metric=None,
        metric_name="accuracy",
        folder=folder,
        train=batch,
        extra_callbacks=adapted.callbacks,
        penalty=adapted.penalty,
    )
