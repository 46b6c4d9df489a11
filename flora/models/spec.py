"""What a model spec is: a pretrained network described, not yet built; what tasks, methods and training ask of it."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from flora.models.chat import Chat

Kind = Literal["image", "sequence_classification", "causal_lm", "image_text", "segmentation"]


@runtime_checkable
class ModelSpec(Protocol):
    """Any pretrained network: built by Hydra from ``configs/model``, cheap to make, without weights in memory.

    Attributes:
        name: the name in records.
        kind: ``image`` (an ImageSpec), ``sequence_classification`` or ``causal_lm`` (TextSpecs), ``image_text`` (an
            ImageTextSpec) or ``segmentation`` (heads over an ImageSpec's backbone, flora.models.feature_maps).
        classifier: names of the modules trained in full beside the adapter, the head; none for a language model.
        adapter_targets: what adapters adapt by default: ``all``, or names or a regular expression as PEFT reads them.
    """

    name: str
    kind: Kind
    adapter_targets: str | Sequence[str]

    @property
    def classifier(self) -> list[str]:
        """See above."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a record says of the weights, JSON-able: architecture, places, checksum."""

    def build(self, num_classes: int, drop_path: float = 0.0) -> nn.Module:
        """The network in float32 on the CPU, in training mode; a head is fresh, from torch's global seed.

        Args:
            num_classes: outputs of a classifier; language models have none.
            drop_path: largest probability of skipping a residual branch in training.

        Raises:
            ConfigError: a setting that does not fit.
            WeightsError: the weights are missing, damaged or those of another network.
        """

    def skeleton(self, num_classes: int | None = None) -> nn.Module:
        """The network on the meta device, without values, to count with; None: as many outputs as its weights have."""


@runtime_checkable
class TakesImages(Protocol):
    """How images enter a network.

    Attributes:
        mean: per-channel means of images in [0, 1].
        interpolation: how images are resized: ``nearest``, ``bilinear`` or ``bicubic``.
    """

    mean: tuple[float, ...]
    interpolation: str

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 images ``[N, 3, H, W]`` to the floats that the network takes, on their device."""


@runtime_checkable
class TakesText(Protocol):
    """How texts enter a network."""

    @property
    def max_length(self) -> int:
        """The longest text in tokens that the network has positions for."""

    def tokenizer(self) -> Any:
        """The tokenizer that belongs to the weights, as transformers loads it.

        Raises:
            ConfigError: no place is named, or its vocabulary is not the network's.
            WeightsError: it is missing or unreadable.
        """


@runtime_checkable
class ImageSpec(ModelSpec, TakesImages, Protocol):
    """A classifier of images, called with floats ``[N, 3, H, W]``; its outputs are logits ``[N, num_classes]``."""


@runtime_checkable
class TextSpec(ModelSpec, TakesText, Protocol):
    """A classifier of texts or a language model, called as transformers calls it."""


@runtime_checkable
class ImageTextSpec(ModelSpec, TakesImages, TakesText, Protocol):
    """A language model that sees, called as transformers calls it.

    Attributes:
        chat: how its conversations are written.
        image_tokens: how many tokens an image becomes.
        aspect: how images become squares: ``pad``, ``middle`` or ``squash``.
    """

    chat: Chat
    image_tokens: int
    aspect: str

    @property
    def image_id(self) -> int:
        """The token that stands for a piece of an image."""
