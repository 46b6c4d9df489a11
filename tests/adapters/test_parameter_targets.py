"""Which bare parameters are adapted, what is refused, and what writing to an adapted parameter does."""

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

import flora

from . import by_hand


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w.sum(0))


class Block(nn.Module):
    """Experts as one tensor, and as a list of modules: then an index follows that of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = nn.ModuleList([Experts(), Experts()])
        self.fused = Experts()
        self.mixes = nn.ParameterList([nn.Parameter(torch.randn(5, 5)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for expert in self.mlp.experts:
            x = expert(x)
        return self.fused(x) @ self.mixes[0] @ self.mixes[1]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(4)])
        self.position = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        for layer in self.layers:
            x = layer(x)
        return x


class Whole(nn.Module):
    """What transformers' models look like: the layers are below ``model``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def adapt(net: nn.Module, *parameters: str, **settings: Any) -> peft.PeftModel:
    config = flora.FloraConfig(target_parameters=list(parameters) or None, r=2, init_weights=False, **settings)
    return peft.get_peft_model(net, config)


def adapted(model: peft.PeftModel, adapter: str = "default") -> set[str]:
    return set(by_hand.updates(model, adapter))


# ---------------------------------------------------------------------- layers and exclusions


@pytest.mark.parametrize("root", ["", "model."])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layers_to_transform": [3]}, {3}),
        ({"layers_to_transform": 1}, {1}),
        ({"layers_to_transform": [0, 2], "layers_pattern": "layers"}, {0, 2}),
        ({"layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]}, {1}),
        ({"layers_to_transform": [1], "layers_pattern": "blocks"}, set()),
        ({"layers_to_transform": []}, {0, 1, 2, 3}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_only_the_layers_to_transform_are_adapted(root, settings, expected):
    net = Whole() if root else Net()
    names = [f"layers.{i}." for i in expected]
    wanted = {
        root + name + own
        for name in names
        for own in ("mlp.experts.0.w", "mlp.experts.1.w", "fused.w", "mixes.0", "mixes.1")
    }
    if not wanted:
        with pytest.raises(ValueError, match="no `target_parameters` found"):
            adapt(net, "w", "mixes.0", "mixes.1", "position", **settings)
        return
    if "layers_to_transform" not in settings or settings["layers_to_transform"] == []:
        wanted.add(f"{root}position")
    assert adapted(adapt(net, "w", "mixes.0", "mixes.1", "position", **settings)) == wanted


def test_layers_count_for_modules_and_parameters_alike():
    settings = {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["layers"]}
    net = Net()
    for layer in net.layers:
        layer.q = nn.Linear(5, 5)
    model = adapt(net, "fused.w", **settings)
    assert set(model.base_model.effective_ranks()) == {"layers.1.q", "layers.1.fused.w"}


@pytest.mark.parametrize("excluded", [["layers.0.fused", "layers.3.fused"], r"layers\.[03]\.fused"])
def test_excluded_owners_are_left_alone(excluded):
    model = adapt(Net(), "fused.w", exclude_modules=excluded)
    assert adapted(model) == {"layers.1.fused.w", "layers.2.fused.w"}


# ---------------------------------------------------------------------- what is refused, and leaves all as it was


def assert_untouched(model: nn.Module, before: dict[str, Tensor], kinds: list[type], x: Tensor, output: Tensor) -> None:
    assert [type(module) for module in model.modules()] == kinds
    assert model.state_dict().keys() == before.keys()
    torch.testing.assert_close(model(x), output, rtol=0, atol=0)


def parametrised(net: Net) -> None:
    parametrizations.orthogonal(net.layers[1].fused, "w")


def with_hook(net: Net) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight_norm(net.layers[1].fused, "w")


def with_list(net: Net) -> None:
    class Listed(nn.ModuleList):
        def __init__(self) -> None:
            super().__init__([nn.Linear(5, 5)])
            self.w = nn.Parameter(torch.randn(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([module(x @ self.w) for module in self]).sum(0)

    net.layers[1].fused = Listed()


def with_script(net: Net) -> None:
    net.layers[1].fused = torch.jit.script(net.layers[1].fused)


def with_graph(net: Net) -> None:
    net.layers[1].fused = torch.fx.symbolic_trace(net.layers[1].fused)


def with_seven_modes(net: Net) -> None:
    net.layers[3].fused.w = nn.Parameter(torch.randn(2, 5, 5)[:, None, None, None, None])


REFUSED = {
    "a parametrization": (parametrised, r"target_parameters: layers.1.fused.w is no parameter: it is computed"),
    "a hook": (with_hook, r"target_parameters: layers.1.fused.w is no parameter: it is computed"),
    "a list of modules": (with_list, r"target_parameters: layers.1.fused.w belongs to a list of modules"),
    "TorchScript": (with_script, r"target_parameters: layers.1.fused.w belongs to a traced module"),
    "a graph": (with_graph, r"target_parameters: layers.1.fused.w belongs to a traced module"),
    "seven modes": (with_seven_modes, r"target_parameters: layers.3.fused.w has 7 modes; 2 to 6"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_and_the_model_left_as_it_was(case):
    change, message = REFUSED[case]
    net = Net()
    change(net)
    kinds, before = [type(module) for module in net.modules()], net.state_dict()
    with pytest.raises(ValueError, match=message):
        adapt(net, "w", "position")
    assert [type(module) for module in net.modules()] == kinds
    assert net.state_dict().keys() == before.keys()


def test_recurrent_layers_are_named_as_modules():
    with pytest.raises(ValueError, match=r"weight_ih_l0 belongs to a LSTM; name the LSTM in target_modules"):
        adapt(nn.Sequential(nn.LSTM(4, 5)), "weight_ih_l0")


SECOND = {
    "no match": ({"target_parameters": ["nothing"]}, "no `target_parameters` found"),
    "no layer": ({"target_parameters": ["w"], "layers_to_transform": [7]}, "no `target_parameters` found"),
    "wrong rank": ({"target_parameters": ["w", "position"], "rank_pattern": {"position": 9}}, "rank 9 for mode 0"),
    "new and old owners": ({"target_parameters": ["w", "mixes.1"], "rank_pattern": {"3.mixes.1": 9}}, "rank 9 for"),
}


@pytest.mark.parametrize("case", SECOND)
def test_a_second_adapter_that_fails_leaves_the_first_intact(case):
    settings, message = SECOND[case]
    model, x = adapt(Net(), "w"), torch.randn(2, 3, 5)
    expected, kinds = model(x), [type(module) for module in model.modules()]
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", flora.FloraConfig(**settings))
    assert set(model.peft_config) == {"default"}
    assert [type(module) for module in model.modules()] == kinds
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    assert torch.equal(model(x), expected)


def test_a_typo_in_a_second_adapter_is_a_warning():
    model = adapt(Net(), "w", "position")
    with pytest.warns(UserWarning, match="target_parameters: position match nothing"):
        model.add_adapter("second", flora.FloraConfig(target_parameters=["w", "position"], layers_to_transform=[1]))


def test_a_weight_is_adapted_through_its_module_or_its_name_in_either_order():
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
    model = adapt(net, "0.weight")
    with pytest.raises(ValueError, match=r"target_modules: 0 .*target_parameters.*name it once"):
        model.add_adapter("second", flora.FloraConfig(target_modules=["0"]))
    assert set(model.peft_config) == {"default"}


def test_tied_parameters_are_a_warning():
    net = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7, bias=False))
    net[1].weight = net[0].weight
    with pytest.warns(UserWarning, match=r"0.weight is tied to 1.weight, which the update does not reach"):
        adapt(net, "0.weight")


# ---------------------------------------------------------------------- writing to an adapted parameter


def double(parameter: Tensor) -> None:
    with torch.no_grad():
        parameter *= 2


WRITES = {
    "data.copy_": lambda w: w.data.copy_(torch.zeros(2, 5, 5)),
    "data of a part": lambda w: w.data[0].zero_(),
    "item": lambda w: w.__setitem__(0, 0.0),
    "part": lambda w: w[0].fill_(0),
    "detached": lambda w: w.detach().zero_(),
    "data": lambda w: setattr(w, "data", torch.zeros(2, 5, 5)),
    "in place": double,
    "init": nn.init.zeros_,
    "out": lambda w: torch.add(w, 1, out=w),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("during", [False, True])
def test_writes_are_refused_while_adapters_are_active_and_reach_the_base_else(write, during, monkeypatch):
    model, x = adapt(Net(), "fused.w"), torch.randn(2, 3, 5)
    owner, expected = model.base_model.model.layers[2].fused, model(x)
    if during:
        forward = Experts.forward
        monkeypatch.setattr(Experts, "forward", lambda self, x: (WRITES[write](self.w), forward(self, x))[1])
    with pytest.raises(RuntimeError, match=r"layers.2.fused.w: reads as W"):
        owner(x) if during else WRITES[write](owner.w)
    monkeypatch.undo()
    assert torch.equal(model(x), expected)
    with model.disable_adapter():
        before = owner.w.detach().clone()
        WRITES[write](owner.w)
        assert not torch.equal(owner.w, before)
    assert not torch.allclose(model(x), expected)


def test_what_is_computed_from_an_adapted_parameter_can_be_written_to():
    owner = adapt(Net(), "fused.w").base_model.model.layers[2].fused
    for made in (owner.w * 2, owner.w[torch.tensor([1, 0])], owner.w.sum(0), owner.w.clone()):
        expected = made.detach() + 1
        assert type(made) is Tensor
        assert torch.equal(made.add_(1), expected)


def test_adapted_parameters_and_weights_of_adapted_layers_meet_in_one_operation():
    net = nn.Sequential(Experts(), nn.Linear(5, 5))
    model = adapt(net, "w", target_modules=["1"])
    owner, layer = model.base_model.model
    w, weight = owner.w, layer.weight
    plain = net[0].get_parameter("w") + owner.adapted_parameters.get_delta_weight("default", "w")
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(w @ weight, plain @ expected)
    torch.testing.assert_close(weight @ w, expected @ plain)
    torch.testing.assert_close(torch.stack([weight, w[0]]), torch.stack([expected, plain[0]]))


def test_a_new_parameter_takes_the_place_of_the_base():
    net = Net()
    model = adapt(copy.deepcopy(net), "fused.w", "position")
    x, new = torch.randn(2, 3, 5), nn.Parameter(torch.randn(2, 5, 5))
    model.base_model.model.layers[2].fused.w = net.layers[2].fused.w = new
    torch.testing.assert_close(model(x), by_hand.run(net, model, x))
    merged = by_hand.run(net, model, x)
    torch.testing.assert_close(model.merge_and_unload()(x), merged)


def test_a_new_parameter_of_another_shape_is_refused():
    model = adapt(Net(), "position")
    model.base_model.model.position = nn.Parameter(torch.randn(1, 5))
    with pytest.raises(ValueError, match=r"position: has shape \[1, 5\] now, and had \[3, 5\]"):
        model(torch.randn(2, 3, 5))


def test_a_parameter_quantised_later_is_refused():
    model = adapt(Net(), "position")
    whole = nn.Parameter(torch.zeros(3, 5, dtype=torch.int8), requires_grad=False)
    model.base_model.model.position = whole
    with pytest.raises(ValueError, match=r"position: is quantised now \(torch.int8\), and cannot be added to"):
        model(torch.randn(2, 3, 5))


def test_an_adapted_parameter_can_be_neither_deleted_nor_parametrised():
    model = adapt(Net(), "fused.w")
    owner = model.base_model.model.layers[0].fused
    with pytest.raises(ValueError, match=r"layers.0.fused.w: an adapted parameter cannot be deleted or parametrised"):
        del owner.w
    with pytest.raises(ValueError, match=r"layers.0.fused.w: an adapted parameter cannot be deleted or parametrised"):
        parametrize.register_parametrization(owner, "w", nn.Tanh())
    assert not parametrize.is_parametrized(owner)


def test_other_parameters_of_an_owner_may_be_parametrised():
    class Two(Experts):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(torch.randn(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ self.v

    for before in (True, False):
        net = nn.Sequential(Two())
        if before:
            parametrizations.orthogonal(net[0], "v")
        model, x = adapt(net, "w"), torch.randn(2, 5)
        if not before:
            parametrizations.orthogonal(net[0], "v")
        update = model.base_model.model[0].adapted_parameters.get_delta_weight("default", "w")
        expected = torch.tanh(x @ (net[0].get_parameter("w") + update).sum(0)) @ net[0].v
        torch.testing.assert_close(model(x), expected)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), expected)
        assert isinstance(merged[0].w, nn.Parameter)
        assert torch.equal(merged[0].w, merged[0].get_parameter("w"))
        parametrize.remove_parametrizations(merged[0], "v")
        torch.testing.assert_close(merged(x), expected)
