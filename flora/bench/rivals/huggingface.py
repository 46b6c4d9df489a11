"""transformers' Trainer with PEFT's LoRA, set up as transformers' own examples set it up.

Images: examples/pytorch/image-classification/run_image_classification.py with the flags of its README (evaluation and
checkpoint every epoch, the best one restored): torchvision's random resized crop and flip image by image in the data
loader's processes, a collator that stacks. Texts: examples/pytorch/text-classification/run_glue.py without padding to
the longest allowed text, which is its slower default: tokens by ``datasets``' map, padded batch by batch. A language
model: the same with prompt and answer as one text, as LLM-Adapters' finetune.py (also Alpaca-LoRA's) trains.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, Resize
from torchvision.transforms import ToTensor as AsTensor

from flora.bench.rivals.shared import Clock, Job, job, leave, lora_targets, peak_bytes


class Timed(transformers.Trainer):
    """The trainer under a clock, which stands still while it evaluates and saves."""

    clock: Clock

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See transformers."""
        with self.clock.aside():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.clock.aside():
            super()._save_checkpoint(*args, **kwargs)


class Count(transformers.TrainerCallback):
    """Tells the clock of every step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, args, state, control, **kwargs):
        """After a step."""
        self.clock.step(state.global_step)


def main() -> None:
    """Train, evaluate, save, and say what it took."""
    job_ = job()
    transformers.set_seed(job_.seed)
    parts = {"image": images, "classify": texts, "write": dialogues}[job_.kind](job_)
    model, train, validation, test = (parts.pop(name) for name in ("model", "train", "validation", "test"))
    arguments = transformers.TrainingArguments(
        output_dir=job_.output,
        per_device_train_batch_size=job_.batch,
        per_device_eval_batch_size=job_.eval_batch,
        num_train_epochs=job_.epochs,
        learning_rate=job_.lr,
        weight_decay=job_.weight_decay,
        warmup_steps=job_.warmup,  # below 1: a share
        lr_scheduler_type=job_.schedule,
        max_grad_norm=job_.max_grad_norm,
        bf16=job_.dtype == "bf16",
        use_cpu=not job_.on_gpu,
        dataloader_num_workers=job_.workers,
        remove_unused_columns=job_.kind != "image",
        label_names=["labels"],
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        seed=job_.seed,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Timed(model=model, args=arguments, train_dataset=train, eval_dataset=validation, **parts)
    trainer.clock = Clock(len(trainer.get_train_dataloader()) * job_.epochs, job_.on_gpu)
    trainer.add_callback(Count(trainer.clock))
    result = trainer.train()
    peak = peak_bytes(job_)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate(test)
    trainer.save_metrics("eval", metrics)
    leave(job_, trainer.clock, peak, model, "accuracy", metrics["eval_accuracy"])


def adapted(model: Any, job: Job, kind: str | None) -> Any:
    """The network with LoRA, its head training in full."""
    targets = job.targets or lora_targets(model, job.head)
    head = None if job.kind == "write" else [job.head]
    config = LoraConfig(
        task_type=kind, r=job.r, lora_alpha=job.alpha, target_modules=targets, modules_to_save=head, lora_dropout=0.0
    )
    return get_peft_model(model, config)


def images(job: Job) -> dict[str, Any]:
    """Classes of images in folders."""
    data = load_dataset(
        "imagefolder", data_files={split: f"{job.data}/{split}/**" for split in ("train", "validation", "test")}
    )
    normalise = Normalize(mean=job.mean, std=job.std)
    train = Compose([RandomResizedCrop(job.size), RandomHorizontalFlip(), AsTensor(), normalise])
    whole = Compose([Resize(job.size), CenterCrop(job.size), AsTensor(), normalise])

    def with_pixels(transform: Compose, rows: dict[str, Any]) -> dict[str, Any]:
        rows["pixel_values"] = [transform(image.convert("RGB")) for image in rows["image"]]
        return rows

    data["train"].set_transform(lambda rows: with_pixels(train, rows))
    for split in ("validation", "test"):
        data[split].set_transform(lambda rows: with_pixels(whole, rows))
    names = data["train"].features["label"].names
    model = transformers.AutoModelForImageClassification.from_pretrained(
        job.network, num_labels=len(names), ignore_mismatched_sizes=True
    )
    return {
        **{split: data[split] for split in ("train", "validation", "test")},
        "model": adapted(model, job, None),
        "data_collator": stacked,
        "compute_metrics": accuracy,
    }


def stacked(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Images of one size as a batch."""
    pixels = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixels, "labels": torch.tensor([example["label"] for example in examples])}


def texts(job: Job) -> dict[str, Any]:
    """Classes of texts in parquet."""
    data = load_dataset(
        "parquet", data_files={split: f"{job.data}/{split}.parquet" for split in ("train", "validation")}
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.network)
    tokens = data.map(
        lambda rows: tokenizer(rows["sentence"], truncation=True, max_length=job.max_length), batched=True
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        job.network, num_labels=len(set(data["train"]["label"]))
    )
    return {
        "train": tokens["train"],
        "validation": tokens["validation"],
        "test": tokens["validation"],
        "model": adapted(model, job, "SEQ_CLS"),
        "processing_class": tokenizer,
        "data_collator": transformers.DataCollatorWithPadding(tokenizer),
        "compute_metrics": accuracy,
    }


def accuracy(predicted: Any) -> dict[str, float]:
    """The share of classes that are right."""
    return {"accuracy": float((np.argmax(predicted.predictions, axis=1) == predicted.label_ids).mean())}


def dialogues(job: Job) -> dict[str, Any]:
    """Texts that end with an answer, of which every token is learnt."""
    splits = ("train", "validation", "test")
    data = load_dataset("json", data_files={split: f"{job.data}/{split}.jsonl" for split in splits})
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.network)
    end = tokenizer.eos_token_id

    def tokens(row: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(row["text"])["input_ids"]
        ids = (ids if ids[-1] == end else [*ids, end])[-job.max_length :]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)}

    data = data.map(tokens, remove_columns=["text"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job.network)
    model.config.use_cache = False
    words = [tokenizer(f"is {word}", add_special_tokens=False)["input_ids"][-1] for word in job.answers]

    def said(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the answers is likelier before the end of each text, and which stands there."""
        last = (labels != -100).long().cumsum(1).argmax(1)
        rows = torch.arange(len(labels), device=labels.device)
        among = torch.tensor(words, device=labels.device)
        return logits[rows, last - 2][:, among].argmax(1), (labels[rows, last - 1, None] == among).long().argmax(1)

    def right(predicted: Any) -> dict[str, float]:
        chosen, there = predicted.predictions
        return {"accuracy": float((chosen == there).mean())}

    return {
        **{split: data[split] for split in splits},
        "model": adapted(model, job, "CAUSAL_LM"),
        "processing_class": tokenizer,
        "data_collator": transformers.DataCollatorForSeq2Seq(tokenizer, padding=True),
        "compute_metrics": right,
        "preprocess_logits_for_metrics": said,
    }


if __name__ == "__main__":
    Path(job().output).mkdir(parents=True, exist_ok=True)
    main()
