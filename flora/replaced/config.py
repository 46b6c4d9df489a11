"""The base of configurations: what FLoRA and the methods beside it have in common, and the checks of its fields."""

import dataclasses
import math
import re
import textwrap
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeGuard, TypeVar

import numpy as np
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

DEFAULT_SCALE = 1.0
IMPORT = "import flora"
LOADING = f"""## Loading this adapter

PEFT knows its method, {{method}}, once the package `flora` is imported; without that, loading ends with
`KeyError: '{{method}}'`. Install its distribution, `flora-peft` (in a clone of its repository: `pip install .`; the
package index's `flora` is another project), then:

```python
{IMPORT}  # registers its methods with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder")
```
"""


class PeftMethod(str):
    """Name of a method that PEFT's ``PeftType`` enum does not list, with the attributes PEFT reads from the enum."""

    @property
    def value(self) -> str:
        """The bare name."""
        return str.__str__(self)

    @property
    def name(self) -> str:
        """The bare name."""
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)


Config = TypeVar("Config", bound=type[PeftConfig])


def documented(kind: Config) -> Config:
    """Let ``help`` of a configuration show its fields: their defaults and the help strings that PEFT has them carry."""
    plumbing = {own.name for own in dataclasses.fields(PeftConfig)}
    lines = [kind.__doc__ or "", "", "Args:"]
    for own in sorted(dataclasses.fields(kind), key=lambda own: own.name in plumbing):
        default = own.default_factory() if callable(own.default_factory) else own.default
        text = f"{own.name} (default {default!r}): {own.metadata.get('help', '')}"
        lines += textwrap.wrap(text, 100, initial_indent="    ", subsequent_indent="        ", break_on_hyphens=False)
    kind.__doc__ = "\n".join(lines)
    return kind


@dataclass
class ReplacedConfig(PeftConfig):
    """Configuration of a method whose layers run with W + scale * update.

    Attributes:
        method: name of the method among PEFT's.
        use_dora: whether layers have a magnitude per output; a field of the methods that know it.
        forward: the form asked for: auto, factored or merged; a field of FLoRA.
        shares_factors: whether layers share parameters, so that no layer's rank can be set by itself.
    """

    method: ClassVar[PeftMethod]
    shares_factors: ClassVar[bool] = False
    use_dora = False
    forward = "auto"
    _patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "scale_pattern", "alpha_pattern")
    _lists: ClassVar[tuple[str, ...]] = ("modules_to_save",)
    _flags: ClassVar[tuple[str, ...]] = ("rank_stabilized", "use_dora")

    r: int | list[int] = field(default=8, metadata={"help": "Rank of the update."})
    rank_pattern: dict[str, int | list[int]] = field(
        default_factory=dict,
        metadata={"help": "Ranks of single layers: regular expressions of their names -> r."},
    )
    scale: float | None = field(
        default=None,
        metadata={
            "help": "Constant that multiplies the update, as in the paper's repository. Excludes alpha; "
            f"{DEFAULT_SCALE} if neither is given."
        },
    )
    scale_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Scales of single layers: regular expressions of their names -> scale."},
    )
    alpha: float | None = field(
        default=None,
        metadata={
            "help": "Sets the scale to alpha / r, as in the published NLP code; r is the configured rank before "
            "clipping (the geometric mean of the channel ranks if it is a list). Excludes scale."
        },
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Alphas of single layers: regular expressions of their names -> alpha."},
    )
    rank_stabilized: bool = field(default=False, metadata={"help": "Use alpha / sqrt(r) instead of alpha / r."})
    bias: str = field(
        default="none",
        metadata={"help": "Biases to train: 'none', 'all', or 'flora_only' (those of the adapted layers)."},
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the modules to adapt: full names or endings, a regular expression (str), 'all' (every "
            "layer of a kind that the method adapts, but for the head and modules_to_save), or 'all-linear' (linear "
            "layers, but for the output layer of a transformers model)."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": "Names (full or endings), or a regular expression, of modules to leave alone."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt; all others are left alone."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list of layers that layers_to_transform counts in, e.g. 'layers' or 'h'."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules besides the adapter to train fully and save with it, e.g. a new head."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method
        inherited = {own.name for own in dataclasses.fields(PeftConfig)}
        for own in dataclasses.fields(self):
            if own.name not in inherited:
                setattr(self, own.name, _plain(getattr(self, own.name)))
        for name in self._patterns:
            patterns = getattr(self, name)
            setattr(self, name, {} if patterns is None else patterns)
            check_patterns(name, getattr(self, name))
        self._check_names()
        self._check_ranks()
        self._check_scale()
        self._check_choices()
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern: needs layers_to_transform, the indices to adapt")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform: needs target_modules as a list of names, not a regular expression")

    def _check_names(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str) or holds(value, str)):
                raise ValueError(f"{name}: must be a name, a list of names or None, got {value!r}")
            setattr(self, name, set(value) if isinstance(value, list) and name != "layers_pattern" else value)
        for name in self._lists:
            value = getattr(self, name)
            if not (value is None or holds(value, str)):
                raise ValueError(f"{name}: must be a list of names or None, got {value!r}")
            setattr(self, name, sorted(value) if isinstance(value, set) else value)  # PEFT extends modules_to_save
        layers = self.layers_to_transform
        if not (layers is None or is_integer(layers) or holds(layers, int)):
            raise ValueError(f"layers_to_transform: must be an integer, a list of them or None, got {layers!r}")

    def _check_ranks(self) -> None:
        check_rank("r", self.r)
        for pattern, rank in self.rank_pattern.items():
            check_rank(f"rank_pattern[{pattern!r}]", rank)

    def _check_scale(self) -> None:
        if self.alpha is None:
            if self.alpha_pattern:
                raise ValueError("alpha_pattern: needs alpha, which sets the scale of all other layers")
            if self.rank_stabilized:
                raise ValueError("rank_stabilized: needs alpha; a constant scale is not divided by the rank")
            self.scale = DEFAULT_SCALE if self.scale is None else self.scale
        elif self.scale is not None or self.scale_pattern:
            raise ValueError("scale: give either a scale (and scale_pattern) or alpha (and alpha_pattern), not both")
        values = {"scale": self.scale, "alpha": self.alpha}
        values |= {f"scale_pattern[{key!r}]": value for key, value in self.scale_pattern.items()}
        values |= {f"alpha_pattern[{key!r}]": value for key, value in self.alpha_pattern.items()}
        for name, value in values.items():
            if value is not None and not (is_number(value) and math.isfinite(value)):
                raise ValueError(f"{name}: must be a finite number, got {value!r}")
        if not any(values.values()) and not self.use_dora:  # whose magnitude is trained all the same
            name = "scale" if self.alpha is None else "alpha"
            raise ValueError(f"{name}: {values[name]!r} makes the update zero for good: give another number")

    def _check_choices(self) -> None:
        for name in self._flags:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: must be True or False, got {getattr(self, name)!r}")
        check_choice("bias", self.bias, ("none", "all", "flora_only"))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values; sets become sorted lists, so that files can be compared."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and into the folder's model card how to load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory, "README.md")  # PEFT has written one for the first adapter of a model
        text = card.read_text() if card.exists() else f"# {self.method.value} adapter\n"
        if IMPORT not in text:
            card.write_text(f"{text.rstrip()}\n\n{LOADING.format(method=self.method.value)}")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load adapter_config.json; refuses a folder whose weights are a pickle, which can run code when loaded."""
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        pickled, safe = folder / WEIGHTS_NAME, folder / SAFETENSORS_WEIGHTS_NAME
        if pickled.exists() and not safe.exists():
            raise ValueError(f"{pickled}: pickle checkpoints are refused; save the adapter as {safe.name}")
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


def _plain(value: Any) -> Any:
    """Tuples, numpy's numbers and OmegaConf's lists and dicts as what a saved configuration is read back as."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(entry) for entry in value]
    return set(value) if isinstance(value, Set) else value


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, which True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is an integer or a float."""
    return is_integer(value) or isinstance(value, float)


def holds(value: object, kind: type) -> bool:
    """Whether a value is a list or a set of one kind, in which True and False are no integers."""
    return isinstance(value, list | set) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)


def check_rank(name: str, rank: object) -> None:
    """Raise ValueError naming the field unless a value is a rank or a list of ranks."""
    ranks = rank if isinstance(rank, list) else [rank]
    if not ranks or not all(is_integer(r) and r > 0 for r in ranks):
        raise ValueError(f"{name}: must be a positive integer or a list of them, got {rank!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError naming the field unless a value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: must be one of {', '.join(choices)}, got {value!r}")


def check_patterns(name: str, patterns: object) -> None:
    """Raise ValueError naming the field unless patterns are a dict whose keys are regular expressions."""
    if not isinstance(patterns, dict) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{name}: must be a dict whose keys are regular expressions, got {patterns!r}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}[{pattern!r}]: not a regular expression ({error})") from None
