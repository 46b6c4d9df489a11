"""A loop in the way of timm's train.py (github.com/huggingface/pytorch-image-models) with PEFT's LoRA.

timm's loader with its prefetcher, which normalises on the device; its random resized crop and flip; its AdamW groups,
its schedule by updates, its gradient clipping, autocast; after every epoch its top-1 accuracy on validation, read batch
by batch, and its CheckpointSaver. As there, the loss is read every 50 updates only. Colour jitter, label smoothing and
TF32 are off, as train.py has none of them by default.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
from peft import LoraConfig, get_peft_model
from timm import utils
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from flora.bench.rivals.shared import Clock, Job, job, leave, lora_targets, peak_bytes

LOG_INTERVAL = 50  # updates, as timm's
Autocast = Callable[[], AbstractContextManager[Any]]


def main() -> None:
    """Train, evaluate, save, and say what it took."""
    job_ = job()
    Path(job_.output).mkdir(parents=True, exist_ok=True)
    utils.random_seed(job_.seed, 0)
    if job_.on_gpu:
        torch.backends.cudnn.benchmark = True
    device = torch.device(job_.device)
    classes = sum(path.is_dir() for path in Path(job_.data, "train").iterdir())
    model = timm.create_model(
        job_.timm_name,
        pretrained=True,
        num_classes=classes,
        pretrained_cfg_overlay={"file": job_.weights, "num_classes": job_.weights_classes},
    )
    targets = job_.targets or lora_targets(model, job_.head)
    config = LoraConfig(r=job_.r, lora_alpha=job_.alpha, target_modules=targets, modules_to_save=[job_.head])
    model = get_peft_model(model, config).to(device)  # type: ignore[arg-type]
    optimizer = create_optimizer_v2(model, opt="adamw", lr=job_.lr, weight_decay=job_.weight_decay)
    autocast = partial(torch.autocast, device_type=device.type, dtype=torch.bfloat16, enabled=job_.dtype == "bf16")
    train, validation, test = (loader(job_, split, device) for split in ("train", "validation", "test"))
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=job_.schedule,
        num_epochs=job_.epochs,
        warmup_epochs=job_.warmup * job_.epochs,  # type: ignore[arg-type]
        step_on_epochs=False,
        updates_per_epoch=len(train),
    )
    arguments = SimpleNamespace(model=job_.timm_name)
    saver = utils.CheckpointSaver(model, optimizer, args=arguments, checkpoint_dir=job_.output, max_history=3)
    clock = Clock(len(train) * job_.epochs, job_.on_gpu)
    for epoch in range(job_.epochs):
        train_one_epoch(epoch, model, train, optimizer, scheduler, autocast, clock, job_)
        with clock.aside():
            top1 = validate(model, validation, autocast, device)
            saver.save_checkpoint(epoch, metric=top1)
            print(f"epoch {epoch}: validation {top1:.4f}", flush=True)
        scheduler.step(epoch + 1, top1)  # type: ignore[union-attr]
    peak = peak_bytes(job_)
    model.save_pretrained(f"{job_.output}/adapter")
    leave(job_, clock, peak, model, "accuracy", validate(model, test, autocast, device))


def loader(job: Job, split: str, device: torch.device) -> Any:
    """timm's loader of a split in folders of classes."""
    training = split == "train"
    return create_loader(
        create_dataset("", root=job.data, split=split, is_training=training, batch_size=job.batch),
        input_size=(3, job.size, job.size),
        batch_size=job.batch if training else job.eval_batch,
        is_training=training,
        use_prefetcher=True,
        scale=(0.08, 1.0),
        hflip=0.5,
        color_jitter=None,  # type: ignore[arg-type]
        interpolation="bicubic",
        mean=tuple(job.mean),
        std=tuple(job.std),
        crop_pct=1.0,
        num_workers=job.workers,
        pin_memory=job.on_gpu,
        device=device,
        persistent_workers=job.workers > 0,
    )


def train_one_epoch(
    epoch: int,
    model: nn.Module,
    loader: Any,
    optimizer: Any,
    scheduler: Any,
    autocast: Autocast,
    clock: Clock,
    job: Job,
) -> None:
    """One pass over the training images."""
    model.train()
    loss_fn = nn.CrossEntropyLoss()
    losses = utils.AverageMeter()
    updates = epoch * len(loader)
    for index, (images, labels) in enumerate(loader):
        with autocast():
            loss = loss_fn(model(images), labels)
        loss.backward()
        utils.dispatch_clip_grad([p for p in model.parameters() if p.requires_grad], value=job.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
        if index % LOG_INTERVAL == 0:
            losses.update(loss.item(), len(images))
            print(f"train {epoch} [{index}/{len(loader)}] loss {losses.val:.4f}", flush=True)
        scheduler.step_update(num_updates=updates, metric=losses.avg)
        clock.step(updates)


def validate(model: nn.Module, loader: Any, autocast: Autocast, device: torch.device) -> float:
    """Top-1 accuracy, from 0 to 1."""
    model.eval()
    loss_fn = nn.CrossEntropyLoss()
    losses, top1 = utils.AverageMeter(), utils.AverageMeter()
    with torch.inference_mode():
        for images, labels in loader:
            with autocast():
                outputs = model(images)
                loss = loss_fn(outputs, labels)
            (right,) = utils.accuracy(outputs, labels, topk=(1,))
            if device.type == "cuda":
                torch.cuda.synchronize()
            losses.update(loss.item(), len(images))
            top1.update(right.item(), len(images))
    return top1.avg / 100


if __name__ == "__main__":
    main()
