"""Two processes train, evaluate and resume as one does."""

import peft
import pytest
import torch
from torch.nn import functional as F

import flora.models
from flora.launch import processes
from flora.methods import Full, Peft
from flora.methods.heads import in_head
from flora.models import TransformersModel
from flora.tasks import ImageDataset
from flora.tasks.metrics import Classification
from flora.tasks.text.causal import answer_logits
from flora.tasks.text.dataset import TextDataset
from flora.tasks.text.task import classify
from flora.training import Trainer, TrainerSettings, evaluate
from flora.training.sharding import gathered, shard
from tests.training.processes import together
from tests.training.test_resume import checkpointed_run, interrupted, result
from tests.training.test_run import ToyModel, ToyTask, channels

pytestmark = pytest.mark.dist

STEPS = 20
EXAMPLES = 45  # batches of 8 or 4, then one of 5 or 1: processes have 3 and 2 of it, or one of them nothing
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
BERT = TINY | {"model_type": "bert", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = TINY | {"model_type": "llama", "num_key_value_heads": 2}


class Recorded(Trainer):
    """Keeps the loss of every forward pass, in full precision."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def images(count):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return ImageDataset(pixels, torch.randint(10, (count,), generator=generator))


def texts(count, per_token):
    """Texts of 4 to 9 tokens, with a label each, or with the last 1 to 3 tokens as targets."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 10, (count,), generator=generator)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = {"input_ids": torch.randint(4, 40, (int(lengths.sum()),), generator=generator, dtype=torch.int32)}
    if not per_token:
        labels = {"labels": torch.randint(10, (count,), generator=generator)}
        return TextDataset(tokens, starts, labels, {"input_ids": 0})
    targets = torch.full_like(tokens["input_ids"], -100)
    for i, end in enumerate(starts[1:].tolist()):
        targets[end - 1 - i % 3 : end] = tokens["input_ids"][end - 1 - i % 3 : end]
    return TextDataset(tokens | {"labels": targets}, starts, {}, {"input_ids": 0, "labels": -100}, left=True)


def language(module, batch, training):
    return answer_logits(module, batch, batch["labels"])


def plain_loss(outputs, labels, label_smoothing):
    """In the outputs' own precision, unlike the task's."""
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten().long())


def network(name):
    """Model spec, dataset and forward pass of a case."""
    if name == "convnext":
        spec = flora.models.get("convnext")

        def forward(module, batch, training):
            return module(spec.normalize(batch["pixel_values"])), batch["labels"]

        return spec, images(EXAMPLES), forward
    if name == "minilm":
        spec = flora.models.get("minilm_l6")
        spec.head_dropout = 0.0
        spec.architecture |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return spec, texts(EXAMPLES, False), classify
    kind = {"bert": "sequence_classification", "llama": "causal_lm"}[name]
    head = ["classifier"] if name == "bert" else []
    spec = TransformersModel(name, kind, BERT if name == "bert" else LLAMA, head, False, adapter_targets="all")
    return spec, texts(EXAMPLES, name == "llama"), classify if name == "bert" else language


def fit(folder, name, dtype=torch.float64, precision="fp32", **options):
    """Train an adapter: the loss of every pass, the trained weights, what the trainer says of itself."""
    spec, dataset, forward = network(name)
    torch.manual_seed(0)
    targets = "all" if name in ("bert", "llama") else spec.adapter_targets
    method = Peft("flora", "flora.FloraConfig", targets, r=3, kernel_rank=2, init_weights=False, scale=0.1)
    model = method.apply(spec.build(10), spec.classifier).model.to(dtype)

    def cast(module, batch, training):
        converted = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
        return forward(module, converted, training)

    if name == "convnext":
        model.register_forward_pre_hook(lambda module, inputs: tuple(value.to(dtype) for value in inputs))
    batch = 4 if name == "convnext" else 8
    defaults = {"epochs": 9, "lr": 1e-2, "batch_size": batch, "max_steps": STEPS, "device": "cpu", "warmup_ratio": 0.0}
    if precision == "bf16":
        options |= {"dtype": "bf16", "frozen_dtype": "bf16"}
    settings = TrainerSettings(**(defaults | options))
    trainer = Recorded(
        model, settings, cast, spec.classifier, Classification(), "accuracy", folder, dataset, loss=plain_loss
    )
    trainer.train()
    kinds = {type(p).__name__ for p in model.parameters()}, {str(p.dtype) for p in model.parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    with gathered(model):
        if processes.first():
            method.save(model, folder / "adapter")
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": trainer.losses, "kinds": kinds, "history": history, "trained": trained}


def same_as_one(folder, name, tolerance=1e-9, **options):
    """Both runs' results; losses of the passes agree, and so do the adapters."""
    both = together(folder / "two", fit, folder / "two", name, **options)
    alone = fit(folder, name, **{k: v for k, v in options.items() if k != "distributed"})
    losses = mean_losses(both)
    assert len(losses) == STEPS * options.get("gradient_accumulation", 1)
    assert losses == pytest.approx(alone["losses"], rel=tolerance, abs=0)
    assert both[0]["losses"] != both[1]["losses"], "each has its own part"
    assert both[0]["history"] == both[1]["history"] == pytest.approx(alone["history"], rel=max(tolerance, 1e-6))
    return both, alone


def mean_losses(both):
    return [sum(losses) / 2 for losses in zip(*(process["losses"] for process in both), strict=True)]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["convnext", "bert", slow("minilm"), slow("llama")])
def test_two_processes_train_as_one(tmp_path, name):
    same_as_one(tmp_path, name)


@pytest.mark.slow
def test_accumulated_batches_are_shared_out_as_well(tmp_path):
    same_as_one(tmp_path, "bert", gradient_accumulation=2)


def test_shards_train_as_one_process_and_save_a_plain_adapter(tmp_path):
    both, _ = same_as_one(tmp_path, "bert", distributed="fsdp")
    assert both[0]["kinds"][0] == {"DTensor"}
    assert any(in_head(name.removeprefix("base_model.model."), ["classifier"]) for name in both[0]["trained"])
    compare_adapters("bert", tmp_path, both[0]["trained"], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext", "llama"])
def test_shards_train_other_networks(tmp_path, name):
    both, _ = same_as_one(tmp_path, name, distributed="fsdp")
    compare_adapters(name, tmp_path, both[0]["trained"], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_a_frozen_model_in_bf16_carries_adapters_in_fp32_in_shards(tmp_path):
    options = {"dtype": torch.float32, "precision": "bf16"}
    both = together(tmp_path / "two", fit, tmp_path / "two", "llama", **options, distributed="fsdp")
    alone = fit(tmp_path, "llama", **options)
    assert both[0]["kinds"] == ({"DTensor"}, {"torch.bfloat16", "torch.float32"})
    assert mean_losses(both) == pytest.approx(alone["losses"], rel=2e-2)
    compare_adapters("llama", tmp_path, both[0]["trained"], rtol=0.2, atol=0.02)


def compare_adapters(name, folder, trained, **tolerance):
    """What the two processes saved, in a fresh model of one process, is what one process saved."""
    sharded, plain = (load_adapter(name, folder / place) for place in ("two/adapter", "adapter"))
    assert sharded.keys() == plain.keys() >= trained
    for name in trained:
        assert type(sharded[name]) is torch.Tensor
        torch.testing.assert_close(sharded[name], plain[name], **tolerance)


def load_adapter(name, folder):
    """The state of a fresh base model with a saved adapter."""
    torch.manual_seed(0)
    return peft.PeftModel.from_pretrained(network(name)[0].build(10), str(folder)).state_dict()


class Unreadable(ImageDataset):
    """Some images cannot be decoded and are left out of their batches."""

    def __getitems__(self, indices):
        return super().__getitems__([index for index in indices if index % 7 != 3])


def scored(counts):
    """Metrics of one network on so many examples, and where some cannot be read."""
    processes.start(cpu=True)
    torch.manual_seed(0)
    model, spec = ToyModel().build(3), ToyModel()
    sets = [channels(count, 5) for count in counts]
    sets.append(Unreadable(sets[0].images, sets[0].labels))
    return [evaluate(model, spec, ToyTask(), dataset, batch_size=64, device="cpu") for dataset in sets]


def test_every_example_is_counted_once_in_an_evaluation(tmp_path):
    counts = [2003, 129, 65, 64, 3, 1]  # the last batches: full, one example too many, and fewer than processes
    alone, both = scored(counts), together(tmp_path, scored, counts)
    assert both[0] == both[1]
    for metrics in (alone[-1], both[0][-1]):
        del metrics["loss"]  # one process counts the mean of every batch alike, however many of it could be read
    for metrics, expected in zip(both[0], alone, strict=True):
        assert metrics.pop("loss", 0) == pytest.approx(expected.pop("loss", 0), rel=1e-6)
        assert metrics == expected
    assert 0.2 < alone[0]["accuracy"] != alone[-1]["accuracy"] < 0.5


def written(count):
    """What a language model writes, in shards; each process's text is as long as its place asks."""
    processes.start(cpu=True)
    torch.manual_seed(0)
    model = network("llama")[0].build(0).eval()
    if count > 1:
        shard(model, torch.device("cpu"))
    prompts = torch.arange(4, 9)[None]
    lengths = [3, 7] if count == 1 else [3 + 4 * processes.index()]
    return [model.generate(input_ids=prompts, max_new_tokens=n, do_sample=False, eos_token_id=None) for n in lengths]


@pytest.mark.slow
def test_shards_write_texts_of_different_lengths(tmp_path):
    alone, both = written(1), together(tmp_path, written, 2)
    assert [text.tolist() for (text,) in both] == [text.tolist() for text in alone]


def resumable(folder, writes=None, **options):
    """A run to its end, or until it has written so many checkpoints and every process dies."""
    processes.start(cpu=True)
    made = checkpointed_run(folder, method=Full("full"), **options)
    if writes is not None:
        with pytest.MonkeyPatch.context() as patch:
            interrupted(made, patch, writes)
        return None
    outcome = made.train()
    with gathered(outcome.adapted.model):
        return (result(outcome) if processes.first() else None), outcome.trainer.resumed_at


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"distributed": "fsdp", "ema_decay": 0.9}], ids=["ddp", "fsdp"])
def test_a_run_of_two_processes_goes_on_where_it_was(tmp_path, options):
    calm = together(tmp_path / "calm", resumable, tmp_path / "calm", **options)
    together(tmp_path / "killed", resumable, tmp_path / "killed", 4, **options)
    resumed = together(tmp_path / "killed", resumable, tmp_path / "killed", **options)
    assert resumed[0] == (calm[0][0], [4])
    assert resumed[1] == (None, [4])
