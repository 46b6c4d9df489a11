"""The published FLoRA layers, written from the paper's formulas: references for the converters."""

import torch
from torch import Tensor, nn


class PublishedLayer(nn.Module):
    """Update of one layer of the paper's repository: modes [in, out, kernel...], a constant scale, all modes factored.

    delta = scale * (G x_1 A_1 ... x_N A_N), with its first two modes swapped for PyTorch's layout (paper/method.md,
    Update rule and Shapes).
    """

    def __init__(self, weight: Tensor, ranks: list[int], scale: float):
        super().__init__()
        sizes = [weight.shape[1], weight.shape[0], *weight.shape[2:]]
        self.scale = scale
        self.param_G = nn.Parameter(torch.randn(ranks))
        for mode, (size, rank) in enumerate(zip(sizes, ranks, strict=True)):
            self.register_parameter(f"param_{mode}", nn.Parameter(torch.randn(size, rank)))

    def delta(self) -> Tensor:
        letters = "abcde"[: self.param_G.dim()]
        terms = ",".join(f"{letter.upper()}{letter}" for letter in letters)
        factors = [getattr(self, f"param_{mode}") for mode in range(len(letters))]
        output = letters.upper()
        output = output[1] + output[0] + output[2:]
        return self.scale * torch.einsum(f"{letters},{terms}->{output}", self.param_G, *factors)


class PublishedModel(nn.Module):
    """A model whose layers carry published updates, saved under the names of the paper's repository."""

    def __init__(self, model: nn.Module, ranks: dict[str, list[int]], scale: float):
        super().__init__()
        self.model = model
        for name, rank in ranks.items():
            layer = model.get_submodule(name)
            layer.add_module("flora_layer", PublishedLayer(layer.weight, rank, scale))

    def checkpoint(self) -> dict[str, Tensor]:
        return {key: value for key, value in self.state_dict().items() if ".flora_layer." in key}
