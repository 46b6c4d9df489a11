"""Vision-language models as LLaVA puts them together: a vision tower, a projector, a language model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flora.errors import ConfigError, WeightsError
from flora.files import saved_weights
from flora.methods.heads import in_head
from flora.models.chat import CHATS
from flora.models.text import TransformersModel
from flora.models.vision import TimmModel
from flora.models.weights import Weights, sha256_of

PROJECTOR = "model.multi_modal_projector"
_FIRST = "embeddings.class_embedding"  # of CLIP's vision tower; how deep it lies depends on transformers' version


class GridLlavaConfig(transformers.LlavaConfig):
    """LLaVA whose vision tower gives a map of features, as convolutional networks of timm do."""

    model_type = "llava_grid"


class GridProjector(nn.Module):
    """A layer norm and a two-layer perceptron: features of a convolutional network come in any scale."""

    def __init__(self, config: GridLlavaConfig):
        super().__init__()
        sizes: Any = config
        inner, outer = sizes.vision_config.hidden_size, sizes.text_config.hidden_size
        self.norm = nn.LayerNorm(inner)
        self.linear_1 = nn.Linear(inner, outer)
        self.linear_2 = nn.Linear(outer, outer)

    def forward(self, features: Tensor) -> Tensor:
        """Embeddings ``[N, T, outer]`` of features ``[N, T, inner]``."""
        return self.linear_2(nn.functional.gelu(self.linear_1(self.norm(features))))


class GridLlavaModel(transformers.LlavaModel):
    """LlavaModel whose image features are flattened from height x width, row by row."""

    config: GridLlavaConfig

    def __init__(self, config: GridLlavaConfig):
        super().__init__(config)
        self.multi_modal_projector: nn.Module = GridProjector(config)  # type: ignore[assignment]

    def get_image_features(self, pixel_values: Tensor, **options: Any) -> Any:
        """The tower's output; its ``pooler_output`` lists one ``[T, width]`` of embeddings an image."""
        features = self.vision_tower(pixel_values, return_dict=True)
        features.pooler_output = list(self.multi_modal_projector(features.last_hidden_state.flatten(2).mT))
        return features


class GridLlava(transformers.LlavaForConditionalGeneration):
    """LlavaForConditionalGeneration over GridLlavaModel."""

    config: GridLlavaConfig

    def __init__(self, config: GridLlavaConfig):
        super(transformers.LlavaForConditionalGeneration, self).__init__(config)
        self.model = GridLlavaModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


transformers.AutoConfig.register("llava_grid", GridLlavaConfig, exist_ok=True)
transformers.AutoModelForImageTextToText.register(GridLlavaConfig, GridLlava, exist_ok=True)


class Tower(TransformersModel):
    """CLIP's vision transformer, from files of the whole of CLIP or of it alone."""

    def state(self) -> tuple[dict[str, Tensor], str]:
        """Its tensors, under the names that it has alone, and what to call their file; WeightsError for none of it."""
        tensors, source = self._state()
        whole = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}
        own = {name.removeprefix("vision_model."): tensor for name, tensor in (whole or tensors).items()}
        if _FIRST not in own:
            raise WeightsError(f"{source} holds no vision tower of CLIP: correct model.vision_weights")
        return own, source

    def _tokenizer_facts(self) -> dict[str, Any]:
        return {}


class Llava(TransformersModel):
    """A vision-language model; adapters go to its language model, and its projector, the head, is trained in full.

    It is an ``ImageTextSpec`` (flora.models.spec).

    Args:
        name: the name in records.
        architecture: sizes as in transformers' ``config.json``, of type ``llava`` or ``llava_grid``.
        chat: a key of ``flora.models.chat.CHATS``: how its conversations are written.
        system: the system message of every conversation; None or empty: that of ``chat``.
        image_size: side of the square input in pixels; None: that of the vision tower's config.
        patch_size: pixels, along a side, of what becomes one token; None: that of the vision tower's config.
        mean, std: per-channel statistics of images in [0, 1].
        interpolation: how images are resized.
        aspect: how they become squares: ``pad`` with their mean colour, ``middle`` as CLIP cuts it out, or ``squash``.
        pretrained: load weights; otherwise the network starts random.
        weights: of the whole network, see ``TransformersModel``.
        parts: a vision model and a language model to put together instead of ``weights``; the projector is then fresh.
        vision_weights, language_weights: of the same two for sizes of type ``llava``, in place of ``parts``: each a
            folder or file, or a ``Source``. Of CLIP the vision tower is taken.
        projector: folder of a finished run, whose trained projector this one starts as.
        adapter_targets, tokenizer, trust_remote_code: see ``TransformersModel``.

    Raises:
        ConfigError: an unknown chat or aspect, or an image that does not divide into patches.
    """

    def __init__(
        self,
        name: str,
        architecture: Mapping[str, Any],
        chat: str,
        system: str | None = None,
        image_size: int | None = None,
        patch_size: int | None = None,
        mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        interpolation: str = "bicubic",
        aspect: str = "pad",
        pretrained: bool = True,
        weights: Weights | None = None,
        parts: tuple[TimmModel | Tower, TransformersModel] | None = None,
        vision_weights: Weights | None = None,
        language_weights: Weights | None = None,
        projector: str | None = None,
        adapter_targets: str | Sequence[str] = "all",
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if (vision_weights is None) != (language_weights is None):
            raise ConfigError("model.vision_weights and model.language_weights go together: name both, or neither")
        if vision_weights is not None and language_weights is not None and pretrained:
            sizes, target = (architecture[key] for key in ("vision_config", "text_config")), adapter_targets
            vision, text = (dict(part) for part in sizes)
            language = TransformersModel("language model", "causal_lm", text, (), True, language_weights, target)
            parts = (Tower("vision tower", "image_text", vision, (), True, vision_weights), language)
        self.parts = parts
        super().__init__(
            *(name, "image_text", architecture, [PROJECTOR], pretrained, weights, adapter_targets, tokenizer),
            trust_remote_code=trust_remote_code,
        )
        for key, value, allowed in (("chat", chat, tuple(CHATS)), ("aspect", aspect, ("pad", "middle", "squash"))):
            if value not in allowed:
                raise ConfigError(f"model.{key}={value} is unknown; choose one of {', '.join(allowed)}")
        tower: Any = self.config().vision_config
        self.chat = CHATS[chat].saying(system)
        self.image_size = int(getattr(tower, "image_size", 0)) if image_size is None else image_size
        patch = patch_size or int(getattr(tower, "patch_size", 0))
        if patch < 1 or self.image_size < patch or self.image_size % patch:
            raise ConfigError(f"model.image_size={self.image_size} must be a multiple of the patch size {patch}")
        self.image_tokens = (self.image_size // patch) ** 2
        self.mean, self.std = tuple(mean), tuple(std)
        self.interpolation = interpolation
        self.aspect = aspect
        self.projector = projector

    @property
    def image_id(self) -> int:
        """The token that stands for a piece of an image."""
        return self.architecture["image_token_index"]

    @property
    def facts(self) -> dict[str, Any]:
        """What a record says of the weights of the whole, or of its parts, and of the projector."""
        if self.parts is None or not self.pretrained:
            facts = super().facts
        else:
            vision, language = self.parts
            facts = {"model_type": self.architecture["model_type"], "pretrained": True}
            facts |= {"vision": vision.facts, "language": language.facts, **self._tokenizer_facts()}
        if self.projector:
            path = self._projector_file()
            facts["projector"] = {"path": str(path), "sha256": sha256_of(path)}
        return facts

    def build(self, num_classes: int, drop_path: float = 0.0) -> nn.Module:
        """Make the network, see TransformersModel; a fresh projector comes from torch's global seed."""
        model = super().build(num_classes, drop_path)
        if self.projector:
            self._load_projector(model)
        return model

    def tokenizer(self) -> Any:
        """See TransformersModel; ConfigError where it lacks the token that ends answers."""
        tokenizer = super().tokenizer()
        try:
            self.chat.end_token(tokenizer)
        except ValueError as error:
            raise ConfigError(f"model.tokenizer: {error}, which ends the answers of {self.name}") from error
        return tokenizer

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 images ``[N, 3, H, W]`` to float ``(x / 255 - mean) / std`` on their device."""
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.mean, self.std))
        return images.float().div_(255).sub_(mean).div_(std)

    def _tokenizer_beside(self) -> str:
        return super()._tokenizer_beside() if self.parts is None else self.parts[1]._tokenizer_beside()

    def _fresh(self) -> list[str]:
        return [] if self.parts is None else self.classifier

    def _state(self) -> tuple[dict[str, Tensor], str]:
        if self.parts is None:
            return super()._state()
        vision, language = self.parts
        if isinstance(vision, Tower):
            own, seen = vision.state()
            prefix = next(n for n in self.skeleton().state_dict() if n.endswith(_FIRST)).removesuffix(_FIRST)
            state = {prefix + name: tensor for name, tensor in own.items()}
        else:
            seen, tower = vision.name, vision.build(1).state_dict()
            state = {
                f"model.vision_tower.timm_model.{name}": tensor
                for name, tensor in tower.items()
                if not in_head(name, vision.classifier)
            }
        text, source = language._state()
        for name, tensor in text.items():
            inner = name.removeprefix("model.")
            state[name if name.startswith("lm_head.") else f"model.language_model.{inner}"] = tensor
        return state, f"{source} with {seen}"

    def _projector_file(self) -> Path:
        if path := saved_weights(Path(str(self.projector)).expanduser()):
            return path
        raise WeightsError(
            f"model.projector={self.projector}: no adapter_model.safetensors or model.safetensors there; "
            "train the projector first (adapter=linear_probe)"
        )

    def _load_projector(self, model: nn.Module) -> None:
        path = self._projector_file()
        try:
            stored = {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(path).items()}
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} cannot be read as weights ({error}): train the projector again") from error
        own = {name: tensor for name, tensor in model.named_parameters() if in_head(name, self.classifier)}
        misfits = [name for name in own if name not in stored or stored[name].shape != own[name].shape]
        if misfits:
            raise WeightsError(f"{path} holds no projector of {self.name}: {misfits[0]} is missing or of another size")
        if broken := [n for n in own if not (stored[n].is_floating_point() and stored[n].isfinite().all())]:
            raise WeightsError(f"{path}: {broken[0]} does not hold finite numbers: train the projector again")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(stored[name])
