"""The two thin matrices of factored linear layers: same-shaped layers multiply their cores in with one product."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flora.adapters.layer import FloraLayer
from flora.replaced.precision import compute_dtype


@dataclass(frozen=True, eq=False)
class FactoredStack:
    """Linear layers of one shape, one set of ranks and one scale.

    Attributes:
        layers: n layers.
        adapter: the active adapter of all of them.
        core_side: ``rows`` or ``columns``, the matrix that takes the core.
        scale: factor of the update.
        dtype: of the matrices.
    """

    layers: tuple[FloraLayer, ...]
    adapter: str
    core_side: str
    scale: float
    dtype: torch.dtype

    def parameters(self) -> list[Tensor]:
        """Cores, factors of the rows, and factors of the columns."""
        cores = [layer.tucker_core[self.adapter]._parameters["weight"] for layer in self.layers]
        factors = [layer.tucker_factors[self.adapter]._parameters for layer in self.layers]
        return [*cores, *(modes["weight_0"] for modes in factors), *(modes["weight_1"] for modes in factors)]

    def matrices(self, core: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """L [n, d_out, k] and R [n, k, d_in] with L R = update, from stacked cores and factors."""
        if self.core_side == "rows":
            return self.scale * (rows @ core), columns.mT
        return rows, self.scale * (core @ columns.mT)

    def gradients(self, core: Tensor, rows: Tensor, columns: Tensor, left: Tensor, right: Tensor) -> list[Tensor]:
        """Gradients of cores and factors from those of L and R."""
        if self.core_side == "rows":
            left = self.scale * left
            return [rows.mT @ left, left @ core.mT, right.mT]
        right = self.scale * right
        return [right @ columns, left, right.mT @ core]


class FactoredPlan:
    """Stacks on one device whose adapters have one dtype."""

    def __init__(self, stacks: Sequence[FactoredStack]) -> None:
        self.stacks = list(stacks)

    def parameters(self) -> list[Tensor]:
        """What the adapters hold today, stack by stack."""
        return [parameter for stack in self.stacks for parameter in stack.parameters()]

    def split(self, parameters: Sequence[Tensor], flat: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per stack, cores [n, r_out, r_in] and factors [n, d, r], views of a flat buffer."""
        parts, start, place = [], 0, 0
        for stack in self.stacks:
            n, blocks = len(stack.layers), []
            for kind in range(3):
                shape = parameters[place + kind * n].shape
                size = n * shape.numel()
                blocks.append(flat[start : start + size].view(n, *shape))
                start += size
            parts.append((blocks[0], blocks[1], blocks[2]))
            place += 3 * n
        return parts

    def build(self, parameters: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """L and R of each layer, stack by stack; differentiable."""
        matrices, pairs = iter(_Build.apply(self, *parameters)), []
        for stack in self.stacks:
            lefts = [next(matrices) for _ in stack.layers]
            pairs += [(left, next(matrices)) for left in lefts]
        return pairs


class _Build(torch.autograd.Function):
    """Per stack all L, then all R."""

    @staticmethod
    def forward(ctx: Any, plan: FactoredPlan, *parameters: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(parameters[0].device.type, enabled=False):
            flat = torch._C._nn.flatten_dense_tensors(list(parameters))
            outputs: list[Tensor] = []
            for stack, blocks in zip(plan.stacks, plan.split(parameters, flat), strict=True):
                for matrices in stack.matrices(*blocks):
                    outputs += matrices.to(stack.dtype).unbind(0)
            ctx.plan, ctx.flat = plan, flat
            ctx.save_for_backward(*parameters)
            ctx.shapes = [output.shape for output in outputs]
            ctx.set_materialize_grads(False)
            return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *received: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, parameters = ctx.plan, ctx.saved_tensors
        like = next((gradient for gradient in received if gradient is not None), None)
        if like is None:
            return (None,) * len(ctx.needs_input_grad)
        gradients = [
            like.new_zeros(()).expand(shape) if gradient is None else gradient  # the pass did not use the layer
            for gradient, shape in zip(received, ctx.shapes, strict=True)
        ]
        twice = torch.is_grad_enabled()  # a gradient of this gradient is wanted
        with torch.autocast(gradients[0].device.type, enabled=False):
            flat = torch._C._nn.flatten_dense_tensors(list(parameters)) if twice else ctx.flat
            to_parameters, unused, place = [], [], 0
            for stack, blocks in zip(plan.stacks, plan.split(parameters, flat), strict=True):
                n = len(stack.layers)
                left, right = (
                    torch.stack(gradients[place : place + n]),
                    torch.stack(gradients[place + n : place + 2 * n]),
                )
                to_parameters += stack.gradients(*blocks, left.to(flat.dtype), right.to(flat.dtype))
                unused += [gradient is None for gradient in received[place : place + n]] * 3
                place += 2 * n
            together = torch._C._nn.flatten_dense_tensors(to_parameters)
            results = torch._C._nn.unflatten_dense_tensors(together, parameters)
            return None, *[None if skip else result for result, skip in zip(results, unused, strict=True)]


def factored_stacks(layers: Sequence[FloraLayer]) -> list[FactoredStack]:
    """Which of the layers have their thin matrices built together, as they stand now."""
    groups: dict[tuple[Any, ...], list[FloraLayer]] = {}
    for layer in layers:
        adapters = layer._present(layer.active_adapters)
        if layer.disable_adapters or layer.merged or len(adapters) != 1 or layer.form_for(adapters) == "merged":
            continue
        side = layer.thin_core_side(adapters[0])
        if side is None or isinstance(layer.scaling[adapters[0]], Tensor):
            continue
        core, weight = layer.core(adapters[0]), layer.base_weight("weight")
        key = (adapters[0], side, layer.scaling[adapters[0]], compute_dtype(weight))
        places = (weight.shape, core.shape, weight.device, core.device, core.dtype)
        groups.setdefault((key, *places), []).append(layer)
    return [FactoredStack(tuple(members), *key[0]) for key, members in groups.items()]
