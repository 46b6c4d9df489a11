"""Small models of many families, randomly initialised, each with an input and what to adapt in it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn


@dataclass
class Entry:
    """A model, its inputs, and the settings of the adapter."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    output: str = "logits"


def every_layer(model: nn.Module, *, without: str = "head") -> list[str]:
    """Names of all convolutions and linear layers but the head."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return sorted(name for name in names if not name.startswith(without))


class LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.lstm = nn.LSTM(12, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.embed(tokens))
        return self.head(states.mean(1))


class VideoNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 12, (3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2))
        self.depthwise = nn.Conv3d(12, 12, 3, padding="same", groups=12, padding_mode="replicate")
        self.grouped = nn.Conv3d(12, 18, 3, padding=1, groups=3)
        self.head = nn.Linear(18, 5)

    def forward(self, video: Tensor) -> Tensor:
        x = torch.relu(self.stem(video))
        x = torch.relu(self.grouped(torch.relu(self.depthwise(x))))
        return self.head(x.mean((2, 3, 4)))


def image(size: int = 32) -> dict[str, Tensor]:
    return {"x": torch.randn(2, 3, size, size)}


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 60, (2, 9))}


TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _efficientnet() -> nn.Module:
    """TensorFlow's 'same' padding: convolutions with a forward of their own."""
    return timm.create_model("tf_efficientnet_lite0", num_classes=5)


def _swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [2, 4], [4, 4], num_classes=5)


def _vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    return model


def _llava() -> nn.Module:
    text = transformers.LlamaConfig(**TEXT)
    vision = transformers.CLIPVisionConfig(**VISION, image_size=16, patch_size=8, projection_dim=32)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=63)
    )


def _llava_inputs() -> dict[str, Tensor]:
    ids = torch.cat([torch.full((2, 4), 63), torch.randint(3, 60, (2, 5))], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 16, 16)}


def _clip() -> nn.Module:
    text = {**TEXT, "max_position_embeddings": 16, "projection_dim": 32, "eos_token_id": 2}
    vision = {**VISION, "image_size": 16, "patch_size": 8, "projection_dim": 32}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))


def _wav2vec2() -> nn.Module:
    sizes = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    config = transformers.Wav2Vec2Config(
        **VISION, **sizes, vocab_size=20, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4
    )
    return transformers.Wav2Vec2ForCTC(config)


ZOO: dict[str, Entry] = {
    "timm ConvNeXt-V2": Entry(
        lambda: timm.create_model("convnextv2_atto", num_classes=5), image, {"modules_to_save": ["head.fc"]}
    ),
    "timm EfficientNet-Lite": Entry(_efficientnet, lambda: image(64), {"modules_to_save": ["classifier"]}),
    "torchvision ResNet": Entry(
        lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5),
        image,
        {"modules_to_save": ["fc"]},
    ),
    "torchvision Swin": Entry(
        _swin,
        image,
        {
            "fold_pattern": {"features.1.*qkv": [3, 24, 24], "features.3.*qkv": [3, 48, 48]},
            "target_modules": r"features.*(qkv|attn.proj|mlp.[03]|reduction)|features.0.0",
        },
    ),
    "torchvision ViT": Entry(
        _vit,
        image,
        {"target_modules": ["conv_proj", "self_attention", "mlp.0", "mlp.3"], "target_parameters": ["pos_embedding"]},
    ),
    "BERT": Entry(
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)),
        tokens,
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    ),
    "DeBERTa-v2": Entry(
        lambda: transformers.DebertaV2ForSequenceClassification(
            transformers.DebertaV2Config(
                **TEXT, relative_attention=True, position_buckets=8, share_att_key=True, pos_att_type=["p2c", "c2p"]
            )
        ),
        tokens,
        {"target_modules": ["query_proj", "key_proj", "value_proj", "dense"], "task_type": "SEQ_CLS"},
    ),
    "Llama": Entry(
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
        tokens,
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "embed_tokens"],
            "task_type": "CAUSAL_LM",
        },
    ),
    "GPT-2": Entry(
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)),
        tokens,
        {
            "target_modules": ["c_attn", "c_proj", "c_fc"],
            "fold_pattern": {"c_attn": [32, 3, 32]},
            "stack_modes": [1],
            "task_type": "CAUSAL_LM",
        },
    ),
    "Mixtral (experts)": Entry(
        lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4)
        ),
        tokens,
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "Wav2Vec2": Entry(
        _wav2vec2,
        lambda: {"input_values": torch.randn(2, 400)},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "conv", "projection"]},
    ),
    "CLIP": Entry(
        _clip,
        lambda: {**tokens(), "pixel_values": torch.randn(2, 3, 16, 16)},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "fc1", "fc2", "patch_embedding", "position_embedding"]},
        "logits_per_image",
    ),
    "LLaVA": Entry(
        _llava,
        _llava_inputs,
        {
            "target_modules": r".*language_model.*(q|k|v|o|gate|up|down)_proj",
            "modules_to_save": ["multi_modal_projector"],
        },
    ),
    "LSTM classifier": Entry(
        LSTMClassifier,
        lambda: {"tokens": torch.randint(50, (2, 9))},
        {"target_modules": ["embed", "lstm"], "modules_to_save": ["head"]},
    ),
    "3-D convolutions": Entry(VideoNet, lambda: {"video": torch.randn(2, 3, 6, 16, 16)}, {"modules_to_save": ["head"]}),
}
