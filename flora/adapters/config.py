"""The configuration of a FLoRA adapter; the help strings of its fields are its documentation."""

import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

DEFAULT_SCALE = 1.0
INITS = ("orthogonal", "paper", "nlu", "llm", "hosvd")


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


FLORA = PeftMethod("FLORA")


@dataclass
class FloraConfig(PeftConfig):
    """Configuration of FLoRA: every targeted weight becomes W + scale * (G x_1 A_1 ... x_N A_N) (arXiv 2405.14739)."""

    r: int | list[int] = field(
        default=8,
        metadata={
            "help": "Rank of the channel modes (output and input). A list gives one rank per channel mode, or one per "
            "mode of the weight, in PyTorch's order: [out, in/groups, kernel...]. Ranks above what a weight can use "
            "are clipped, see clip_ranks."
        },
    )
    kernel_rank: int | list[int] = field(
        default=2,
        metadata={"help": "Rank of the kernel modes of convolutions; a list gives one rank per kernel mode."},
    )
    stack_rank: int | None = field(
        default=None,
        metadata={"help": "Rank of the modes that count parts: q/k/v, gates, experts. None keeps their full size."},
    )
    stack_modes: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Which modes of folded and bare parameters count parts. None: the leading mode of a fold and of a "
            "bare parameter of 3 or more modes. A dict maps regular expressions of names to lists."
        },
    )
    rank_pattern: dict[str, int | list[int]] = field(
        default_factory=dict,
        metadata={
            "help": "Ranks of single layers: regular expressions of their names -> r, or a list as for r. Entries are "
            "explicit: one above the size of its mode is an error, not clipped."
        },
    )
    clip_ranks: Literal["multilinear", "mode", "none"] = field(
        default="multilinear",
        metadata={
            "help": "Clip ranks to the mode size and the product of the other ranks (multilinear), to the mode size "
            "only (mode), or not at all (none). The last two exist to count layers as published."
        },
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
    init: Literal["orthogonal", "paper", "nlu", "llm", "hosvd"] = field(
        default="orthogonal",
        metadata={
            "help": "How factors start; the core starts at zero, so the update is zero. orthogonal: orthonormal "
            "columns. paper: normal, std sqrt(0.5 / r) (FLoRA repository). nlu: normal, std 0.02 (Subspace-Tuning, "
            "loralib). llm: uniform in +-1/sqrt(fan-in) (Subspace-Tuning, commonsense). hosvd: leading subspaces of "
            "the pretrained weight. nlu and llm are published for matrices; beyond two modes they are our extension."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "False also draws the core at random, so the update is not zero: for tests only."},
    )
    flora_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Dropout on the adapter's input while training. Needs a layer whose op is known: bare, recurrent "
            "and attention weights reject it."
        },
    )
    forward: Literal["auto", "factored", "merged"] = field(
        default="auto",
        metadata={
            "help": "factored: the input passes factor, core, factor. merged: one op with W + update. Same result; "
            "auto takes the cheaper. Layers without a factored form (grouped convolutions among them) run merged."
        },
    )
    fold_pattern: dict[str, list[int]] = field(
        default_factory=dict,
        metadata={
            "help": "Weights to see with more modes: regular expressions of names -> shape, e.g. a fused "
            "qkv weight [3d, d] as {'qkv': [3, -1, 768]}. -1 stands for one inferred size."
        },
    )
    use_dora: bool = field(
        default=False,
        metadata={
            "help": "Weight-decomposed FLoRA: a trained magnitude per output multiplies the normalised W + update "
            "(DoRA, arXiv 2402.09353); the norm is detached from the gradient."
        },
    )
    bias: str = field(
        default="none",
        metadata={"help": "Biases to train: 'none', 'all', or 'flora_only' (those of the adapted layers)."},
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the modules to adapt: full names or endings, a regular expression (str), or 'all-linear'."
        },
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Names (full or endings) of bare parameters of 2 to 6 modes to adapt, e.g. MoE experts."},
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
        self.peft_type = FLORA
        for name in FloraConfig.__annotations__:
            setattr(self, name, _plain(getattr(self, name)))
        self._check_patterns()
        self._check_names()
        self._check_ranks()
        self._check_scale()
        self._check_choices()
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern: needs layers_to_transform, the indices to adapt")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform: needs target_modules as a list of names, not a regular expression")

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "fold_pattern", "scale_pattern", "alpha_pattern"):
            patterns = getattr(self, name)
            setattr(self, name, {} if patterns is None else patterns)
            _check_patterns(name, getattr(self, name))
        if isinstance(self.stack_modes, dict):
            _check_patterns("stack_modes", self.stack_modes)

    def _check_names(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str) or _holds(value, str)):
                raise ValueError(f"{name}: must be a name, a list of names or None, got {value!r}")
            setattr(self, name, set(value) if isinstance(value, list) and name != "layers_pattern" else value)
        for name in ("target_parameters", "modules_to_save"):
            value = getattr(self, name)
            if not (value is None or _holds(value, str)):
                raise ValueError(f"{name}: must be a list of names or None, got {value!r}")
            setattr(self, name, sorted(value) if isinstance(value, set) else value)  # PEFT extends modules_to_save
        layers = self.layers_to_transform
        if not (layers is None or _is_integer(layers) or _holds(layers, int)):
            raise ValueError(f"layers_to_transform: must be an integer, a list of them or None, got {layers!r}")

    def _check_ranks(self) -> None:
        _check_rank("r", self.r)
        _check_rank("kernel_rank", self.kernel_rank)
        if self.stack_rank is not None and not (_is_integer(self.stack_rank) and self.stack_rank > 0):
            raise ValueError(f"stack_rank: must be one positive integer or None, got {self.stack_rank!r}")
        for pattern, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{pattern!r}]", rank)
        for pattern, sizes in self.fold_pattern.items():
            valid = _holds(sizes, int) and isinstance(sizes, list) and all(size > 0 or size == -1 for size in sizes)
            if not valid or sizes.count(-1) > 1 or not 2 <= len(sizes) <= 6:
                raise ValueError(
                    f"fold_pattern[{pattern!r}]: must be 2 to 6 positive sizes, at most one of them -1, got {sizes!r}"
                )
        stack = self.stack_modes
        for modes in stack.values() if isinstance(stack, dict) else [] if stack is None else [stack]:
            if not _holds(modes, int):
                raise ValueError(f"stack_modes: must be a list of modes, a dict of such lists or None, got {stack!r}")

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
            if value is not None and not (_is_number(value) and math.isfinite(value)):
                raise ValueError(f"{name}: must be a finite number, got {value!r}")

    def _check_choices(self) -> None:
        for name in ("rank_stabilized", "init_weights", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: must be True or False, got {getattr(self, name)!r}")
        _check_choice("init", self.init, INITS)
        _check_choice("forward", self.forward, ("auto", "factored", "merged"))
        _check_choice("clip_ranks", self.clip_ranks, ("multilinear", "mode", "none"))
        _check_choice("bias", self.bias, ("none", "all", "flora_only"))
        if not _is_number(self.flora_dropout) or not 0 <= self.flora_dropout < 1:
            raise ValueError(f"flora_dropout: must be at least 0 and below 1, got {self.flora_dropout!r}")
        if self.use_dora and self.forward == "factored":
            raise ValueError("forward: use_dora rescales the whole weight and has no factored form; use auto or merged")
        if self.use_dora and self.flora_dropout:
            raise ValueError("flora_dropout: use_dora rescales the whole weight, which excludes dropout on its input")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values; sets become sorted lists, so that files can be compared."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}

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
        return {_plain(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(one) for one in value]
    return set(value) if isinstance(value, Set) else value


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or isinstance(value, float)


def _holds(value: object, kind: type) -> bool:
    """Whether a value is a list or a set of one kind, in which True and False are no integers."""
    return isinstance(value, list | set) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)


def _check_rank(name: str, rank: object) -> None:
    ranks = rank if isinstance(rank, list) else [rank]
    if not ranks or not all(_is_integer(r) and r > 0 for r in ranks):
        raise ValueError(f"{name}: must be a positive integer or a list of them, got {rank!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: must be one of {', '.join(choices)}, got {value!r}")


def _check_patterns(name: str, patterns: object) -> None:
    if not isinstance(patterns, dict) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{name}: must be a dict whose keys are regular expressions, got {patterns!r}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}[{pattern!r}]: not a regular expression ({error})") from None
