"""PEFT's own tests over FLoRA: everything they ask of a method, on every kind of layer they have a model for."""

from typing import Any

import pytest

from flora import FloraConfig

from .peft_sources import Unavailable, load_tests

try:
    peft_tests = load_tests("test_custom_models")
except Unavailable as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = [pytest.mark.conformance, pytest.mark.filterwarnings("ignore")]

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("MLP, one layer", "MLP", {"target_modules": "lin0"}),
    ("MLP, listed layer", "MLP", {"target_modules": ["lin0"]}),
    ("MLP, other layer", "MLP", {"target_modules": ["lin1"]}),
    ("MLP, two layers", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP, layer and saved module", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP, mixed ranks", "MLP", {"target_modules": ["lin0", "lin1"], "r": [4, 2], "rank_pattern": {"lin1": [1, 3]}}),
    ("MLP, alpha", "MLP", {"target_modules": ["lin0"], "alpha": 16, "rank_stabilized": True}),
    ("MLP, magnitude", "MLP", {"target_modules": ["lin0", "lin1"], "use_dora": True}),
    ("MLP, merged form", "MLP", {"target_modules": ["lin0"], "forward": "merged"}),
    ("MLP, factored form", "MLP", {"target_modules": ["lin0"], "forward": "factored"}),
    ("MLP, fold", "MLP", {"target_modules": ["lin0"], "fold_pattern": {"lin0": [4, 5, 10]}}),
    ("MLP, all biases", "MLP", {"target_modules": ["lin0"], "bias": "all"}),
    ("MLP, excluded layer", "MLP", {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]}),
    ("MLP, subspaces of the weight", "MLP", {"target_modules": ["lin0"], "init": "hosvd"}),
    ("embedding", "EmbConv1D", {"target_modules": ["emb"]}),
    ("embedding and Conv1D", "EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
    ("Conv1D of transformers", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("embedding, magnitude", "EmbConv1D", {"target_modules": ["emb"], "use_dora": True}),
    ("Conv1d", "Conv1d", {"target_modules": ["conv1d"]}),
    ("Conv1d, many channels", "Conv1dBigger", {"target_modules": ["conv1d"]}),
    ("Conv1d, kernel of 1", "Conv1dKernel1", {"target_modules": ["conv1d"]}),
    ("Conv1d, groups", "Conv1dGroups", {"target_modules": ["conv1d"]}),
    ("Conv2d", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d and linear", "Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv2d, kernel of 1", "Conv2d1x1", {"target_modules": ["conv2d"]}),
    ("Conv2d, factored form", "Conv2d", {"target_modules": ["conv2d"], "forward": "factored"}),
    ("Conv2d, magnitude", "Conv2d", {"target_modules": ["conv2d"], "use_dora": True}),
    ("Conv2d, groups", "Conv2dGroups", {"target_modules": ["conv2d"]}),
    ("Conv2d, groups and padding", "Conv2dGroups2", {"target_modules": ["conv2d"]}),
    ("Conv2d, depthwise", "Depthwise", {"target_modules": ["conv2d"]}),
    ("Conv3d", "Conv3d", {"target_modules": ["conv3d"]}),
    ("Conv3d and linear", "Conv3d", {"target_modules": ["conv3d", "lin0"]}),
    ("ConvTranspose2d", "Transposed", {"target_modules": ["conv2d"]}),
    ("ConvTranspose2d, groups", "TransposedGroups", {"target_modules": ["conv2d"]}),
    ("attention", "MHA", {"target_modules": ["mha"]}),
    ("attention and linear", "MHA", {"target_modules": ["mha", "lin0"]}),
    ("bare parameters", "MlpUsingParameters", {"target_parameters": ["lin0.weight", "lin1.weight"]}),
    ("GRU", "GRU", {"target_modules": ["gru"]}),
]

PAIRS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("same layer", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("different layers", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    ("different ranks", {"target_modules": ["lin0"], "r": 2}, {"target_modules": ["lin0"], "r": [3, 5]}),
    ("fold and none", {"target_modules": ["lin0"], "fold_pattern": {"lin0": [4, 5, 10]}}, {"target_modules": ["lin0"]}),
    (
        "different forms",
        {"target_modules": ["lin0"], "forward": "merged"},
        {"target_modules": ["lin0"], "forward": "factored"},
    ),
    ("magnitudes, different layers", {"target_modules": ["lin0"], "use_dora": True}, {"target_modules": ["lin1"]}),
    ("same parameter", {"target_parameters": ["lin0.weight"]}, {"target_parameters": ["lin0.weight"]}),
    ("different parameters", {"target_parameters": ["lin0.weight"]}, {"target_parameters": ["lin1.weight"]}),
]


class Models(peft_tests.MockTransformerWrapper):
    """PEFT's small models, and a few more of the same build for layers that no method of PEFT's adapts."""

    @classmethod
    def from_pretrained(cls, model_id, dtype=None):
        torch = peft_tests.torch
        if model_id not in ("Depthwise", "Transposed", "TransposedGroups", "GRU"):
            return super().from_pretrained(model_id, dtype)
        torch.manual_seed(0)
        if model_id == "GRU":
            model = peft_tests.MLPWithGRU()
        else:
            model = peft_tests.ModelConv2D()
            if model_id == "Depthwise":
                model.conv2d = torch.nn.Conv2d(5, 10, 3, groups=5)
            else:
                groups = 5 if model_id == "TransposedGroups" else 1
                model.conv2d = torch.nn.ConvTranspose2d(5, 10, 3, padding=2, groups=groups)
        return model.to(torch.float32 if dtype is None else dtype)


def _only_parametrised_by(base: type, cases: list) -> dict[str, Any]:
    """``None`` for each test of ``base`` that is about one of PEFT's own methods instead of the list of cases."""
    hidden = {}
    for name in dir(base):
        marks = getattr(getattr(base, name), "pytestmark", []) if name.startswith("test_") else [None]
        if not any(mark and mark.name == "parametrize" and mark.args[1] is cases for mark in marks):
            hidden[name] = None
    return {name: value for name, value in hidden.items() if name.startswith("test_")}


# Their tests refer to the lists of cases themselves, so replacing what the lists hold replaces the cases.
peft_tests.TEST_CASES[:] = [(name, model, FloraConfig, config) for name, model, config in CASES]
peft_tests.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
    (name, "flora", FloraConfig, {**first, "init_weights": False}, {**second, "init_weights": False})
    for name, first, second in PAIRS
]

TestCustomModels = type(
    "TestCustomModels",
    (peft_tests.TestPeftCustomModel,),
    {
        "transformers_class": Models,
        **_only_parametrised_by(peft_tests.TestPeftCustomModel, peft_tests.TEST_CASES),
    },
)

TestActiveAdapters = type(
    "TestActiveAdapters",
    (peft_tests.TestMultipleActiveAdapters,),
    _only_parametrised_by(peft_tests.TestMultipleActiveAdapters, peft_tests.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES),
)
