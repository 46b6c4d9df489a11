"""FLoRA of matrices: linear layers (also transformers' Conv1D) and embeddings."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from flora.adapters.config import FloraConfig
from flora.adapters.cost import Work, factored_is_cheaper
from flora.adapters.layer import FloraLayer
from flora.adapters.tucker import to_tensor
from flora.replaced import passes
from flora.replaced.bases import stored, unpacks
from flora.replaced.layer import Form
from flora.replaced.linear import ReplacedLinear, runs_plain_op
from flora.replaced.precision import compute_dtype
from flora.replaced.weights import AdaptedWeight, plain


class _Matrix(FloraLayer):
    """A layer with one weight matrix, whose update is a product of two thin matrices."""

    def matrices(self, adapter: str, core_side: str) -> tuple[Tensor, Tensor]:
        """Thin matrices L (rows x k) and R (k x columns) with L R = update, the core multiplied into one side.

        Args:
            adapter: its name.
            core_side: ``rows`` or ``columns``, the side to take the core; the other has one mode.
        """
        described = self.weights[adapter]["weight"]
        split = _split(described)
        (other,) = range(split, len(described.shape)) if core_side == "rows" else range(split)
        core = self.core(adapter) * self.scaling[adapter]
        factors = self.factors(adapter)
        single = factors[other]
        factors[other] = None
        without_core = core.new_ones(1, 1) if single is None else single
        with_core = to_tensor(core, factors)
        if core_side == "rows":
            return with_core.reshape(described.weight_shape[0], -1), without_core.T
        return without_core, with_core.reshape(-1, described.weight_shape[1])

    def core_side(self, adapter: str) -> str:
        """The side that takes the core: the only one that can, else the smaller."""
        described = self.weights[adapter]["weight"]
        split = _split(described)
        if split != 1:
            return "rows"
        if len(described.shape) - split != 1:
            return "columns"
        return "rows" if described.weight_shape[0] < described.weight_shape[1] else "columns"

    def has_thin_matrices(self, adapter: str) -> bool:
        """Whether the update is a product of two thin matrices: no fold has several modes on both sides."""
        described = self.weights[adapter]["weight"]
        split = _split(described)
        return split > 0 and 1 in (split, len(described.shape) - split)


def _split(described: AdaptedWeight) -> int:
    """Number of leading modes that make up the rows of the matrix; 0 if no boundary of modes falls there."""
    size = 1
    for mode, mode_size in enumerate(described.shape):
        size *= mode_size
        if size == described.weight_shape[0]:
            return mode + 1 if mode + 1 < len(described.shape) else 0
    return 0


class Linear(_Matrix, ReplacedLinear):
    """A linear layer: nn.Linear (weight [out, in]) or transformers' Conv1D (weight [in, out])."""

    @property
    @override
    def stackable(self) -> bool:  # type: ignore[override]
        base = self.get_base_layer()
        return runs_plain_op(base, nn.Linear) or runs_plain_op(base, Conv1D)

    @override
    def thin_matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        return self.matrices(adapter, self.core_side(adapter))

    @override
    def form_apart(self, adapter_name: str) -> Form | None:
        return super().form_apart(adapter_name) if self.has_thin_matrices(adapter_name) else None

    @override
    def cheaper_form(self, adapter_name: str) -> Form:
        described, ranks = self.weights[adapter_name]["weight"], self.effective_ranks[adapter_name]["weight"]
        weight = stored(self.get_base_layer(), "weight")
        rows, columns = described.weight_shape
        work = Work(columns, rows, min(ranks), min(ranks))
        return "factored" if factored_is_cheaper(work, weight.device.type, compute_dtype(weight)) else "merged"

    @override
    def thin_core_side(self, adapter_name: str) -> str | None:
        described, factors = self.weights[adapter_name]["weight"], self.tucker_factors[adapter_name]
        alike = not described.folded and len(factors) == len(described.shape) == 2
        return self.core_side(adapter_name) if alike and self.runs_fused(adapter_name) else None

    @override
    def run_prepared(self, shared: Any, prepared: Any, *args: Any, **kwargs: Any) -> Tensor:
        dtype = prepared["weight"].dtype if isinstance(prepared, dict) else prepared[0].dtype
        base: Any = self._modules["base_layer"]  # past nn.Module's attribute lookup
        plain_input = len(args) == 1 and not kwargs
        if plain_input:
            args = (shared.converted(args[0], dtype),)
        if isinstance(prepared, dict):
            return super().run_prepared(shared, prepared, *args, **kwargs)
        if plain_input and passes.converts(args[0], dtype) and runs_plain_op(base, nn.Linear):
            return shared.linear_plus_thin(base, args[0], *prepared, dtype)
        return super().run_apart(self._present(self.active_adapters), *args, **kwargs)


class Embedding(_Matrix):
    """An embedding: a true [vocabulary, dimension] update, of which only the rows in use are computed."""

    takes_adapter_names = True

    @override
    def describe_weights(self, config: FloraConfig, name: str) -> list[AdaptedWeight]:
        base = self.get_base_layer()  # which may store a quantised weight in another shape
        shape = (base.num_embeddings, base.embedding_dim)
        return [plain("weight", shape, ("channel", "channel"), output_dim=1)]

    @override
    def form_apart(self, adapter_name: str) -> Form | None:
        base = self.get_base_layer()
        # max_norm renormalises rows of the sum, scale_grad_by_freq divides gradients of its rows; scaled embeddings
        # multiply it by a constant, which can be applied here.
        op_known = type(base).forward is nn.Embedding.forward or self._embed_scale() is not None
        op_known = op_known or unpacks(base, "weight")
        a_sum = base.max_norm is None and not base.scale_grad_by_freq
        return "factored" if op_known and a_sum and self.has_thin_matrices(adapter_name) else None

    @override
    def cheaper_form(self, adapter_name: str) -> Form:
        return "factored"  # only the rows in use are computed

    @override
    def delta_output(self, adapter_name: str, input: Tensor) -> Tensor:
        base = self.get_base_layer()
        side = "columns" if _split(self.weights[adapter_name]["weight"]) == 1 else "rows"
        left, right = self.matrices(adapter_name, side)
        output = self.drop(adapter_name, F.embedding(input, left)) @ right
        if base.padding_idx is not None:  # its row is not trained, nor by it what it shares with others
            output = torch.where((input == base.padding_idx).unsqueeze(-1), output.detach(), output)
        scale = self._embed_scale()
        return output if scale is None else output * torch.as_tensor(scale, dtype=output.dtype, device=output.device)

    def _embed_scale(self) -> Any:
        """The constant that a scaled embedding (Gemma's, Bart's) multiplies its rows by; ``None`` for all others."""
        scale = getattr(self.get_base_layer(), "embed_scale", None)
        return None if isinstance(scale, Tensor) and scale.numel() != 1 else scale
