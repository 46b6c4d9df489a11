"""Batches whose examples take different adapters: each comes out as it does alone under its adapter."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

import flora

ROWS = ["other", "__base__", "default", "other", "default"]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


class Net(nn.Module):
    """A layer of every kind that LoRA mixes, and folds and groups, which have no thin matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding="same", padding_mode="circular", groups=4)
        self.transposed = nn.ConvTranspose1d(8, 8, 2)
        self.folded = nn.Linear(8, 12)
        self.turned = Conv1D(8, 12)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transposed(torch.tanh(self.grouped(torch.tanh(self.conv(self.embed(tokens).mT))))).mT
        return self.head(torch.tanh(self.turned(torch.tanh(self.folded(x)))))


TARGETS = ["embed", "conv", "grouped", "transposed", "folded", "turned"]


def adapt(model: nn.Module, targets: Any, second: Any = None, **settings: Any) -> Any:
    """Two adapters: the second of another rank, scale and form, and perhaps on other layers."""
    config = flora.FloraConfig(r=3, init_weights=False, target_modules=targets, **settings)
    model = peft.get_peft_model(model, config)
    other = {"r": 5, "scale": 0.4, "forward": "merged", **settings}
    model.add_adapter("other", flora.FloraConfig(target_modules=second or targets, init_weights=False, **other))
    return model.eval()


def alone(model: Any, name: str, run: Any) -> Any:
    if name == "__base__":
        with model.disable_adapter():
            return run(model)
    model.set_adapter(name)
    try:
        return run(model)
    finally:
        model.set_adapter("default")


@pytest.mark.parametrize("second", [None, ["conv", "head"]], ids=["same layers", "other layers"])
@torch.no_grad()
def test_each_example_runs_under_its_adapter(second):
    model = adapt(Net().double(), TARGETS, second, fold_pattern={"folded": [3, 4, 2, 4]})
    tokens = torch.randint(20, (5, 7))
    mixed = model(tokens, adapter_names=ROWS)
    for row, name in enumerate(ROWS):
        expected = alone(model, name, lambda model, row=row: model(tokens[row : row + 1]))
        torch.testing.assert_close(mixed[row : row + 1], expected)
        if name != "__base__":
            assert (expected - alone(model, "__base__", lambda m, row=row: m(tokens[row : row + 1]))).abs().max() > 1e-3
    torch.testing.assert_close(model(tokens), alone(model, "default", lambda model: model(tokens)), rtol=0, atol=0)


@torch.no_grad()
def test_mixed_batches_agree_with_lora_in_the_same_place():
    """LoRA's mixed batch, with FLoRA holding the same updates: core r x r the identity, factors B and A."""
    net, tokens = Net().double(), torch.randint(20, (5, 7))
    lora = {"r": 3, "lora_alpha": 3, "init_lora_weights": False, "target_modules": ["folded", "turned"]}
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**lora))
    theirs.add_adapter("other", peft.LoraConfig(**lora))
    ours = peft.get_peft_model(net, flora.FloraConfig(r=3, target_modules=["folded", "turned"]))
    ours.add_adapter("other", flora.FloraConfig(r=3, target_modules=["folded", "turned"]))
    for name in ("default", "other"):
        for layer in ("folded", "turned"):
            own, their = (model.base_model.model.get_submodule(layer) for model in (ours, theirs))
            own.core(name).copy_(torch.eye(3))
            down, up = their.lora_A[name].weight, their.lora_B[name].weight
            factors = (up, down.mT) if layer == "folded" else (down.mT, up)  # Conv1D stores [in, out]
            for factor, value in zip(own.factors(name), factors, strict=True):
                factor.copy_(value)
    expected = theirs.eval()(tokens, adapter_names=ROWS)
    torch.testing.assert_close(ours.eval()(tokens, adapter_names=ROWS), expected)


@pytest.mark.parametrize("beams", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("kind", ["llama", "t5"])
@torch.no_grad()
def test_generate_gives_each_example_what_it_gives_it_alone(kind, beams):
    if kind == "llama":
        base: Any = LlamaForCausalLM(LlamaConfig(vocab_size=30, num_key_value_heads=2, **SIZES))
        targets = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
    else:
        t5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
        base, targets = T5ForConditionalGeneration(T5Config(vocab_size=30, **t5)), ["q", "v", "wo"]
    for parameter in base.parameters():
        parameter.mul_(4)  # tiny random models answer alike otherwise
    model = adapt(base.double(), targets, scale=2.0)
    tokens, kwargs = (
        torch.randint(3, 30, (5, 6)),
        {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **beams},
    )
    mask = torch.ones_like(tokens)
    mixed = model.generate(input_ids=tokens, attention_mask=mask, adapter_names=ROWS, **kwargs)
    assert mixed.tolist() != model.generate(input_ids=tokens, attention_mask=mask, **kwargs).tolist()
    each = beams.get("num_return_sequences", 1)
    for row, name in enumerate(ROWS):
        only = {"input_ids": tokens[row : row + 1], "attention_mask": mask[row : row + 1], **kwargs}
        expected = alone(model, name, lambda model, only=only: model.generate(**only))
        assert mixed[row * each : (row + 1) * each].tolist() == expected.tolist()


@torch.no_grad()
def test_a_trained_head_is_mixed_too():
    model = adapt(Net().double(), ["folded"], modules_to_save=["head"])
    heads = model.base_model.model.head.modules_to_save
    for name in heads:
        heads[name].weight.normal_()
    tokens = torch.randint(20, (5, 7))
    mixed = model(tokens, adapter_names=ROWS)
    for row, name in enumerate(ROWS):
        expected = alone(model, name, lambda model, row=row: model(tokens[row : row + 1]))
        torch.testing.assert_close(mixed[row : row + 1], expected)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRU(4, 4, batch_first=True)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(x)[0])


def refusals() -> list[Any]:
    def unequal(model: Any) -> Any:
        return model(torch.randn(3, 2, 4), adapter_names=["default"])

    def unknown(model: Any) -> Any:
        return model(torch.randn(1, 2, 4), adapter_names=["defualt"])

    def no_list(model: Any) -> Any:
        return model(torch.randn(1, 2, 4), adapter_names="default")

    def training(model: Any) -> Any:
        return model.train()(torch.randn(1, 2, 4), adapter_names=["default"])

    def merged(model: Any) -> Any:
        model.merge_adapter()
        return model(torch.randn(1, 2, 4), adapter_names=["default"])

    return [
        pytest.param({}, unequal, ValueError, "adapter_names: 1 names for a batch of 3", id="unequal"),
        pytest.param({}, unknown, ValueError, "adapter_names: no adapter is called defualt", id="unknown"),
        pytest.param({}, no_list, TypeError, "adapter_names: must be a list", id="no list"),
        pytest.param({}, training, ValueError, "adapter_names: only for inference", id="training"),
        pytest.param({}, merged, ValueError, "adapter_names: adapters are merged", id="merged"),
    ]


@pytest.mark.parametrize(("settings", "run", "error", "message"), refusals())
def test_what_cannot_be_mixed_is_one_clear_line(settings, run, error, message):
    model = peft.get_peft_model(Recurrent(), flora.FloraConfig(target_modules=["fc"], init_weights=False, **settings))
    with pytest.raises(error, match=f"^{message}"):
        run(model.eval())
    model.eval()
    if not model.base_model.model.fc.merged:
        assert model(torch.randn(2, 2, 4)).shape == (2, 2, 4)  # nothing of the refused call remains


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["inner"]}, "adapter_names: inner (GRU) cannot run"),
        ({"target_modules": ["fc"], "use_dora": True}, "adapter_names: default has use_dora"),
    ],
)
def test_layers_that_cannot_be_mixed_are_named_before_anything_runs(settings, message):
    model = peft.get_peft_model(Recurrent(), flora.FloraConfig(init_weights=False, **settings)).eval()
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        model(torch.randn(1, 2, 4), adapter_names=["default"])
    assert str(caught.value).startswith(message)
    model(torch.randn(1, 2, 4), adapter_names=["__base__"])


def test_a_rival_on_the_same_base_is_mixed_too():
    from flora.methods.rivals.lotr import LotrConfig

    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4)).double(), LotrConfig(r=2, target_modules=["0", "1"])
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 4, dtype=torch.double)
    with torch.no_grad():
        mixed = model.eval()(x, adapter_names=["default", "__base__"])
        torch.testing.assert_close(mixed[0], model(x)[0])
        with model.disable_adapter():
            torch.testing.assert_close(mixed[1], model(x)[1])
