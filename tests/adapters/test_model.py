"""What is adapted: targets of modules and parameters, ranks per layer, and what is said when they do not fit."""

import warnings
from typing import Any

import peft
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flora
from flora.adapters import FloraLayer

from .layer_cases import Holder, Mixture


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.fc2(torch.relu(self.fc1(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 6, 3, padding=1)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.position = nn.Parameter(torch.randn(1, 5, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mT + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def adapt(model: nn.Module, **settings: Any) -> peft.PeftModel:
    return peft.get_peft_model(model, flora.FloraConfig(**settings))


def adapted(model: peft.PeftModel) -> dict[str, list[int]]:
    return model.base_model.effective_ranks()


# ---------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ["fc1"]}, ["layers.0.fc1", "layers.1.fc1", "layers.2.fc1"]),
        ({"target_modules": ["layers.1.fc1", "stem"]}, ["stem", "layers.1.fc1"]),
        ({"target_modules": r"layers\.[02]\.fc2"}, ["layers.0.fc2", "layers.2.fc2"]),
        (
            {"target_modules": ["fc1", "fc2"], "layers_to_transform": [1], "layers_pattern": ["layers"]},
            ["layers.1.fc1", "layers.1.fc2"],
        ),
        ({"target_modules": ["fc1"], "layers_to_transform": 2, "layers_pattern": "layers"}, ["layers.2.fc1"]),
        ({"target_modules": ["fc1"], "exclude_modules": ["layers.0.fc1", "layers.1.fc1"]}, ["layers.2.fc1"]),
        (
            {"target_modules": "all-linear", "modules_to_save": ["head"]},
            [f"layers.{i}.fc{j}" for i in range(3) for j in (1, 2)],
        ),
        ({"target_parameters": ["position"]}, ["position"]),
        ({"target_parameters": ["fc1.weight"], "exclude_modules": r"layers.[01].fc1"}, ["layers.2.fc1"]),
    ],
)
def test_targets(settings, expected):
    assert list(adapted(adapt(Net(), **settings))) == expected


def test_only_adapters_and_saved_modules_are_trained():
    model = adapt(Net(), target_modules=["fc1"], modules_to_save=["head"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if ".tucker_" not in name} == {
        "base_model.model.head.modules_to_save.default.weight",
        "base_model.model.head.modules_to_save.default.bias",
    }
    assert len(trained) == 2 + 3 * 3


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("flora_only", 3), ("all", 3 * 3 + 2)])
def test_biases(bias, count, tmp_path):
    model = adapt(Net(), target_modules=["fc1"], bias=bias)
    biases = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "bias" in name]
    assert len(biases) == count
    for name in biases:
        model.get_parameter(name).data.fill_(0.5)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path)
    assert all((loaded.get_parameter(name) == 0.5).all() for name in biases)


def test_timm_models_have_no_config_and_need_none():
    model = timm.create_model("convnextv2_atto", num_classes=3)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    wrapped = adapt(model, target_modules=sorted(set(names) - {"head.fc"}), modules_to_save=["head.fc"])
    assert len(adapted(wrapped)) == len(names) - 1


def test_targets_that_match_nothing_are_an_error():
    with pytest.raises(ValueError, match="not found in the base model"):
        adapt(Net(), target_modules=["nothing"])
    with pytest.raises(ValueError, match="no `target_parameters` found"):
        adapt(Net(), target_parameters=["nothing"])


def test_targets_left_untrained_are_a_warning():
    with pytest.warns(UserWarning, match="target_modules: typo match nothing and stay untrained"):
        adapt(Net(), target_modules=["fc1", "typo"])
    with pytest.warns(UserWarning, match="target_parameters: typo match nothing"):
        adapt(Net(), target_parameters=["position", "typo"])
    with pytest.warns(UserWarning, match="modules_to_save: hed match no module and stay untrained"):
        adapt(Net(), target_modules=["fc1"], modules_to_save=["head", "hed"])
    for field in ("rank_pattern", "scale_pattern", "fold_pattern"):
        value = [2, 2] if field == "fold_pattern" else 1
        with pytest.warns(UserWarning, match=rf"{field}\['typo'\] matches no adapted layer"):
            adapt(Net(), target_modules=["fc1"], **{field: {"typo": value}})


def test_patterns_that_match_are_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(Net(), target_modules=["fc1"], target_parameters=["position"], rank_pattern={"fc1": 2, "position": 3})
        adapt(Net(), target_modules=["fc1"], modules_to_save=["head", "classifier", "score"])  # PEFT adds the last two


def test_unsupported_modules_name_their_type():
    with pytest.raises(ValueError, match=r"target_modules: layers.0.norm is a LayerNorm, which is not supported"):
        adapt(Net(), target_modules=["layers.0.norm"])


def test_a_weight_is_adapted_once():
    with pytest.raises(ValueError, match=r"target_parameters: layers.0.fc1.weight is adapted through target_modules"):
        adapt(Net(), target_modules=["fc1"], target_parameters=["fc1.weight"])


# ---------------------------------------------------------------------- ranks


def test_ranks_are_clipped_and_recorded():
    model = adapt(Net(), target_modules=["stem", "fc1"], r=100, kernel_rank=9, target_parameters=["position"])
    assert adapted(model)["stem"] == [6, 3, 3]
    assert adapted(model)["layers.0.fc1"] == [6, 6]
    assert adapted(model)["position"] == [1, 5, 5]
    stem = model.base_model.model.stem
    assert [factor.shape for factor in stem.factors("default")] == [(6, 6), (3, 3), (3, 3)]


def test_ranks_per_layer():
    model = adapt(
        Net(),
        target_modules=["stem", "fc1", "fc2"],
        r=2,
        kernel_rank=1,
        rank_pattern={"stem": [4, 2, 2], r"layers\.0\.fc1": 5, "fc2": [3, 3]},
    )
    assert adapted(model)["stem"] == [4, 2, 2]
    assert [adapted(model)[f"layers.{i}.fc1"] for i in range(2)] == [[5, 5], [2, 2]]
    assert adapted(model)["layers.2.fc2"] == [3, 3]


def test_ranks_of_stacked_parts():
    attention = nn.MultiheadAttention(8, 2)
    ranks = adapted(adapt(Holder(attention), target_modules=["layer"], r=4))
    assert ranks == {"layer.in_proj_weight": [3, 4, 4], "layer.out_proj.weight": [4, 4]}
    ranks = adapted(adapt(Holder(nn.LSTM(5, 6)), target_modules=["layer"], r=4, stack_rank=2))
    assert ranks == {"layer.weight_ih_l0": [2, 4, 4], "layer.weight_hh_l0": [2, 4, 4]}
    ranks = adapted(adapt(Holder(Mixture([4, 3, 5, 6])), target_parameters=["experts"], r=3, stack_modes=[0, 1]))
    assert ranks == {"layer.experts": [4, 3, 3, 3]}
    pattern = {"layer.weight_hh_l0": [1, 2, 2]}
    ranks = adapted(adapt(Holder(nn.LSTM(5, 6)), target_modules=["layer"], r=4, rank_pattern=pattern))
    assert ranks == {"layer.weight_ih_l0": [4, 4, 4], "layer.weight_hh_l0": [1, 2, 2]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"stem": 7}}, r"rank_pattern: rank 7 for mode 0 of stem is above its size 6"),
        ({"rank_pattern": {"stem": [4, 4, 2]}}, r"rank_pattern: rank 4 for mode 1 of stem is above its size 3"),
        ({"rank_pattern": {"stem": [4, 3, 2, 2]}}, r"rank_pattern for stem .*: 4 ranks given for 2 modes"),
        ({"r": [4, 3, 2, 2]}, r"r for stem .*: 4 ranks given for 2 modes"),
        ({"kernel_rank": [2, 2]}, r"kernel_rank for stem: 2 ranks given for 1 modes"),
        ({"fold_pattern": {"stem": [7, -1]}}, r"fold_pattern: cannot fold the weight of stem, shape \[6, 3, 3\]"),
    ],
)
def test_ranks_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        adapt(Net(), target_modules=["stem"], **settings)


def test_stack_modes_that_do_not_exist():
    with pytest.raises(ValueError, match="stack_modes"):
        adapt(Holder(Mixture([3, 4])), target_parameters=["experts"], stack_modes=[2])


@pytest.mark.parametrize(("shape", "modes"), [([5], 1), ([2] * 7, 7)])
def test_parameters_of_too_few_or_many_modes(shape, modes):
    with pytest.raises(ValueError, match=f"target_parameters: layer.experts has {modes} modes; 2 to 6"):
        adapt(Holder(Mixture(shape)), target_parameters=["experts"])


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1.0),
        ({"scale": 4.0}, 4.0),
        ({"scale": 4.0, "scale_pattern": {"fc1": 0.5}}, 0.5),
        ({"alpha": 16, "r": 64}, 16 / 64),
        ({"alpha": 16, "r": 64, "rank_stabilized": True}, 16 / 8),
        ({"alpha": 16, "r": [4, 9]}, 16 / 6),
        ({"alpha": 16, "alpha_pattern": {"fc1": 2}, "rank_pattern": {"fc1": 4}}, 2 / 4),
    ],
)
def test_scale(settings, scale):
    model = adapt(Net(), target_modules=["fc1"], **settings)
    assert model.base_model.model.layers[0].fc1.scaling["default"] == pytest.approx(scale)


def test_scales_of_several_weights_of_a_layer():
    pattern = {"layer.weight_ih_l0": 0.5, "layer.weight_hh_l0": 4.0}
    model = adapt(Holder(nn.GRU(3, 4)), target_modules=["layer"], scale_pattern=pattern, init_weights=False)
    layer = model.base_model.model.layer
    before = {name: layer.get_delta_weight("default", name) for name in layer.weights["default"]}
    assert [layer.scale_of("default", name) for name in before] == [0.5, 4.0]
    layer.set_scale("default", 2.0)
    for name, delta in before.items():
        torch.testing.assert_close(layer.get_delta_weight("default", name), 2 * delta)


# ---------------------------------------------------------------------- weights that are read, not called


def test_encoder_layers_with_a_fused_kernel_see_the_adapter():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2, enable_nested_tensor=False
    )
    targets = ["self_attn", "linear1", "linear2"]
    model = adapt(encoder, target_modules=targets, init_weights=False).eval()
    x = torch.randn(3, 4, 8)
    expected = model(x)  # with gradients torch takes the plain path
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-5)


def test_output_projection_alone():
    model = adapt(Holder(nn.MultiheadAttention(8, 2)), target_modules=["out_proj"], init_weights=False).eval()
    x = torch.randn(5, 3, 8)
    expected = model(x, x, x)
    assert sum(isinstance(module, FloraLayer) for module in model.modules()) == 1
    torch.testing.assert_close(model.merge_and_unload()(x, x, x), expected)


def test_layers_look_like_their_base():
    model = adapt(Net(), target_modules=["stem", "fc1"])
    stem = model.base_model.model.stem
    assert (stem.in_channels, stem.kernel_size, stem.stride) == (3, (3,), (1,))
    assert (stem.in_features, stem.out_features) == (3, 6)
    assert not hasattr(stem, "no_such_attribute")


def test_parameters_of_the_model_itself():
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() == 0:
                raise ArithmeticError
            return torch.einsum("bi,oki->bok", x, self.weight)

    root = Root()
    original = root.weight
    model = adapt(root, target_parameters=["weight"], init_weights=False, r=2)
    x = torch.randn(2, 5)
    delta = next(m for m in model.modules() if isinstance(m, FloraLayer)).get_delta_weight("default")
    torch.testing.assert_close(model(x), torch.einsum("bi,oki->bok", x, original + delta))
    assert root.get_parameter("weight") is original
    with pytest.raises(ArithmeticError):
        model(torch.zeros(2, 5))
    assert root.get_parameter("weight") is original  # also after a failure


def test_same_padding_of_tensorflow_keeps_its_forward():
    conv = timm.layers.Conv2dSame(3, 5, 3, stride=2)
    model = adapt(Holder(conv), target_modules=["layer"], init_weights=False)
    x = torch.randn(1, 3, 8, 8)
    weight = conv.weight + model.base_model.model.layer.get_delta_weight("default")
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, conv.bias, stride=2)
    torch.testing.assert_close(model(x), expected)
