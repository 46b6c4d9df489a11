"""Mixtures of experts of transformers 5, whose experts are bare parameters: beside W + update by hand, and LoRA."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import flora

from . import by_hand

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 40,
}


def mixtral(**changes: int) -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES | changes, num_local_experts=4))


def qwen(**changes: int) -> nn.Module:
    sizes = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES | sizes | changes))


def gpt_oss(**changes: int) -> nn.Module:
    sizes = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES | sizes | changes))


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
models = pytest.mark.parametrize("build", [mixtral, qwen, gpt_oss])
ways = pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 40, (2, 7))


def made(build: Callable[..., nn.Module], way: str = "eager", **changes: int) -> Any:
    """Weights large enough that logits depend on the experts."""
    model: Any = build(**changes).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    model.set_experts_implementation(way)
    return model


def adapt(base: nn.Module, **settings: Any) -> peft.PeftModel:
    settings = {"target_parameters": EXPERTS, "r": 4, "init_weights": False, "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(copy.deepcopy(base), flora.FloraConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if "tucker_core" in name:
            parameter.data.mul_(20)  # an update that matters
    return model


@ways
@models
def test_outputs_and_gradients(build, way, ids):
    base = made(build, way)
    model = adapt(base)
    ours, expected = model(input_ids=ids, labels=ids), by_hand.run(base, model, input_ids=ids, labels=ids)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=0, atol=1e-4)
    assert (ours.logits - base(ids).logits).abs().max() > 0.05
    gradients, theirs = by_hand.gradients(model, ours.loss), by_hand.gradients(model, expected.loss)
    assert gradients.keys() == theirs.keys()
    for name, gradient in theirs.items():
        largest = gradient.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-4 * largest, msg=name)


@pytest.mark.filterwarnings("ignore")
@models
def test_training_merging_saving_and_generating(build, ids, tmp_path):
    base = made(build, "grouped_mm")
    model = adapt(base, init_weights=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, base(ids).logits)

    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    logits, generated = model(input_ids=ids).logits, model.generate(input_ids=ids, **settings)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert torch.equal(loaded(input_ids=ids).logits, logits)
    merged = model.merge_and_unload()
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    torch.testing.assert_close(merged(ids).logits, logits, rtol=0, atol=1e-4)
    assert torch.equal(merged.generate(input_ids=ids, **settings), generated)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = type(base).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(reloaded(ids).logits, merged(ids).logits)


@models
def test_the_same_update_gives_what_lora_gives(build, ids):
    """Full ranks hold any update: that of LoRA's target_parameters in the same place."""
    base = made(build)
    lora = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_parameters=EXPERTS, init_lora_weights=False, r=2)
    ).eval()
    theirs = {}
    for name, layer in lora.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.layer.ParamWrapper):
            theirs[f"{name.replace('.base_layer', '')}.{layer.parameter_name}"] = layer.get_delta_weight("default")
    model = adapt(base, r=64)
    assert by_hand.updates(model).keys() == theirs.keys()
    for name, layer, weight in model.base_model.adapted_weights("default"):
        core = theirs[name].detach()
        for mode, factor in enumerate(layer.factors("default", weight)):
            assert factor.shape[0] == factor.shape[1]
            core = torch.tensordot(core, factor.inverse(), dims=([mode], [1])).movedim(-1, mode)
        layer.core("default", weight).data.copy_(core)
    expected = lora(input_ids=ids).logits
    assert (expected - base(ids).logits).abs().max() > 0.05
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=2e-4)


@models
def test_checkpointed_layers(build, ids):
    base = made(build)
    model = adapt(base).train()
    expected = by_hand.gradients(model, model(input_ids=ids, labels=ids).loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        model(input_ids=ids)
    with model.disable_adapter():
        model(input_ids=ids)
    gradients = by_hand.gradients(model, loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@models
def test_only_some_layers(build, ids):
    base = made(build)
    model = adapt(base, layers_to_transform=[1])
    assert {name.split(".")[2] for name in by_hand.updates(model)} == {"1"}
    expected = by_hand.run(base, model, input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-4)


@models
def test_compiles_without_graph_breaks(build, ids):
    base = made(build, "batched_mm", num_hidden_layers=1)
    model = adapt(base).base_model.model
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    expected = model(**inputs)
    ours = compiled(**inputs)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=0, atol=1e-4)
    theirs = by_hand.gradients(model, expected.loss)
    gradients = by_hand.gradients(model, ours.loss)
    assert gradients.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
