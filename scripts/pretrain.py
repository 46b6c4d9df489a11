"""Pretrain a small network on Tiny-ImageNet-200 at 64 px on one GPU: the weights that ship with flora.

    python scripts/pretrain.py --epochs 330 --compile    # model=convnext; 8 minutes on an H100, 52.3 % top-1
    python scripts/pretrain.py --architecture resnet18_narrow --epochs 160 --compile    # model=resnet; 3 min., 46.5 %

``data/tiny_imagenet`` holds train*.parquet and validation.parquet with the columns image{bytes, path} and label. Images
are decoded once and stay on the GPU, where each batch is augmented; the network is so small that everything else waits
for kernel launches. ``--bench MINUTES`` measures the step instead of training and writes the flags of the fastest way,
with the number of epochs that fits, to ``OUT/plan.txt``; a run itself always has a fixed number of epochs.

Needs torch, timm, pyarrow, pillow and safetensors; what it takes from flora needs no more, so that a bare GPU machine
can run it.
"""

import argparse
import copy
import hashlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flora.tasks.images.formats import open_image
from flora.tasks.images.mixing import MEAN, SIZE, STD, augment

CLASSES = 200


@dataclass(frozen=True)
class Architecture:
    """A network of timm's and what its recipe changes in the defaults of the options."""

    timm_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def build(self, drop_path: float = 0.0) -> nn.Module:
        """Make the network with random weights."""
        return timm.create_model(self.timm_name, num_classes=CLASSES, drop_path_rate=drop_path, **self.options)


ARCHITECTURES = {
    "convnextv2_atto": Architecture("convnextv2_atto"),
    "resnet18_narrow": Architecture(
        "resnet18",
        options={"channels": (40, 80, 160, 320)},
        recipe={"epochs": 160, "lr": 2e-3, "drop_path": 0.0, "ema": 0.9995},
    ),
}


def parse_args() -> argparse.Namespace:
    """Recipe and machine options; the defaults are the recipe of the architecture's shipped weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--architecture", choices=ARCHITECTURES, default="convnextv2_atto")
    add("--data", type=Path, default=Path("data/tiny_imagenet"), help="folder of train*.parquet and validation.parquet")
    add("--out", type=Path, default=Path("outputs/pretrain"), help="folder for weights, record and checkpoint")
    add("--epochs", type=int, default=330)
    add("--batch", type=int, default=1024)
    add("--lr", type=float, default=4e-3, help="peak learning rate of AdamW")
    add("--weight-decay", type=float, default=0.05, help="on matrices and kernels only")
    add("--warmup", type=int, default=10, help="epochs of linear warm-up before the cosine")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--drop-path", type=float, default=0.05)
    add("--smoothing", type=float, default=0.1)
    add("--ema", type=float, default=0.9998, help="decay of the weight average, per step")
    add("--crop-scale", type=float, default=0.3, help="smallest area of a random resized crop")
    add("--rotate", type=float, default=10.0, help="standard deviation of the rotation, degrees")
    add("--color", type=float, default=0.3, help="range of brightness, contrast and saturation around 1")
    add("--erase", type=float, default=0.2, help="probability of erasing a box")
    add("--mixup", type=float, default=0.4, help="alpha of the beta distribution")
    add("--mixup-prob", type=float, default=0.35)
    add("--cutmix-prob", type=float, default=0.35)
    add("--tail", type=float, default=0.08, help="last part of the epochs: no mixing, no erasing, crops above 0.6")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true", help="compile forward and backward into CUDA graphs")
    add("--channels-last", action="store_true")
    add("--limit", type=int, help="use only so many training images (a trial of the script)")
    add("--workers", type=int, default=os.cpu_count(), help="processes that decode")
    add("--save-every", type=int, default=50, help="epochs between checkpoints, from which the same command resumes")
    add("--commit", help="commit to record where the checkout has no git history")
    add("--bench", type=float, metavar="MINUTES", help="measure the step, plan the epochs of so many minutes, stop")
    parser.set_defaults(**ARCHITECTURES[parser.parse_known_args()[0].architecture].recipe)
    return parser.parse_args()


def decode(chunk: list[bytes]) -> np.ndarray:
    """Decode encoded images to uint8 ``[n, 3, 64, 64]``."""
    pixels = [np.asarray(open_image(data).convert("RGB")) for data in chunk]
    return np.stack(pixels).transpose(0, 3, 1, 2)


def load(paths: list[Path], limit: int | None, workers: int) -> tuple[Tensor, Tensor]:
    """Read parquet files: images uint8 ``[n, 3, 64, 64]`` and labels int64 ``[n]``, both on the CPU."""
    encoded: list[bytes] = []
    labels: list[int] = []
    for path in paths:
        table = pq.read_table(path, columns=["image", "label"])
        encoded += table["image"].combine_chunks().field("bytes").to_pylist()
        labels += table["label"].to_pylist()
    encoded, labels = encoded[:limit], labels[:limit]
    chunks = [encoded[i : i + 500] for i in range(0, len(encoded), 500)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        images = np.concatenate(pool.map(decode, chunks))
    return torch.from_numpy(images), torch.tensor(labels)


class Run:
    """One network in training: its average, optimiser and compiled loss."""

    def __init__(self, args: argparse.Namespace, steps: int) -> None:
        torch.manual_seed(args.seed)
        self.args, self.steps, self.step_count = args, steps, 0
        self.device = torch.device(args.device)
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        net = ARCHITECTURES[args.architecture].build(args.drop_path)
        self.net = net.to(self.device).to(memory_format=layout)
        self.average = copy.deepcopy(self.net).eval()
        decayed = [p for p in self.net.parameters() if p.ndim > 1]
        plain = [p for p in self.net.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=self.device.type == "cuda")
        self.loss = torch.compile(self._loss, mode="reduce-overhead") if args.compile else self._loss

    def _loss(self, x: Tensor, label: Tensor, share: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.net(x)
        logits = logits.float()
        own = F.cross_entropy(logits, label, reduction="none", label_smoothing=self.args.smoothing)
        other = F.cross_entropy(logits, label.roll(1, 0), reduction="none", label_smoothing=self.args.smoothing)
        return (share * own + (1 - share) * other).mean()

    def rate(self) -> float:
        """Linear warm-up, then a cosine to zero, by step."""
        warm, total = self.args.warmup * self.steps, self.args.epochs * self.steps
        if self.step_count < warm:
            return self.args.lr * (self.step_count + 1) / warm
        return self.args.lr * 0.5 * (1 + math.cos(math.pi * (self.step_count - warm) / max(1, total - warm)))

    def step(self, images: Tensor, labels: Tensor, tail: bool) -> Tensor:
        """One update on a uint8 batch and its labels; returns the loss without waiting for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        x, share = augment(images, self.args, tail)
        if self.args.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.args.compile:
            torch.compiler.cudagraph_mark_step_begin()
        loss = self.loss(x, labels, share)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), self.args.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(self.args.ema, (1 + self.step_count) / (10 + self.step_count))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.net.parameters()), 1 - decay)
        self.step_count += 1
        return loss.detach().clone()

    def epoch(self, images: Tensor, labels: Tensor, tail: bool) -> float:
        """One pass in random order, the incomplete last batch left out; returns the mean loss."""
        self.net.train()
        losses = [self.step(images[index], labels[index], tail) for index in self.shuffled(len(images))]
        return torch.stack(losses).mean().item()

    def shuffled(self, n: int) -> Sequence[Tensor]:
        """Indices below n in random order, by batches, the incomplete last one left out."""
        return torch.randperm(n, device=self.device)[: self.steps * self.args.batch].split(self.args.batch)

    @torch.no_grad()
    def recalibrate(self, images: Tensor) -> None:
        """Measure the statistics of the average's batch norms: of averaged weights, no step has seen any.

        Means over batches of one pass with the tail's augmentation (PreciseBN, Wu and Johnson 2021, section 3).
        """
        norms = [module for module in self.average.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # weighs all batches alike
            norm.train()
        for index in self.shuffled(len(images)) if norms else ():
            x, _ = augment(images[index], self.args, tail=True)
            with torch.autocast(self.device.type, torch.bfloat16):
                self.average(x)
        self.average.eval()

    def save(self, path: Path, epoch: int, seconds: float) -> None:
        """Write what a later call needs to go on after this epoch, and the seconds spent so far."""
        state = {
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": epoch,
            "seconds": seconds,
            "rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else torch.get_rng_state(),
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def restore(self, path: Path) -> tuple[int, float]:
        """Read a checkpoint; returns the epochs done and the seconds they took."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        (torch.cuda.set_rng_state if self.device.type == "cuda" else torch.set_rng_state)(state["rng"].cpu())
        self.step_count = state["epoch"] * self.steps
        return state["epoch"], state["seconds"]


@torch.no_grad()
def accuracy(
    net: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy on whole images, under autocast unless dtype is float32."""
    was_training = net.training
    net.eval()
    shape = (3, 1, 1)
    mean = torch.tensor(MEAN, device=images.device).view(shape)
    std = torch.tensor(STD, device=images.device).view(shape)
    top1 = top5 = 0
    for x, y in zip(images.split(1000), labels.split(1000), strict=True):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = net((x.float() / 255 - mean) / std)
        hits = logits.topk(5, dim=1).indices == y[:, None]
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.sum())
    net.train(was_training)
    return top1 / len(labels), top5 / len(labels)


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a host clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def bench(args: argparse.Namespace, images: Tensor, labels: Tensor, full: int = 100_000) -> None:
    """Time the step four ways and write flags and epochs for ``args.bench`` minutes over ``full`` images."""
    best = math.inf
    for compiled, last in [(False, True), (False, False), (True, True), (True, False)]:
        trial = argparse.Namespace(**{**vars(args), "compile": compiled, "channels_last": last})
        name = " ".join(f for f, on in [("--compile", compiled), ("--channels-last", last)] if on)
        start = time.perf_counter()
        try:
            torch._dynamo.reset()
            run = Run(trial, steps=len(images) // args.batch)
            run.net.train()
            batch, target = images[: args.batch], labels[: args.batch]
            for _ in range(5):
                run.step(batch, target, tail=False)
            synchronize(run.device)
            ready = time.perf_counter() - start
            rounds = 60 if run.device.type == "cuda" else 1
            start = time.perf_counter()
            for _ in range(rounds):
                run.step(batch, target, tail=False)
            synchronize(run.device)
        except Exception as error:  # one way that fails must not cost the others their turn
            print(f"bench {name or 'eager':28s} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        milliseconds = (time.perf_counter() - start) / rounds * 1e3
        speed = args.batch / milliseconds * 1e3
        print(
            f"bench {name or 'eager':28s} {milliseconds:7.2f} ms a step, {speed:8.0f} images/s, ready in {ready:.1f} s",
            flush=True,
        )
        if milliseconds < best:
            best = milliseconds
            epoch_seconds = best / 1e3 * (full // args.batch)
            plan = f"--epochs {int(args.bench * 60 / epoch_seconds)} {name}".strip()
            (args.out / "plan.txt").write_text(plan + "\n")
            print(f"plan: {plan} ({epoch_seconds:.2f} s an epoch)", flush=True)


def commit_of(args: argparse.Namespace) -> str:
    """The commit given, else that of the checkout, else "unknown"."""
    here = Path(__file__).resolve().parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return args.commit or head.stdout.strip() or "unknown"


def ship(args: argparse.Namespace, run: Run, validation: tuple[Tensor, Tensor], seconds: float) -> None:
    """Write the better of raw and averaged weights in fp16, buffers as they are, and the record of how they came."""
    architecture = ARCHITECTURES[args.architecture]
    built = {"architecture": architecture.timm_name, **architecture.options}
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    scores = {"raw": accuracy(run.net, *validation), "ema": accuracy(run.average, *validation)}
    chosen = max(scores, key=lambda name: scores[name][0])
    net = run.net if chosen == "raw" else run.average
    buffers = dict(net.named_buffers())  # small, and a variance may be below or above what fp16 holds
    weights = {k: (v if k in buffers else v.half()).contiguous().cpu() for k, v in net.state_dict().items()}
    path = args.out / f"{args.architecture}_tiny_imagenet.safetensors"
    described = {key: str(value) for key, value in {**built, "num_classes": CLASSES}.items()}
    save_file(weights, path, metadata={"format": "pt", **described})
    # What users load is the file, so the file is read back and judged, in full precision.
    fresh = architecture.build()
    fresh.load_state_dict(load_file(path))
    top1, top5 = accuracy(fresh.to(run.device), *validation, dtype=torch.float32)
    machine = ("architecture", "out", "data", "device", "workers", "save_every", "commit", "bench", "limit")
    record = {
        **built,
        "num_classes": CLASSES,
        "image_size": SIZE,
        "mean": MEAN,
        "std": STD,
        "validation": {"examples": len(validation[1]), "top1": top1, "top5": top5, "weights": f"{chosen}, fp16 file"},
        "validation_in_training": {name: {"top1": a, "top5": b} for name, (a, b) in scores.items()},
        "recipe": {k: v for k, v in vars(args).items() if k not in machine},
        "train_examples": args.limit or 100_000,
        "train_seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "timm": timm.__version__},
        "commit": commit_of(args),
        "command": " ".join(["python", *sys.argv]),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2), flush=True)


def main() -> None:
    """Decode, train, evaluate and write."""
    args = parse_args()
    files, validation_file = sorted(args.data.glob("train*.parquet")), args.data / "validation.parquet"
    if not files or not validation_file.exists():
        print(f"error: --data {args.data}: train*.parquet and validation.parquet must be there", file=sys.stderr)
        sys.exit(2)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    # Decoding forks, so it comes before anything touches the device.
    train = load(files, args.limit, args.workers)
    held_out = load([validation_file], None, args.workers)
    print(f"decoded {len(train[0])} + {len(held_out[0])} images in {time.perf_counter() - start:.1f} s", flush=True)
    torch.backends.cudnn.benchmark = True
    images, labels = train[0].to(args.device), train[1].to(args.device)
    validation = (held_out[0].to(args.device), held_out[1].to(args.device))
    if args.bench:
        return bench(args, images, labels)

    run = Run(args, steps=len(images) // args.batch)
    checkpoint = args.out / "checkpoint.pt"
    first, spent = run.restore(checkpoint) if checkpoint.exists() else (0, 0.0)
    tail_start = args.epochs - round(args.tail * args.epochs)
    start = time.perf_counter() - spent
    for epoch in range(first, args.epochs):
        epoch_start = time.perf_counter()
        loss = run.epoch(images, labels, tail=epoch >= tail_start)
        seconds = time.perf_counter() - epoch_start
        if not math.isfinite(loss):
            raise SystemExit(f"error: the loss is {loss} in epoch {epoch + 1}; lower --lr")
        line = f"epoch {epoch + 1:3d}/{args.epochs} loss {loss:.4f} {run.steps * args.batch / seconds:7.0f} images/s"
        if (epoch + 1) % 10 == 0 or epoch + 1 == args.epochs:
            run.recalibrate(images)
            raw, ema = accuracy(run.net, *validation)[0], accuracy(run.average, *validation)[0]
            line += f" validation raw {raw:.4f} ema {ema:.4f} at {time.perf_counter() - start:.0f} s"
        print(line, flush=True)
        if (epoch + 1) % args.save_every == 0:
            run.save(checkpoint, epoch + 1, time.perf_counter() - start)
    ship(args, run, validation, time.perf_counter() - start)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends quietly where nobody reads its output any more
    main()
