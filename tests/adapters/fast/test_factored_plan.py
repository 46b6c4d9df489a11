"""Thin matrices of factored layers built together: the same numbers as layer by layer."""

import copy

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flora
from tests.adapters.fast.nets import assert_same, layer_by_layer, plans_of, together

pytestmark = pytest.mark.usefixtures("double")


class Net(nn.Module):
    """Two wide and two tall layers: the core goes to the rows of the first, and to the columns of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ModuleList(nn.Linear(9, 5) for _ in range(2))
        self.tall = nn.ModuleList(nn.Linear(5, 9, bias=False) for _ in range(2))
        self.checkpointing: bool | None = None  # use_reentrant, or None for no checkpoints

    def block(self, x: Tensor, i: int) -> Tensor:
        return torch.tanh(self.tall[i](torch.tanh(self.wide[i](x))))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            if self.checkpointing is None:
                x = self.block(x, i)
            else:
                x = checkpoint(self.block, x, i, use_reentrant=self.checkpointing)
        return x


def adapted(**settings) -> peft.PeftModel:
    settings = {"target_modules": r"(wide|tall)\.\d", "r": [3, 2], "scale": 0.7, "forward": "factored"} | settings
    torch.manual_seed(2)
    return together(peft.get_peft_model(Net(), flora.FloraConfig(init_weights=False, **settings)))


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 3, 9)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_outputs_and_gradients_added_up_over_batches_are_those_of_layer_by_layer(x, reentrant):
    model = adapted()
    alone = layer_by_layer(model)
    model.base_model.model.checkpointing = reentrant
    x.requires_grad_()
    torch.testing.assert_close(model(x), alone(x))
    for part in x.split(2):
        ours, expected = gradients(model, part), gradients(alone, part)
    assert_same(ours, expected)
    if reentrant is None:
        (plan,) = plans_of(model)
        assert [len(stack.layers) for stack in plan.stacks] == [2, 2]
        assert {stack.core_side for stack in plan.stacks} == {"rows", "columns"}


def test_new_parameters_are_seen_and_a_gradient_can_be_differentiated_again(x):
    model = adapted()
    model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    second = []
    for each in (model, layer_by_layer(model)):
        parameters = [p for p in each.parameters() if p.requires_grad]
        first = torch.autograd.grad(each(x).square().sum(), parameters, create_graph=True)
        twice = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
        second.append(dict(enumerate(twice)))
    assert_same(*second)


def test_the_update_is_that_of_the_factors(x):
    model = adapted()
    dense = copy.deepcopy(model.base_model.model)
    for name in ("wide", "tall"):
        for i in range(2):
            layer = getattr(model.base_model.model, name)[i]
            core, a, b = layer.core("default"), *layer.factors("default")
            base = copy.deepcopy(layer.base_layer)
            base.weight.data += 0.7 * torch.einsum("ij,oi,cj->oc", core, a, b)
            getattr(dense, name)[i] = base
    torch.testing.assert_close(model(x), dense(x))


def test_dropout_leaves_layers_alone_while_it_acts(x):
    model = adapted(flora_dropout=0.5)
    model(x)
    assert not plans_of(model)
    torch.testing.assert_close(model.eval()(x), layer_by_layer(model)(x))
    assert len(plans_of(model)) == 1
