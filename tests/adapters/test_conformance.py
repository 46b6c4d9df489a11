"""PEFT's own tests over FLoRA: everything they ask of a method, on every kind of layer they have a model for."""

from typing import Any

import pytest
import torch

from flora import FloraConfig

from .peft_sources import Unavailable, load_tests

try:
    peft_tests = load_tests("test_custom_models")
except Unavailable as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = [pytest.mark.conformance, pytest.mark.filterwarnings("ignore")]

# Scales of their own where the tests' fixed inputs and learning rate (0.5) would leave parameters where they are, or
# diverge: the inputs of Conv2dGroups2 go up to 57599, the weights of MlpUsingParameters have unit variance.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("MLP, one layer", "MLP", {"target_modules": "lin0"}),
    ("MLP, two layers", "MLP", {"target_modules": ["lin0", "lin1"], "scale": 0.1}),  # rate 0.5 on a sum diverges at 1
    ("MLP, layer and saved module", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP, mixed ranks", "MLP", {"target_modules": ["lin0", "lin1"], "r": [4, 2], "rank_pattern": {"lin1": [1, 3]}}),
    ("MLP, magnitude", "MLP", {"target_modules": ["lin0", "lin1"], "use_dora": True}),
    ("MLP, merged form", "MLP", {"target_modules": ["lin0"], "forward": "merged"}),
    ("MLP, factored form", "MLP", {"target_modules": ["lin0"], "forward": "factored"}),
    ("MLP, fold", "MLP", {"target_modules": ["lin0"], "fold_pattern": {"lin0": [4, 5, 10]}}),
    ("MLP, subspaces of the weight", "MLP", {"target_modules": ["lin0"], "init": "hosvd"}),
    ("embedding and Conv1D", "EmbConv1D", {"target_modules": ["emb", "conv1d"], "scale": 16.0}),
    ("embedding, magnitude", "EmbConv1D", {"target_modules": ["emb"], "use_dora": True}),
    ("Conv1d", "Conv1d", {"target_modules": ["conv1d"]}),
    ("Conv1d, kernel of 1", "Pointwise", {"target_modules": ["conv1d"]}),
    ("Conv1d, groups", "Conv1dGroups", {"target_modules": ["conv1d"]}),
    ("Conv2d", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d, kernel of 1", "Conv2d1x1", {"target_modules": ["conv2d"]}),
    ("Conv2d, factored form", "Conv2d", {"target_modules": ["conv2d"], "forward": "factored"}),
    ("Conv2d, magnitude", "Conv2d", {"target_modules": ["conv2d"], "use_dora": True}),
    ("Conv2d, groups", "Conv2dGroups", {"target_modules": ["conv2d"]}),
    ("Conv2d, groups and padding", "Conv2dGroups2", {"target_modules": ["conv2d"], "scale": 1e-3}),
    ("Conv2d, depthwise", "Depthwise", {"target_modules": ["conv2d"]}),
    ("Conv3d and linear", "Conv3d", {"target_modules": ["conv3d", "lin0"]}),
    ("ConvTranspose2d, groups", "TransposedGroups", {"target_modules": ["conv2d"]}),
    ("attention and linear", "MHA", {"target_modules": ["mha", "lin0"]}),
    ("bare parameters", "MlpUsingParameters", {"target_parameters": ["lin0.weight", "lin1.weight"], "scale": 0.1}),
    ("GRU", "GRU", {"target_modules": ["gru"], "scale": 16.0}),
    ("trained tokens", "EmbConv1D", {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}}),
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

MIXED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("same layers", {"target_modules": ["lin0", "lin1"]}, {"target_modules": ["lin0", "lin1"]}),
    ("different layers", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    ("different ranks", {"target_modules": ["lin0"], "r": 2}, {"target_modules": ["lin0"], "r": [3, 5]}),
    ("different forms", {"target_modules": ["lin0"], "forward": "merged"}, {"target_modules": ["lin0", "lin1"]}),
    (
        "fold and none",
        {"target_modules": ["lin0"], "fold_pattern": {"lin0": [4, 5, 2, 5]}},
        {"target_modules": ["lin0"]},
    ),
    (
        "saved module",
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    ),
]


class SequenceModel(torch.nn.Module):
    """Theirs with a GRU sees sequences of one step, whose recurrent weights have no effect."""

    def __init__(self):
        super().__init__()
        self.gru = torch.nn.GRU(5, 8, batch_first=True)
        self.lin0 = torch.nn.Linear(8, 2)
        self.dtype = torch.float

    def forward(self, X):
        states, _ = self.gru(X.to(self.dtype).view(9, 2, 5) / 90)  # larger inputs saturate the gates
        return torch.nn.functional.log_softmax(self.lin0(states[:, -1]), dim=-1)


class Models(peft_tests.MockTransformerWrapper):
    """PEFT's small models, and a few more of the same build for layers that no method of PEFT's adapts."""

    @classmethod
    def from_pretrained(cls, model_id, dtype=None):
        if model_id not in ("Pointwise", "Depthwise", "Transposed", "TransposedGroups", "GRU"):
            return super().from_pretrained(model_id, dtype)
        torch.manual_seed(0)
        if model_id == "GRU":
            model = SequenceModel()
        elif model_id == "Pointwise":
            model = peft_tests.ModelConv1D()
            model.conv1d, model.lin0 = torch.nn.Conv1d(1, 1, 1), torch.nn.Linear(10, 2)
        else:
            model = peft_tests.ModelConv2D()
            if model_id == "Depthwise":
                model.conv2d = torch.nn.Conv2d(5, 10, 3, groups=5)
            else:
                groups = 5 if model_id == "TransposedGroups" else 1
                model.conv2d = torch.nn.ConvTranspose2d(5, 10, 3, padding=2, groups=groups)
        return model.to(torch.float32 if dtype is None else dtype)


# Their tests refer to the lists of cases themselves, so replacing what the lists hold replaces the cases.
peft_tests.TEST_CASES[:] = [(name, model, FloraConfig, config) for name, model, config in CASES]
peft_tests.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
    (name, "flora", FloraConfig, {**first, "init_weights": False}, {**second, "init_weights": False})
    for name, first, second in PAIRS
]
peft_tests.MIXED_ADAPTER_TEST_CASES[:] = [
    (name, *(FloraConfig(**{"scale": 8.0, "init_weights": False, **settings}) for settings in pair))
    for name, *pair in MIXED
]


class TestCustomModels(peft_tests.TestPeftCustomModel):
    transformers_class = Models

    @pytest.mark.skip(reason="FLoRA refuses pickle checkpoints, which this test loads")
    def test_save_pretrained_pickle(self):
        pass

    @pytest.mark.parametrize(("test_name", "model_id", "config_cls", "config_kwargs"), peft_tests.TEST_CASES)
    def test_merge_layers_is_deterministic_in_train_mode(self, test_name, model_id, config_cls, config_kwargs):
        if model_id in ("MHA", "GRU"):
            pytest.skip("attention and recurrent weights reject dropout, which this test switches on")
        super().test_merge_layers_is_deterministic_in_train_mode(test_name, model_id, config_cls, config_kwargs)


class TestActiveAdapters(peft_tests.TestMultipleActiveAdapters):
    pass


class TestMixedBatches(peft_tests.TestMixedAdapterBatches):
    # These ask for PEFT's sentences; test_mixed_batches asks for ours.
    test_mixed_adapter_batches_length_mismatch_raises = None
    test_mixed_adapter_batches_training_mode_raises = None
    test_mixed_adapter_batches_merged_raises = None


def _hide_tests_of_other_methods(tests: type, cases: list) -> None:
    """Leave only the tests that run over the list of cases: all others are about one of PEFT's own methods."""
    for name in dir(tests):
        marks = getattr(getattr(tests, name), "pytestmark", [])
        general = any(mark.name == "skip" or (mark.name == "parametrize" and mark.args[1] is cases) for mark in marks)
        if name.startswith("test_") and not general:
            setattr(tests, name, None)


_hide_tests_of_other_methods(TestCustomModels, peft_tests.TEST_CASES)
_hide_tests_of_other_methods(TestActiveAdapters, peft_tests.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES)
_hide_tests_of_other_methods(TestMixedBatches, peft_tests.MIXED_ADAPTER_TEST_CASES)
