"""Tied embeddings: adapted at one end or both, merged, saved and reloaded with the same logits; trained tokens."""

import copy
import json
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import flora

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TIED = "ignore:.*(tie_word_embeddings|no longer tied|save_embedding_layers).*"
pytestmark = pytest.mark.filterwarnings(TIED)


@pytest.fixture
def base() -> Any:
    config = LlamaConfig(vocab_size=30, num_key_value_heads=2, tie_word_embeddings=True, **SIZES)
    model = LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(30, (2, 5))


def adapt(base: Any, name: str = "default", **settings: Any) -> Any:
    config = flora.FloraConfig(**{"r": 3, "init_weights": False, **settings})
    model = peft.get_peft_model(copy.deepcopy(base), config, name)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


PLACES: list[dict[str, Any]] = [
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["lm_head"]},
    {"target_modules": ["embed_tokens", "lm_head"]},
    {"target_modules": ["lm_head"], "use_dora": True},
    {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    {"target_modules": r".*(lm_head|q_proj)", "ensure_weight_tying": True},
    {"target_modules": ["lm_head"], "ensure_weight_tying": True, "fold_pattern": {"model.embed_tokens": [5, 6, 16]}},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2, 5]},
    {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2]}, "ensure_weight_tying": True},
]


@pytest.mark.parametrize("settings", PLACES, ids=lambda settings: json.dumps(settings)[1:-1])
@torch.no_grad()
def test_the_logits_survive_saving_merging_and_reloading(settings, base, tokens, tmp_path):
    model = adapt(base, **settings)
    expected = model(tokens).logits
    assert (expected - base(tokens).logits).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(tokens).logits, expected)
    model.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(tokens).logits, expected)
    tied = settings.get("ensure_weight_tying") or "trainable_token_indices" in settings
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, expected)
    assert (
        (merged.lm_head.weight is merged.model.embed_tokens.weight) == bool(tied) == merged.config.tie_word_embeddings
    )
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.double).eval()
    torch.testing.assert_close(again(tokens).logits, expected)


@torch.no_grad()
def test_a_tied_adapter_is_the_same_update_at_both_ends(base, tokens):
    """The oracle: one weight W + delta, put in place of the weight that both ends share."""
    model = adapt(base, target_modules=["lm_head"], ensure_weight_tying=True, r=4, scale=0.7)
    embedding = model.get_base_model().model.embed_tokens
    by_hand = copy.deepcopy(base)
    by_hand.model.embed_tokens.weight += embedding.get_delta_weight("default")
    assert by_hand.lm_head.weight is by_hand.model.embed_tokens.weight
    torch.testing.assert_close(model(tokens).logits, by_hand(tokens).logits)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 3  # one core and two factors for both ends


def test_a_tied_adapter_stays_tied_in_half_precision_and_through_a_step(base, tokens):
    model = adapt(base.to(torch.bfloat16), target_modules=["embed_tokens"], ensure_weight_tying=True)
    model(tokens, labels=tokens).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    ends = (model.get_base_model().model.embed_tokens, model.get_base_model().lm_head)
    first, second = (end.get_delta_weight("default") for end in ends)
    assert first.dtype == torch.float32
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@torch.no_grad()
def test_unmerging_gives_back_the_very_weight_that_was_shared(base, tokens):
    model = adapt(base, target_modules=["lm_head"])
    model.add_adapter("other", flora.FloraConfig(r=2, target_modules=["lm_head"], init_weights=False))
    inner = model.get_base_model()
    shared, before = inner.model.embed_tokens.weight, inner.model.embed_tokens.weight.clone()
    model.merge_adapter(["default", "other"])
    torch.testing.assert_close(inner.model.embed_tokens.weight, before, rtol=0, atol=0)
    model.unmerge_adapter()
    assert inner.lm_head.base_layer.weight is shared is inner.model.embed_tokens.weight
    torch.testing.assert_close(shared, before, rtol=0, atol=0)


@torch.no_grad()
def test_an_encoder_and_decoder_that_share_one_embedding():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    base = T5ForConditionalGeneration(T5Config(vocab_size=30, tie_word_embeddings=True, **sizes)).double().eval()
    tokens = torch.randint(1, 30, (2, 5))
    for settings in (
        {"target_modules": ["lm_head", "q"]},
        {"target_modules": ["lm_head"], "ensure_weight_tying": True},
    ):
        model = adapt(base, **settings)
        expected = model(input_ids=tokens, labels=tokens).logits
        assert (expected - base(input_ids=tokens, labels=tokens).logits).abs().max() > 1e-4
        torch.testing.assert_close(model.merge_and_unload()(input_ids=tokens, labels=tokens).logits, expected)


@torch.no_grad()
def test_only_the_named_tokens_change(base):
    model = adapt(base, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    merged = model.merge_and_unload().model.embed_tokens.weight
    changed = (merged != base.model.embed_tokens.weight).any(1)
    assert changed.nonzero().flatten().tolist() == [1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["embed_tokens"], "trainable_token_indices": [1]},
            "trainable_token_indices: model.embed_to",
        ),
        ({"target_modules": ["lm_head"], "trainable_token_indices": [1]}, "trainable_token_indices: lm_head is also"),
        (
            {"target_modules": ["lm_head"], "ensure_weight_tying": True, "use_dora": True},
            "ensure_weight_tying: lm_head cannot share magnitudes",
        ),
        ({"target_modules": ["q_proj"], "trainable_token_indices": []}, "trainable_token_indices: must be a list"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [True]}, "trainable_token_indices: must be a list"),
        ({"target_modules": ["q_proj"], "ensure_weight_tying": 1}, "ensure_weight_tying: must be True or False"),
    ],
)
def test_what_cannot_be_tied_is_one_clear_line(settings, message, base):
    with pytest.raises(ValueError, match=f"^{message}"):
        adapt(base, **settings)


def test_different_tokens_at_the_ends_of_a_tied_weight_are_not_merged(base):
    model = adapt(base, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [3]})
    with pytest.raises(ValueError, match=r"^trainable_token_indices: the ends of a tied weight train different tokens"):
        model.merge_and_unload()
