"""A start from gradients: factors that span the directions along which a few batches want to move the weights.

For every adapted weight W and every mode n, the factor becomes the leading eigenvectors of

    C_n = sum over batches b of  unfold_n(dL_b/dW) unfold_n(dL_b/dW)^T,

which is the higher-order SVD (De Lathauwer et al., 2000) of the batches' gradients side by side. LoRA-GA (arXiv
2407.05000) and LoRA-One (ICML 2025) start the two factors of a matrix from its averaged gradient; here every mode of a
weight of any dimension has its own sum, the update stays zero and W is not touched. A gradient is seen once, when
autograd has it, and never kept: of modes up to ``EXACT`` the sum is kept, of larger ones a sketch from which the
Nyström method recovers it (Tropp et al., "Fixed-Rank Approximation of a Positive-Semidefinite Matrix from Streaming
Data", NeurIPS 2017).
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from flora.adapters.layer import FloraLayer
from flora.adapters.tucker import unfold
from flora.replaced import stand_in
from flora.replaced.precision import full_precision

EXACT = 1024  # the largest mode whose d x d sum is kept; a sketch of 4 r columns is smaller, and exact to about 1e-3


class UnusableGradient(ValueError):
    """The gradient of a weight is zero or not finite."""


class ModeSum:
    """The sum over gradients of their unfolding times its transpose, d x d, of one mode.

    Args:
        size: d.
        rank: how many eigenvectors are wanted.
        like: gives dtype and device.
    """

    def __init__(self, size: int, rank: int, like: Tensor) -> None:
        self.rank, self.energy = rank, like.new_zeros(())
        self.probe: Tensor | None = None
        columns = min(size, max(4 * rank, rank + 64))
        if size > EXACT and columns < size:
            # One for all processes, whatever their random numbers: what they add up belongs to one probe.
            drawn = torch.randn(size, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
            self.probe = torch.linalg.qr(drawn)[0].to(like)
        self.sum = like.new_zeros(size, size if self.probe is None else columns)

    def add(self, unfolded: Tensor) -> None:
        """Add one gradient, unfolded along the mode (d x rest)."""
        self.energy += unfolded.square().sum()
        if self.probe is None:
            self.sum.addmm_(unfolded, unfolded.T)
        else:
            self.sum.addmm_(unfolded, unfolded.T @ self.probe)

    def tensors(self) -> list[Tensor]:
        """What processes add up."""
        return [self.sum, self.energy]

    def leading(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (rank), largest first, and orthonormal eigenvectors (d x rank), both float64."""
        if self.probe is None:
            values, vectors = torch.linalg.eigh(self.sum.double())
            return values.flip(0)[: self.rank].clamp(min=0), vectors.flip(1)[:, : self.rank]
        product, probe = self.sum.double(), self.probe.double()
        middle = probe.T @ product
        values, vectors = torch.linalg.eigh((middle + middle.T) / 2)
        kept = values > values[-1] * len(probe) * torch.finfo(self.sum.dtype).eps
        left, singular, _ = torch.linalg.svd(product @ (vectors[:, kept] / values[kept].sqrt()), full_matrices=False)
        left, values = left[:, : self.rank], singular.square()[: self.rank]
        if missing := self.rank - left.shape[1]:  # the gradients have fewer directions
            left = torch.linalg.qr(torch.cat([left, probe[:, :missing]], dim=1))[0]
            values = torch.cat([values, values.new_zeros(missing)])
        return values, left


def mode_sums(
    model: nn.Module,
    weights: Mapping[nn.Parameter, Sequence[tuple[Sequence[int], Mapping[int, int]]]],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> dict[nn.Parameter, list[dict[int, ModeSum]]]:
    """Sums over the gradients of several batches, by weight, by how the weight is seen, and by mode.

    The model runs as in evaluation (no dropout, batch norm with its running statistics), with gradient checkpointing
    where that is enabled; what it trains, the gradients that it holds and its mode are left as they were. With several
    processes of ``torch.distributed`` each gives its own batches, and the sums are over all of them.

    Args:
        model: any network of which the weights are a part.
        weights: by parameter: shapes in which it is seen, each with the rank that is wanted of each mode.
        batches: of any kind.
        loss: of the model and a batch, a scalar.

    Raises:
        ValueError: there is no batch, a gradient is not finite, or no gradient reaches a weight.
    """
    sums: dict[nn.Parameter, list[dict[int, ModeSum]]] = {}
    for weight, seen in weights.items():
        like = torch.empty(0, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        sums[weight] = [{mode: ModeSum(shape[mode], r, like) for mode, r in ranks.items()} for shape, ranks in seen]

    def add(weight: Tensor) -> None:
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None
        gradient, weight.grad = weight.grad.detach(), None
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        with torch.no_grad(), full_precision(gradient.device):
            for (shape, _), by_mode in zip(weights[weight], sums[weight], strict=True):
                for mode, mode_sum in by_mode.items():
                    mode_sum.add(unfold(gradient.reshape(tuple(shape)), mode))

    count = 0
    with _gradients_of(model, weights, add), _checkpointed(model), torch.enable_grad():
        for batch in batches:
            loss(model, batch).backward()
            count += 1
    everything = [mode_sum for views in sums.values() for by_mode in views for mode_sum in by_mode.values()]
    if _several():
        for tensor in (tensor for mode_sum in everything for tensor in mode_sum.tensors()):
            torch.distributed.all_reduce(tensor)
    elif not count:
        raise ValueError("batches: there is none, and the gradient start needs gradients")
    names = {parameter: name for name, parameter in model.named_parameters()}
    for problem, bad in (
        ("is not finite in these batches: scale the loss or choose others", lambda e: not bool(torch.isfinite(e))),
        ("is zero in these batches: give more of them, or do not adapt it", lambda e: not bool(e)),
    ):
        for weight, views in sums.items():
            if any(bad(mode_sum.energy) for by_mode in views for mode_sum in by_mode.values()):
                raise UnusableGradient(f"the gradient of {names.get(weight, 'a weight')} {problem}")
    return sums


@contextlib.contextmanager
def _gradients_of(model: nn.Module, weights: Iterable[nn.Parameter], add: Callable[[Tensor], None]) -> Iterator[None]:
    """The model in evaluation mode, with gradients of these weights alone, each handed on as soon as it is whole."""
    weights = list(weights)
    parameters = {id(parameter): parameter for parameter in (*model.parameters(), *weights)}.values()
    trained = [(parameter, parameter.requires_grad) for parameter in parameters]
    held = [(weight, weight.grad) for weight in weights]
    modes = [(module, module.training) for module in model.modules()]
    hooks = []
    try:
        model.eval()
        for parameter, _ in trained:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(add))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight, gradient in held:
            weight.grad = gradient
        for parameter, was in trained:
            parameter.requires_grad_(was)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Layers that transformers checkpoints while training are checkpointed in evaluation mode too, without caches."""
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
    ]
    try:
        for layer in layers:
            layer.forward = functools.partial(_recomputed, layer.forward)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            del layer.forward


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A layer's forward pass that keeps its inputs alone; what fills a cache would fill it twice."""
    plain = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    if plain.get("use_cache"):
        plain["use_cache"] = False
    return checkpoint(functools.partial(forward, **plain), *args, use_reentrant=False)


def init_from_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    adapter_name: str = "default",
) -> dict[str, dict[int, float]]:
    """Start an adapter from the gradients of a few batches; its update stays exactly zero.

    Every factor but the one that is zero becomes the leading eigenvectors of its mode: with ``init="zero_output"``, the
    default, those of the input and kernel modes, with a zero core all of them. Factors as large as their mode span it
    already and stay. A fresh head should be trained a little first, since the gradients go through it. The base is not
    changed, so saving, loading and merging need nothing special. Nothing is drawn; the processes of
    ``torch.distributed`` share what they find.

        model = peft.get_peft_model(network, flora.FloraConfig(target_modules="all"))
        kept = flora.init_from_gradients(model, batches, lambda model, batch: model(**batch).loss)

    Args:
        model: with a FLoRA adapter that has not been trained.
        batches: any iterable; eight of the size of training suffice in most cases.
        loss: of the model and a batch, a scalar; ``None``: ``model(**batch).loss``, as in transformers.
        adapter_name: of the adapter.

    Returns:
        By weight and mode, the share of the gradients' squared norm that the factor keeps (0 to 1).

    Raises:
        ValueError: there is no such adapter, its update is not zero, a base weight is quantised, offloaded, sharded or
            computed, or a gradient is zero or not finite. The adapter is then as it was.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, FloraLayer) and adapter_name in layer.weights and layer.tied_source is None
    }
    if not layers:
        raise ValueError(f"adapter_name: the model has no FLoRA adapter {adapter_name!r}")
    views: dict[nn.Parameter, list[tuple[Sequence[int], dict[int, int]]]] = {}
    places: list[tuple[str, nn.Parameter, int, list[Tensor | None]]] = []
    for layer in layers.values():
        for name, weight in layer.weights[adapter_name].items():
            if not layer.is_tucker():
                raise ValueError(f"{layer.full_name(name)}: the update of {adapter_name!r} is not a Tucker form of W")
            if layer.merged or layer.get_delta_weight(adapter_name, name).any():
                raise ValueError(
                    f"{layer.full_name(name)}: the update of {adapter_name!r} is merged or not zero, so it has been "
                    "trained; start from gradients before training"
                )
            factors = [
                factor if factor is not None and factor.any() else None for factor in layer.factors(adapter_name, name)
            ]
            ranks = {n: f.shape[1] for n, f in enumerate(factors) if f is not None and f.shape[1] < f.shape[0]}
            parameter = _own_parameter(layer, name)
            views.setdefault(parameter, []).append((weight.shape, ranks))
            places.append((layer.full_name(name), parameter, len(views[parameter]) - 1, factors))
    sums = mode_sums(model, views, batches, loss or (lambda model, batch: model(**batch).loss))
    kept: dict[str, dict[int, float]] = {}
    for name, parameter, view, factors in places:
        kept[name] = {}
        for mode, mode_sum in sums[parameter][view].items():
            values, vectors = mode_sum.leading()
            factor = factors[mode]
            assert factor is not None
            factor.data.copy_(vectors)
            if _several():
                torch.distributed.broadcast(factor.data, 0)
            kept[name][mode] = min(1.0, float(values.sum() / mode_sum.energy))
    return kept


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _own_parameter(layer: FloraLayer, name: str) -> nn.Parameter:
    """The parameter that a base weight is, on whose gradient nothing else stands."""
    full, wanted = layer.full_name(name), "the gradient start needs a plain floating-point weight"
    if (kind := layer.quantised_as(name)) is not None:
        raise ValueError(f"{full} is quantised ({kind}): {wanted}; use another init")
    owner, attribute = stand_in.place(layer.get_base_layer(), name)
    parameter = owner._parameters.get(attribute)
    if parameter is None:
        raise ValueError(f"{full} is computed by a parametrization or a hook: {wanted}; use another init")
    if isinstance(parameter, DTensor) or parameter.is_meta or parameter.shape != layer.base_weight(name).shape:
        raise ValueError(f"{full} is sharded or offloaded: {wanted}; start before the model is spread out")
    return parameter
