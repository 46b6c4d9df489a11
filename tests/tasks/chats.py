"""Chat tokenizers small enough to read, and a vision-language model small enough to run."""

import json
import string
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flora.models import Llava

CHATML_WORDS = ["\n", "?", "system", "user", "assistant", "what", "is", "red", "blue", "yes", "no"]
CHATML_WORDS += [" color", " is", " it", " no", " dog"]
VICUNA_WORDS = """A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,
detailed, and polite answers to the user's questions. USER: ASSISTANT: what color is it? red blue yes no"""
# As the GGUF file of SmolLM2-135M-Instruct has it.
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml_tokenizer(pad: str | None = "<|im_end|>") -> PreTrainedTokenizerFast:
    """Words with the space before them, as byte-level ones have it; token 4 stands for images, as in SmolLM2."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>"]
    words = [*special, *CHATML_WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\?| ?[^\s?]+"), "isolated")
    core.add_special_tokens(special)
    names = {"unk_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": pad}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = SMOLLM2_TEMPLATE
    return tokenizer


def vicuna_tokenizer() -> PreTrainedTokenizerFast:
    """Words marked at their front, as sentencepiece does; token 4 stands for images."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    words = [*special, *dict.fromkeys("▁" + word for word in VICUNA_WORDS.split()), "▁"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.add_special_tokens(special)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Characters, and bytes for what is none of them, with the space before a word marked: Llama's without merges.

    As Vicuna's, it pads with <unk>.
    """
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["<unk>", "<s>", "</s>", *bytes_, "▁", *string.ascii_letters, *".,?:'"]
    vocabulary = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def architecture(grid: bool = True) -> dict[str, Any]:
    """Sizes of a network with image token 4, over a convolutional tower or over CLIP."""
    text = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    clip = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip |= {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 8}
    timm = {"model_type": "timm_wrapper", "architecture": "test_convnext", "do_pooling": False, "hidden_size": 64}
    sizes = {"model_type": "llava_grid" if grid else "llava", "image_token_index": 4, "text_config": text}
    return sizes | {"vision_config": timm if grid else clip}


def tiny_llava(
    folder: Path, chat: str = "chatml", grid: bool = True, pad: str | None = "<|im_end|>", **options: Any
) -> Llava:
    """A random model with four tokens an image, and its tokenizer in ``folder``."""
    tokenizer = vicuna_tokenizer() if chat == "vicuna" else chatml_tokenizer(pad)
    tokenizer.save_pretrained(folder / "tokenizer")
    size = {"image_size": 64, "patch_size": 32} if grid else {}
    options = {"architecture": architecture(grid), "chat": chat, "pretrained": False} | size | options
    return Llava("tiny", tokenizer=str(folder / "tokenizer"), **options)


def vicuna_and_clip(folder: Path) -> dict[str, Any]:
    """Folders of a random Llama, in shards as Vicuna-7B-v1.5 has them, and of a random CLIP; what ``Llava`` takes."""
    sizes = architecture(grid=False) | {"image_token_index": 0}
    sizes["text_config"] |= {"vocab_size": len(tokenizer := llama_tokenizer()), "max_position_embeddings": 512}
    torch.manual_seed(5)
    language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes["text_config"]))
    vision = {key: value for key, value in sizes["vision_config"].items() if key != "model_type"}
    text = {**vision, "vocab_size": 8, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    (folder / "vicuna").mkdir(parents=True)
    names = sorted(state := language.state_dict())
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for shard, part in shards.items():
        torch.save({name: state[name] for name in part}, folder / "vicuna" / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "vicuna" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    tokenizer.save_pretrained(folder / "vicuna")
    clip.save_pretrained(folder / "clip")
    places = {"language_weights": str(folder / "vicuna"), "vision_weights": str(folder / "clip")}
    return {"architecture": sizes, **places}
