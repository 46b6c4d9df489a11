"""FLoRA as its three codes start and scale it: deviations, zero updates and scales against numbers by hand."""

import copy

import pytest
import torch
from torch import nn

from flora.results import cells
from tests.methods.small import method


class Wide(nn.Module):
    """Layers wide enough to measure a deviation: a linear layer and a convolution."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv, self.head = nn.Linear(3000, 2000), nn.Conv2d(1000, 2000, 3), nn.Linear(2, 2)


def adapted(name, *overrides):
    torch.manual_seed(0)
    return method(name, *overrides).apply(Wide(), ["head"]).model.base_model.model


def factors(layer):
    return [f.detach() for f in layer.tucker_factors["default"].values() if max(f.shape) >= 1000]


# name, r -> scale, deviation of each large factor. r = 4: sqrt(0.5 / 4) = 0.3536; r = 16: 0.1768. Uniform within b has
# deviation b / sqrt(3): for a linear layer B [out, r] b = 1 / sqrt(r), for A [r, in] b = 1 / sqrt(in).
OUTPUT = {4: 0.2887, 16: 0.1443}  # 1 / sqrt(3 r)
PRESETS = [
    ("flora_published", 4, 4.0, [0.3536, 0.3536], [0.3536, 0.3536]),
    ("flora_published", 16, 4.0, [0.1768, 0.1768], [0.1768, 0.1768]),
    ("flora_published_nlu", 4, 2.0, [0.02, 0.02], [0.02, 0.02]),
    ("flora_published_nlu", 16, 2.0, [0.02, 0.02], [0.02, 0.02]),
    (
        "flora_published_llm",
        4,
        2.0,
        [OUTPUT[4], 0.01054],
        [OUTPUT[4], 0.01826],
    ),  # 1 / sqrt(3 x 3000), 1 / sqrt(3 x 1000)
    ("flora_published_llm", 16, 2.0, [OUTPUT[16], 0.01054], [OUTPUT[16], 0.01826]),
]


@pytest.mark.parametrize(("name", "rank", "scale", "linear", "conv"), PRESETS)
def test_deviation_zero_update_and_scale(name, rank, scale, linear, conv):
    model = adapted(name, f"adapter.r={rank}")
    for layer, deviations in ((model.linear, linear), (model.conv, conv)):
        found = factors(layer)
        assert [f.shape[1] for f in found] == [rank, rank]
        assert [f.std().item() for f in found] == pytest.approx(deviations, rel=0.03)
        assert all(abs(f.mean().item()) < 0.03 * f.std().item() + 1e-4 for f in found)
        assert layer.scaling["default"] == scale
        assert layer.get_delta_weight("default").count_nonzero() == 0


def test_only_the_core_is_zero_so_that_only_it_learns_at_first():
    layer = adapted("flora_published", "adapter.r=4").linear
    layer(torch.randn(2, 3000)).sum().backward()
    (core,) = layer.tucker_core["default"].values()
    assert core.count_nonzero() == 0
    assert core.grad.norm() > 0
    assert all(f.grad.norm() == 0 for f in layer.tucker_factors["default"].values())


def test_the_kernel_modes_have_the_deviation_of_their_own_rank():
    """sqrt(0.5 / 2) for kernel rank 2, over the 3 x 2 entries of many layers."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(200)), nn.Linear(2, 2))
    model = method("flora_published", "adapter.r=4").apply(layers, [str(len(layers) - 1)]).model
    kernel = [p.flatten() for n, p in model.named_parameters() if "tucker_factors" in n and p.shape == (3, 2)]
    assert len(kernel) == 400
    assert torch.cat(kernel).std().item() == pytest.approx(0.5, rel=0.05)


def test_alpha_over_r_with_a_recipes_alpha():
    for name in ("flora_published_nlu", "flora_published_llm"):
        model = adapted(name, "adapter.r=4", "adapter_defaults.alpha=32")
        assert (model.linear.scaling["default"], model.conv.scaling["default"]) == (8.0, 8.0)


def test_the_commonsense_code_drops_out_and_starts_as_the_base_model():
    base = Wide()
    x = torch.randn(2, 3000)
    model = method("flora_published_llm").apply(copy.deepcopy(base), ["head"]).model.base_model.model
    assert model.linear.drops("default") or model.linear.flora_dropout is not None
    torch.testing.assert_close(model.linear(x), base.linear(x))


@pytest.mark.parametrize(
    ("table", "preset"),
    [
        ("table1_convnext", "flora_published"),
        ("table3_glue", "flora_published_nlu"),
        ("commonsense", "flora_published_llm"),
    ],
)
def test_the_papers_cells_show_it_beside_ours(table, preset):
    def of(name):
        of_method = [c for c in cells.load(table, "paper").cells if c.method == name]
        return {(c.published, tuple(o for o in c.overrides if not o.startswith("adapter="))) for c in of_method}

    assert of(preset) == of("flora") != set()
