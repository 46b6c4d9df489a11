"""Models of transformers: training, generation, adapters added and removed by its own functions, caches, devices."""

import copy
import threading
from contextlib import suppress
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from torch import Tensor, nn

from ..frame import trial
from ..methods import Method
from ..reference import SINGLE, TIGHT, assert_close, by_hand, compare_steps, three_steps
from .trainers import SIZES, TARGETS, llama

TEXT = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokens(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 32, (rows, length), generator=torch.Generator().manual_seed(0))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def causal_loss(network: nn.Module) -> Tensor:
    return network(input_ids=tokens(), labels=tokens()).loss


def of(key: str, **inputs: Any):
    """The mean square of an output of a model of transformers."""
    return lambda network: network(**inputs)[key].square().mean()


def large(model: nn.Module) -> nn.Module:
    """Weights large enough that an update matters; in double precision, training."""
    torch.manual_seed(4)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.double().train()


@trial("transformers", "Llama: all-linear, dropout in training, three steps; logits of generation steps")
def llamas(method: Method) -> None:
    base = llama(attention_dropout=0.1).double().train()
    model = three_steps(method, base, "all-linear", causal_loss)
    reference = by_hand(method, base, model).eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ours, theirs = (m.eval().generate(input_ids=tokens(), **settings) for m in (model, reference))
    assert torch.equal(ours.sequences, theirs.sequences), "other tokens"
    assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), TIGHT, "logits")


class _Stop(transformers.StoppingCriteria):
    def __init__(self, error: type[BaseException], after: int) -> None:
        self.error, self.left = error, after

    def __call__(self, *_: Any, **__: Any) -> bool:
        self.left -= 1
        if self.left < 0:
            raise self.error("in the middle of generate")
        return False


@trial(
    "transformers", "exceptions and KeyboardInterrupt in the middle of generate(); then set_adapter, disable, training"
)
def interrupted_generation(method: Method) -> None:
    base = llama().double()
    model = method.wrap(copy.deepcopy(base), TARGETS)
    model.add_adapter("other", method.config(TARGETS))
    inner = model.get_base_model().model.layers[1].self_attn

    def interrupt(error: type[BaseException]) -> None:
        with suppress(error):
            model.generate(input_ids=tokens(), max_new_tokens=8, stopping_criteria=[_Stop(error, 2)])
        calls = iter(range(3))

        def end(*_: Any) -> None:
            if next(calls) == 2:
                raise error("in the middle of a layer")

        hook = inner.register_forward_pre_hook(end)
        with suppress(error):
            model.generate(input_ids=tokens(), max_new_tokens=8)
        hook.remove()

    for error in (RuntimeError, KeyboardInterrupt):
        interrupt(error)
        with model.disable_adapter():
            assert_close(model(tokens()).logits, base(tokens()).logits, TIGHT, "logits without adapter")
        interrupt(error)
        model.set_adapter("other")
        expected = by_hand(method, base, model, "other")(tokens()).logits
        assert_close(model(tokens()).logits, expected, TIGHT, "logits of the other adapter")
        model.set_adapter("default")
        interrupt(error)
        compare_steps(method, model, by_hand(method, base, model), causal_loss)


@trial("transformers", "generate() with the adapters changed between, with a cache and without")
def changed_between_generations(method: Method) -> None:
    base = llama().double().eval()
    model = method.wrap(copy.deepcopy(base), TARGETS).eval()
    model.add_adapter("other", method.config(TARGETS))
    for adapter in ("default", "other", "default"):
        model.set_adapter(adapter)
        reference = by_hand(method, base, model, adapter).eval()
        for cache in (True, False):
            settings = {"max_new_tokens": 5, "do_sample": False, "use_cache": cache}
            settings |= {"output_logits": True, "return_dict_in_generate": True}
            ours, theirs = (m.generate(input_ids=tokens(), **settings) for m in (model, reference))
            assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), TIGHT, "logits")


@trial("transformers", "generation in one thread (TextIteratorStreamer's way) while another thread evaluates")
def streaming(method: Method) -> None:
    base = llama().double().eval()
    model = method.wrap(copy.deepcopy(base), TARGETS).eval()
    reference = by_hand(method, base, model).eval()
    settings = {"input_ids": tokens(), "max_new_tokens": 12, "do_sample": False}
    expected, found = reference.generate(**settings), []
    thread = threading.Thread(target=lambda: found.append(model.generate(**settings)))
    thread.start()
    logits = [model(tokens()).logits for _ in range(6)]  # with gradients, beside a thread without
    thread.join()
    assert found, "the thread failed"
    assert torch.equal(found[0], expected), "other tokens"
    for value in logits:
        assert_close(value, reference(tokens()).logits, TIGHT, "logits")


@trial("transformers", "gradient_checkpointing_enable(), an evaluation before backward, three steps")
def checkpointing(method: Method) -> None:
    def loss(network: nn.Module) -> Tensor:
        value = causal_loss(network)
        with torch.no_grad():
            network(input_ids=tokens(3, 5))
        return value

    base = llama().double().train()
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    three_steps(method, base, TARGETS, loss)


@trial("transformers", "T5: encoder and decoder, three steps")
def t5(method: Method) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 32}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    three_steps(method, large(model), ["q", "v", "o", "wi", "wo"], causal_loss)


def _whisper(method: Method, targets: list[str]) -> None:
    sizes = {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 32,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
        "pad_token_id": 0, "max_source_positions": 10, "max_target_positions": 12, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 1, "suppress_tokens": [], "begin_suppress_tokens": [],
    }  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes))

    def loss(network: nn.Module) -> Tensor:
        return network(input_features=noise(2, 8, 20), labels=tokens()).loss

    three_steps(method, large(model), targets, loss)


@trial("transformers", "Whisper: encoder and decoder, three steps")
def whisper(method: Method) -> None:
    _whisper(method, ["q_proj", "v_proj", "fc1"])


@trial(
    "transformers",
    "Whisper: its convolutions, whose stride the encoder reads, three steps",
    expected={"LoRA": "fails: .*stride.*"},
)
def whisper_convolutions(method: Method) -> None:
    _whisper(method, ["conv1", "conv2"])


def wav2vec2(**settings: Any) -> transformers.Wav2Vec2Model:
    sizes = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    config = transformers.Wav2Vec2Config(
        **VISION | {"num_hidden_layers": 4}, **sizes, vocab_size=20, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4, mask_time_prob=0.0, **settings,
    )  # fmt: skip
    torch.manual_seed(3)
    return transformers.Wav2Vec2Model(config).double().train()


@trial(
    "transformers", "wav2vec2 with LayerDrop, three steps: layers left out get no gradient, AdamW moves none of them"
)
def layerdrop(method: Method) -> None:
    import numpy

    dropped: list[set[str]] = []

    def loss(network: nn.Module) -> Tensor:
        numpy.random.seed(torch.initial_seed() % 1000)  # some of its models draw there
        return network(input_values=noise(2, 400)).last_hidden_state.square().mean()

    base = wav2vec2(layerdrop=0.3)
    model = three_steps(method, base, ["q_proj", "v_proj", "intermediate_dense"], loss)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for step in range(3):
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        optimiser.zero_grad()
        torch.manual_seed(step)
        loss(model).backward()
        left_out = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
        optimiser.step()
        moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
        assert not moved & left_out, f"{min(moved & left_out)} was moved"
        dropped.append(left_out)
    assert any(dropped), "no layer was left out"


@trial("transformers", "ViT, classification, three steps")
def vit(method: Method) -> None:
    config = transformers.ViTConfig(**VISION, image_size=16, patch_size=8, num_labels=3)
    model = large(transformers.ViTForImageClassification(config))
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and n != "classifier"]
    three_steps(method, model, targets, of("logits", pixel_values=noise(2, 3, 16, 16)))


@trial("transformers", "CLIP, both towers, contrastive loss, three steps")
def clip(method: Method) -> None:
    text = {**TEXT, "max_position_embeddings": 16, "projection_dim": 32}
    vision = {**VISION, "image_size": 16, "patch_size": 8, "projection_dim": 32}
    model = large(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)))

    def loss(network: nn.Module) -> Tensor:
        return network(input_ids=tokens(), pixel_values=noise(2, 3, 16, 16), return_loss=True).loss

    three_steps(method, model, ["q_proj", "v_proj", "fc1", "fc2", "patch_embedding"], loss)


@trial("transformers", "DETR with a ResNet backbone, set-prediction loss, three steps", needs=("scipy",), slow=True)
def detr(method: Method) -> None:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=32,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, num_queries=5, num_labels=3, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(4)
    model = transformers.DetrForObjectDetection(config).eval()
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3]])}]

    def loss(network: nn.Module) -> Tensor:
        pixels = noise(1, 3, 32, 32).float()
        return network(pixel_values=pixels, pixel_mask=torch.ones(1, 32, 32).long(), labels=labels).loss

    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    three_steps(method, model, [*convolutions, "q_proj", "v_proj", "fc1", "fc2"], loss, tolerance=SINGLE)


def mixtral() -> transformers.MixtralForCausalLM:
    torch.manual_seed(3)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, initializer_range=0.2)
    return transformers.MixtralForCausalLM(config).train()


@trial("transformers", "Mixtral, a mixture of experts: attention, three steps")
def mixture(method: Method) -> None:
    three_steps(method, mixtral(), ["q_proj", "v_proj"], causal_loss, tolerance=SINGLE)


@trial("transformers", "Mixtral, its experts as bare parameters (target_parameters), three steps", skipped=("LoRA",))
def experts(method: Method) -> None:
    # LoRA's update of three modes is another than the reference writes out.
    names = ["experts.gate_up_proj", "experts.down_proj"]
    three_steps(method, mixtral(), ["q_proj"], causal_loss, target_parameters=names, tolerance=SINGLE)


@trial("transformers", "GPT-2 (Conv1D), its position embeddings included, three steps")
def gpt2(method: Method) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=32, n_positions=16)
    model = large(transformers.GPT2LMHeadModel(config))
    three_steps(method, model, ["c_attn", "c_fc", "mlp.c_proj", "wpe"], causal_loss)


@trial("transformers", "BERT, classification, three steps")
def bert(method: Method) -> None:
    model = large(transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=3))).eval()
    three_steps(
        method, model, ["query", "value", "dense"], of("logits", input_ids=tokens()), exclude_modules=["pooler.dense"]
    )


def hooks(model: nn.Module) -> int:
    """Hooks on the model and on all its parts."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@trial(
    "transformers", "model.add_adapter five times, delete and unload: no hook stays (check of PEFT's version set aside)"
)
def many_adapters(method: Method) -> None:
    with mock.patch("transformers.integrations.peft.check_peft_version"):
        base = llama().double().eval()
        before = hooks(base)
        model = copy.deepcopy(base)
        counts = []
        for number in range(5):
            model.add_adapter(method.config(TARGETS), f"adapter{number}")
            model(tokens())
            counts.append(hooks(model))
        assert len(set(counts)) == 1, f"hooks with 1 to 5 adapters: {counts}"
        for name in ("adapter4", "adapter0"):
            model.set_adapter(name)
            expected = by_hand(method, base, model, name)(tokens()).logits
            assert_close(model(tokens()).logits, expected, TIGHT, f"logits of {name}")
        model.disable_adapters()
        assert_close(model(tokens()).logits, base(tokens()).logits, TIGHT, "logits without adapters")
        model.enable_adapters()
        for number in range(1, 5):
            model.delete_adapter(f"adapter{number}")
        expected = by_hand(method, base, model, "adapter0")(tokens()).logits
        model.set_adapter("adapter0")
        assert_close(model(tokens()).logits, expected, TIGHT, "logits after deleting the others")
    unloaded = method.wrap(copy.deepcopy(base), TARGETS)
    unloaded(tokens())
    unloaded = unloaded.unload()
    assert hooks(unloaded) == before, f"{hooks(unloaded) - before} hooks are left by unload()"
    assert_close(unloaded(tokens()).logits, base(tokens()).logits, TIGHT, "logits after unload")


@trial(
    "transformers",
    "save_pretrained, from_pretrained with low_cpu_mem_usage, merge_and_unload, save of the merged model",
)
def saved_and_merged(method: Method) -> None:
    base = llama().double().eval()
    model = method.wrap(copy.deepcopy(base), TARGETS).eval()
    expected = by_hand(method, base, model)(tokens()).logits
    model.save_pretrained("adapter")
    for low in (False, True):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), "adapter", low_cpu_mem_usage=low).eval()
        assert_close(loaded(tokens()).logits, expected, TIGHT, "logits of the loaded adapter")
    loaded.merge_and_unload().save_pretrained("merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged", dtype=torch.double).eval()
    assert_close(merged(tokens()).logits, expected, TIGHT, "logits of the merged model")
