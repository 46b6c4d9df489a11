"""Vision-language models: put together from their parts, their prompts, projectors from stage to stage."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import flora.models
from flora.errors import ConfigError, WeightsError
from flora.methods import LinearProbe, Peft
from flora.methods.base import load
from flora.methods.heads import trained
from flora.models import Llava, TimmModel, TransformersModel
from flora.models.chat import CHATS
from tests.tasks.chats import architecture, chatml_tokenizer, tiny_llava, vicuna_and_clip

PROJECTOR = "model.multi_modal_projector"
TURNS = [("what is it?", "a dog"), ("what color?", "red")]


def logits(model, spec, seed=0):
    """Of two texts with an image each."""
    torch.manual_seed(seed)
    images = torch.randn(2, 3, spec.image_size, spec.image_size)
    ids = torch.tensor([[5, *[4] * spec.image_tokens, 7, 8]] * 2)
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=images).logits


def test_chatml_is_what_the_template_of_smollm2_writes():
    messages = [{"role": "system", "content": ""}]
    for question, answer in TURNS:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    written, _ = CHATS["chatml"].write(TURNS)
    template = chatml_tokenizer().apply_chat_template
    assert written + "\n" == template(messages, tokenize=False)
    asked, places = CHATS["chatml"].write([TURNS[0], (TURNS[1][0], None)])
    assert asked == template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert places[-1].answer == places[-1].end == len(asked)
    named, _ = CHATS["chatml"].saying("You are SmolLM").write(TURNS)
    assert named + "\n" == template([{"role": "system", "content": "You are SmolLM"}, *messages[1:]], tokenize=False)


def test_vicuna_is_what_llava_was_trained_on():
    text, places = CHATS["vicuna"].write([("<image>\nWhat is it?", "A dog."), ("What color?", "Red.")])
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. "
        "USER: <image>\nWhat is it? ASSISTANT: A dog.</s>USER: What color? ASSISTANT: Red.</s>"
    )
    assert [text[place.answer : place.end] for place in places] == [" A dog.</s>", " Red.</s>"]
    assert [text[place.header : place.answer] for place in places] == [" ASSISTANT:"] * 2


def test_parts_are_put_together_with_a_fresh_projector(tmp_path):
    sizes = architecture()
    language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes["text_config"], tie_word_embeddings=True))
    language.save_pretrained(tmp_path / "language")
    tower = TimmModel("test_convnext", pretrained=False).build(7)
    save_file(tower.state_dict(), tmp_path / "tower.safetensors")
    sizes["text_config"]["tie_word_embeddings"] = sizes["tie_word_embeddings"] = True
    parts = (
        TimmModel("test_convnext", weights=str(tmp_path / "tower.safetensors")),
        TransformersModel("l", "causal_lm", sizes["text_config"], weights=str(tmp_path / "language")),
    )
    spec = Llava("together", sizes, "chatml", image_size=64, patch_size=32, parts=parts)
    torch.manual_seed(1)
    model = spec.build(0).eval()
    images, texts = torch.randn(2, 3, 64, 64), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model.model.vision_tower(images).last_hidden_state, tower.eval().forward_features(images))
        assert torch.equal(model(texts).logits, language.eval()(texts).logits)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert {"vision", "language"} < spec.facts.keys()
    torch.manual_seed(1)
    again, other = spec.build(0), spec.build(0)
    ours, same, fresh = (m.get_submodule(PROJECTOR).linear_1.weight for m in (model, again, other))
    assert torch.equal(ours, same)
    assert not torch.equal(ours, fresh)
    assert 0.01 < float(ours.detach().std()) < 0.03


def test_vicuna_and_clip_of_local_folders_become_a_llava_with_a_fresh_projector(tmp_path):
    options = vicuna_and_clip(tmp_path)
    spec = Llava("v", chat="vicuna", **options)
    torch.manual_seed(1)
    model = spec.build(0).eval()
    language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options["architecture"]["text_config"]))
    state = {}
    for shard in (tmp_path / "vicuna").glob("*.bin"):
        state |= torch.load(shard)
    language.load_state_dict(state)
    clip = transformers.CLIPModel.from_pretrained(tmp_path / "clip").vision_model.eval()
    images, texts = torch.randn(2, 3, 16, 16), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(texts).logits, language.eval()(texts).logits)
        before_last = clip(images, output_hidden_states=True).hidden_states[-2][:, 1:]  # without the class token
        seen = torch.stack(list(model.model.get_image_features(images).pooler_output))
        assert torch.allclose(seen, model.model.multi_modal_projector(before_last), atol=1e-6)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"]), "it is not tied to the embeddings"
    assert spec.facts.keys() == {"model_type", "pretrained", "vision", "language"}
    assert len(spec.facts["language"]["shards"]) == 2
    assert "sha256" in spec.facts["vision"]
    assert spec.tokenizer().pad_token_id == spec.image_id == 0
    transformers.CLIPVisionModel.from_pretrained(tmp_path / "clip").save_pretrained(tmp_path / "tower")
    torch.manual_seed(1)
    alone = Llava("v", chat="vicuna", **options | {"vision_weights": str(tmp_path / "tower")}).build(0)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), model.parameters(), strict=True))


def test_parts_of_something_else_are_refused(tmp_path):
    options = vicuna_and_clip(tmp_path)
    with pytest.raises(ConfigError, match="go together"):
        Llava("v", chat="vicuna", **options | {"vision_weights": None})
    with pytest.raises(WeightsError, match=r"vicuna.* holds no vision tower of CLIP"):
        Llava("v", chat="vicuna", **options | {"vision_weights": str(tmp_path / "vicuna")}).build(0)
    larger = options["architecture"] | {
        "text_config": options["architecture"]["text_config"] | {"num_hidden_layers": 3}
    }
    with pytest.raises(
        WeightsError, match=r"is not of v: 9 tensors are missing, first model\.language_model\.layers\.2"
    ):
        Llava("v", chat="vicuna", **options | {"architecture": larger}).build(0)


def test_a_map_of_features_is_read_row_by_row(tmp_path):
    spec = tiny_llava(tmp_path)
    model = spec.build(0).eval().model
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = torch.stack(model.get_image_features(images).pooler_output)
        grid = model.vision_tower(images).last_hidden_state
        assert features.shape == (2, spec.image_tokens, 16)
        for token, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            expected = model.multi_modal_projector(grid[:, :, row, column])
            assert torch.allclose(features[:, token], expected, atol=1e-6)


@pytest.mark.parametrize("grid", [True, False])
def test_the_projector_of_stage_1_starts_stage_2_and_one_adapter_holds_all(tmp_path, grid):
    spec = tiny_llava(tmp_path, grid=grid)
    torch.manual_seed(0)
    probe = LinearProbe("linear_probe")
    first = probe.apply(spec.build(0), spec.classifier).model
    assert trained(first, spec.classifier)[0] == 0
    with torch.no_grad():
        for parameter in first.get_submodule(PROJECTOR).parameters():
            parameter.normal_()
    probe.save(first, tmp_path / "stage1" / "adapter")
    assert all(name.startswith(PROJECTOR) for name in load_file(tmp_path / "stage1" / "adapter" / "model.safetensors"))

    options = {"target_modules": r".*language_model.*\.(q_proj|up_proj)", "r": 2}
    method = Peft("flora", "flora.FloraConfig", **options)
    starts = tiny_llava(tmp_path, grid=grid, projector=str(tmp_path / "stage1"))
    torch.manual_seed(0)
    base = starts.build(0)
    assert torch.equal(logits(base, spec), logits(first, spec))
    adapted = method.apply(base, starts.classifier)
    assert len(adapted.ranks) == 2 * 2
    with torch.no_grad():
        for parameter in adapted.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    method.save(adapted.model, tmp_path / "stage2")
    torch.manual_seed(0)
    again = load(spec.build(0), spec.classifier, tmp_path / "stage2").model  # the projector is in the adapter
    assert torch.equal(logits(again, spec), logits(adapted.model, spec))
    assert not torch.allclose(logits(again, spec), logits(first, spec))
    third = tiny_llava(tmp_path, grid=grid, projector=str(tmp_path / "stage2")).build(0)
    kept = adapted.model.base_model.model.get_submodule(PROJECTOR).modules_to_save["default"].linear_2.weight
    assert torch.equal(third.get_submodule(PROJECTOR).linear_2.weight, kept)
    assert starts.facts["projector"]["path"].endswith("stage1/adapter/model.safetensors")


def test_weights_of_the_hub_are_read_under_their_old_names(tmp_path):
    torch.manual_seed(3)
    model = transformers.AutoModelForImageTextToText.from_config(
        transformers.AutoConfig.for_model(**architecture(grid=False))
    )
    old = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower."}
    old |= {f"{PROJECTOR}.": "multi_modal_projector.", "lm_head.": "language_model.lm_head."}
    state = {
        new + name.removeprefix(prefix): tensor.clone()
        for name, tensor in model.state_dict().items()
        for prefix, new in old.items()
        if name.startswith(prefix)
    }
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    spec = tiny_llava(tmp_path, "vicuna", grid=False, pretrained=True, weights=str(tmp_path / "model.safetensors"))
    assert torch.equal(logits(spec.build(0), spec), logits(model, spec))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat": "poem"}, r"model\.chat=poem is unknown"),
        ({"aspect": "stretch"}, "choose one of pad, middle, squash"),
        ({"image_size": 65}, "multiple of the patch size 32"),
        ({"pretrained": True}, r"model\.weights: name a place"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, options, message):
    options = {"architecture": architecture(), "image_size": 64, "patch_size": 32} | options
    with pytest.raises(ConfigError, match=message):
        tiny_llava(tmp_path, **{"chat": "chatml"} | options)


def test_projectors_and_tokenizers_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="train the projector first"):
        tiny_llava(tmp_path, projector=str(tmp_path / "nowhere")).build(0)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"holds no projector of tiny: model\.multi_modal"):
        tiny_llava(tmp_path, projector=str(tmp_path)).build(0)
    chatml_tokenizer().save_pretrained(tmp_path / "other")
    spec = tiny_llava(tmp_path, "vicuna", grid=False)
    spec.tokenizer_place = str(tmp_path / "other")
    with pytest.raises(ConfigError, match="no token '</s>'"):
        spec.tokenizer()


@pytest.mark.slow
def test_llava_mini_is_its_parts():
    """The packages' own weights: the tower and the language model give what they give alone."""
    pytest.importorskip("gguf")
    spec = flora.models.get("llava_mini")
    model, tokenizer = spec.build(0).eval(), spec.tokenizer()
    tower, language = flora.models.get("efficientnet_lite0").build(1).eval(), flora.models.get("smollm2_135m").build(0)
    images = torch.randn(1, 3, 128, 128)
    text, _ = spec.chat.write([("What is the capital of France?", None)])
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model.model.vision_tower(images).last_hidden_state, tower.forward_features(images))
        assert torch.equal(model(ids).logits, language.eval()(ids).logits)
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0, ids.shape[1] :])
    assert spec.image_tokens == 16
    written, _ = spec.chat.write(TURNS)
    messages = [{"role": "system", "content": ""}]
    for question, answer in TURNS:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert written + "\n" == tokenizer.apply_chat_template(messages, tokenize=False)
