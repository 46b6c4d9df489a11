"""Other people's trainers: TRL, sentence-transformers, transformers; losses and gradients of three of their steps."""

import copy
from typing import Any
from unittest import mock

import datasets
import torch
import transformers
from torch import Tensor, nn

from ..frame import trial
from ..methods import Method
from ..reference import SINGLE, assert_close, assert_same_gradients, by_hand, gradients

WORDS = [f"word{number}" for number in range(24)]
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
# What makes three steps comparable; all else is as the trainer's users find it, gradient checkpointing included.
PLAIN = {
    "output_dir": "out", "max_steps": 3, "per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 0.02,
    "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": "none", "save_strategy": "no", "use_cpu": True,
    "disable_tqdm": True, "logging_steps": 1,
}  # fmt: skip


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)


def sentences(count: int, seed: int = 0) -> list[str]:
    draws = torch.randint(len(WORDS), (count, 6), generator=torch.Generator().manual_seed(seed)).tolist()
    return [" ".join(WORDS[i] for i in row) for row in draws]


SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(**settings: Any) -> transformers.LlamaForCausalLM:
    torch.manual_seed(3)
    # Weights large enough that the update matters to the loss.
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, initializer_range=0.2, **settings))


def qwen() -> transformers.Qwen2ForCausalLM:
    torch.manual_seed(3)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, initializer_range=0.2))


def steps_of(trainer: Any, method: Method, network: nn.Module) -> tuple[list[Tensor], list[dict]]:
    """Train; the loss and the adapter's gradients of each step."""
    losses, found = [], []
    own = trainer.training_step

    def step(*args: Any, **kwargs: Any) -> Tensor:
        loss = own(*args, **kwargs)
        losses.append(loss.detach().clone())
        found.append(gradients(method, network))
        return loss

    trainer.training_step = step
    torch.manual_seed(5)
    trainer.train()
    assert len(losses) == 3
    return losses, found


def same_steps(method: Method, adapted: Any, reference: Any, tolerance: float = SINGLE) -> None:
    """Both trainers take the same steps. ``adapted``, ``reference``: a trainer, with its network or ``.model``."""
    results = [steps_of(trainer, method, network) for trainer, network in (adapted, reference)]
    for step, (loss, expected) in enumerate(zip(results[0][0], results[1][0], strict=True)):
        assert_close(loss, expected, tolerance, f"loss of step {step}", floor=1e-3)
        assert_same_gradients(results[0][1][step], results[1][1][step], tolerance)


def with_trl(method: Method, build, base: nn.Module, targets: Any = TARGETS, **settings: Any) -> None:
    """``build(model, peft_config, ref_model)`` gives a trainer."""
    adapted = build(copy.deepcopy(base), method.config(targets, task_type="CAUSAL_LM", **settings), None)
    reference = by_hand(method, base, adapted.model)
    by_itself = build(reference, None, copy.deepcopy(base))
    same_steps(method, (adapted, adapted.model), (by_itself, reference))


@trial("trl", "SFTTrainer, its default settings (gradient checkpointing), three steps", needs=("trl",), slow=True)
def sft(method: Method) -> None:
    from trl import SFTConfig, SFTTrainer

    data = datasets.Dataset.from_dict({"text": sentences(8)})

    def build(model, config, ref):
        arguments = SFTConfig(**PLAIN, bf16=False, max_length=16)
        assert arguments.gradient_checkpointing
        return SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer(), peft_config=config)

    with_trl(method, build, llama())
    with_trl(method, build, qwen(), "all-linear")


@trial("trl", "DPOTrainer, its default settings, three steps", needs=("trl",), slow=True)
def dpo(method: Method) -> None:
    from trl import DPOConfig, DPOTrainer

    columns = {"prompt": sentences(8), "chosen": sentences(8, 1), "rejected": sentences(8, 2)}
    data = datasets.Dataset.from_dict(columns)

    def build(model, config, ref):
        arguments = DPOConfig(**PLAIN, bf16=False, max_length=32)
        assert arguments.gradient_checkpointing
        settings = {"train_dataset": data, "processing_class": tokenizer(), "peft_config": config}
        return DPOTrainer(model, ref, args=arguments, **settings)

    with_trl(method, build, llama())


@trial("trl", "KTOTrainer, its default settings, three steps", needs=("trl",), slow=True)
def kto(method: Method) -> None:
    from trl import KTOConfig, KTOTrainer

    data = datasets.Dataset.from_dict(
        {"prompt": sentences(8), "completion": sentences(8, 1), "label": [True, False] * 4}
    )

    def build(model, config, ref):
        arguments = KTOConfig(**PLAIN, bf16=False, max_length=32)
        assert arguments.gradient_checkpointing
        settings = {"train_dataset": data, "processing_class": tokenizer(), "peft_config": config}
        return KTOTrainer(model, ref, args=arguments, **settings)

    with_trl(method, build, llama())


@trial("trl", "GRPOTrainer (generates, then trains), its default settings, three steps", needs=("trl",), slow=True)
def grpo(method: Method) -> None:
    from trl import GRPOConfig, GRPOTrainer

    data = datasets.Dataset.from_dict({"prompt": sentences(8)})

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    def build(model, config, ref):
        arguments = GRPOConfig(**PLAIN, bf16=False, num_generations=2, max_completion_length=6)
        assert arguments.gradient_checkpointing
        settings = {"train_dataset": data, "processing_class": tokenizer(), "peft_config": config}
        return GRPOTrainer(model, reward, args=arguments, **settings)

    with_trl(method, build, llama().double())


@trial("transformers", "Trainer with gradient_checkpointing and an evaluation after each step, three steps")
def trainer(method: Method) -> None:
    base = llama()
    ids = tokenizer()(sentences(8))["input_ids"]
    data = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})

    def build(model: nn.Module) -> transformers.Trainer:
        arguments = transformers.TrainingArguments(
            **PLAIN, gradient_checkpointing=True, eval_strategy="steps", eval_steps=1
        )
        return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)

    adapted = method.wrap(copy.deepcopy(base), TARGETS, task_type="CAUSAL_LM")
    reference = by_hand(method, base, adapted)
    adapted.enable_input_require_grads()
    same_steps(method, (build(adapted), adapted), (build(reference), reference))


def encoder() -> Any:
    """A sentence-transformers model of a tiny BERT."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    torch.manual_seed(3)
    sizes = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads",)}
    transformers.BertModel(transformers.BertConfig(**sizes, initializer_range=0.2)).eval().save_pretrained("bert")
    tokenizer().save_pretrained("bert")
    words = Transformer("bert", max_seq_length=16)
    return SentenceTransformer(modules=[words, Pooling(32)], device="cpu")


def train_encoder(model: Any) -> Any:
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    data = datasets.Dataset.from_dict({"anchor": sentences(8), "positive": sentences(8, 1)})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return SentenceTransformerTrainer(
        model, SentenceTransformerTrainingArguments(**PLAIN), train_dataset=data,
        loss=MultipleNegativesRankingLoss(model),
    )  # fmt: skip


@trial(
    "sentence-transformers",
    "its Trainer over a wrapped encoder, three steps; encode",
    needs=("sentence_transformers",),
    slow=True,
)
def encoders(method: Method) -> None:
    model, reference = encoder(), encoder()
    inner = model[0].auto_model if hasattr(model[0], "auto_model") else model[0].model
    base = copy.deepcopy(inner)
    adapted = method.wrap(inner, ["query", "value", "intermediate.dense"])
    name = "auto_model" if hasattr(model[0], "auto_model") else "model"
    _put(model[0], name, adapted)
    hand = by_hand(method, base, adapted)
    _put(reference[0], name, hand)
    same_steps(method, (train_encoder(model), adapted), (train_encoder(reference), hand))
    vectors = [torch.from_numpy(m.encode(sentences(3))) for m in (model, reference)]
    assert_close(*vectors, SINGLE, "embeddings after training")


def _put(owner: nn.Module, name: str, network: nn.Module) -> None:
    kept = next(key for key, child in owner._modules.items() if child is getattr(owner, name))
    owner._modules[kept] = network


@trial(
    "sentence-transformers",
    "add_adapter, its Trainer, three steps (transformers' check of PEFT's version set aside)",
    needs=("sentence_transformers",),
    slow=True,
)
def encoders_with_adapters(method: Method) -> None:
    model, reference = encoder(), encoder()
    with mock.patch("transformers.integrations.peft.check_peft_version"):  # 5.24 asks for a PEFT that is not out yet
        model.add_adapter(method.config(["query", "value", "intermediate.dense"]))
    inner = model.transformers_model
    hand = by_hand(method, reference.transformers_model, inner)
    _put(reference[0], "auto_model" if hasattr(reference[0], "auto_model") else "model", hand)
    same_steps(method, (train_encoder(model), inner), (train_encoder(reference), hand))
