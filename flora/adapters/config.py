"""The configuration of a FLoRA adapter; the help strings of its fields are its documentation."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from flora.replaced.config import (
    PeftMethod,
    ReplacedConfig,
    check_choice,
    check_patterns,
    check_rank,
    documented,
    holds,
    is_integer,
    is_number,
)

INITS = ("zero_output", "orthogonal", "paper", "nlu", "llm", "hosvd")
FLORA = PeftMethod("FLORA")


@documented
@dataclass
class FloraConfig(ReplacedConfig):
    """Configuration of FLoRA: every targeted weight becomes W + scale * (G x_1 A_1 ... x_N A_N) (arXiv 2405.14739)."""

    method: ClassVar[PeftMethod] = FLORA
    _patterns: ClassVar[tuple[str, ...]] = (*ReplacedConfig._patterns, "fold_pattern")
    _lists: ClassVar[tuple[str, ...]] = (*ReplacedConfig._lists, "target_parameters")
    _flags: ClassVar[tuple[str, ...]] = (*ReplacedConfig._flags, "init_weights", "ensure_weight_tying")

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
    init: Literal["zero_output", "orthogonal", "paper", "nlu", "llm", "hosvd"] = field(
        default="zero_output",
        metadata={
            "help": "How the adapter starts; its update is zero. zero_output: zero output factor, as LoRA's B, core "
            "with orthonormal rows along it, other factors with orthonormal columns; weights without an output mode "
            "(bare parameters, folds across it, a single output) start as orthogonal. All others have a zero core. "
            "orthogonal: factors with orthonormal columns. paper: normal, std sqrt(0.5 / r) (FLoRA repository). nlu: "
            "normal, std 0.02 (Subspace-Tuning, loralib). llm: uniform in +-1/sqrt(fan-in) (Subspace-Tuning, "
            "commonsense). hosvd: leading subspaces of the pretrained weight. nlu and llm are published for matrices; "
            "beyond two modes they are our extension."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "False also draws what is zero at random, so the update is not zero: for tests only."},
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
            "auto takes the cheaper. Asked for factored, layers without such products run dense (grouped convolutions "
            "and folds of convolutions: the update is built and applied by an op of its own) or merged (all others)."
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
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names (full or endings) of bare parameters of 2 to 6 modes to adapt, e.g. MoE experts. "
            "exclude_modules and layers_to_transform hold for them too."
        },
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Tokens whose embeddings to train besides the adapter, for a vocabulary that grew: indices of the "
            "input embedding, or a dict of names of embeddings to indices."
        },
    )
    ensure_weight_tying: bool = field(
        default=False,
        metadata={
            "help": "Where the model ties its output layer to the embedding: adapt (target_modules) or train "
            "(modules_to_save, trainable_token_indices) both ends with the same parameters."
        },
    )

    def _check_ranks(self) -> None:
        super()._check_ranks()
        check_rank("kernel_rank", self.kernel_rank)
        if self.stack_rank is not None and not (is_integer(self.stack_rank) and self.stack_rank > 0):
            raise ValueError(f"stack_rank: must be one positive integer or None, got {self.stack_rank!r}")
        if isinstance(self.stack_modes, dict):
            check_patterns("stack_modes", self.stack_modes)
        for pattern, sizes in self.fold_pattern.items():
            valid = holds(sizes, int) and isinstance(sizes, list) and all(size > 0 or size == -1 for size in sizes)
            if not valid or sizes.count(-1) > 1 or not 2 <= len(sizes) <= 6:
                raise ValueError(
                    f"fold_pattern[{pattern!r}]: must be 2 to 6 positive sizes, at most one of them -1, got {sizes!r}"
                )
        stack = self.stack_modes
        for modes in stack.values() if isinstance(stack, dict) else [] if stack is None else [stack]:
            if not holds(modes, int):
                raise ValueError(f"stack_modes: must be a list of modes, a dict of such lists or None, got {stack!r}")

    def _check_choices(self) -> None:
        super()._check_choices()
        if self.init == "gradient":
            raise ValueError(
                'init: "gradient" needs data: make the adapter with init="zero_output", then call '
                "flora.init_from_gradients(model, batches)"
            )
        check_choice("init", self.init, INITS)
        check_choice("forward", self.forward, ("auto", "factored", "merged"))
        tokens = self.trainable_token_indices
        for indices in tokens.values() if isinstance(tokens, dict) else [] if tokens is None else [tokens]:
            if not holds(indices, int) or not indices:
                raise ValueError(
                    "trainable_token_indices: must be a list of indices, a dict of names to such lists or None, "
                    f"got {tokens!r}"
                )
        check_choice("clip_ranks", self.clip_ranks, ("multilinear", "mode", "none"))
        if not is_number(self.flora_dropout) or not 0 <= self.flora_dropout < 1:
            raise ValueError(f"flora_dropout: must be at least 0 and below 1, got {self.flora_dropout!r}")
        if self.use_dora and self.forward == "factored":
            raise ValueError("forward: use_dora rescales the whole weight and has no factored form; use auto or merged")
        if self.use_dora and self.flora_dropout:
            raise ValueError("flora_dropout: use_dora rescales the whole weight, which excludes dropout on its input")
