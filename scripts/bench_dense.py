"""Segmentation or detection: train.py's throughput, decoding and augmentation included, beside the bare step.

python scripts/bench_dense.py --task segment --model convnextv2_large --batch 16 --json results/benchmarks/NAME.json
python scripts/bench_dense.py --task detect --model convnextv2_large --batch 16 --trainer num_workers=12

Trains on made photographs in files of ADE20K's or COCO's layout, through the task, its data and the trainer of
train.py. The bare step is forward, loss, backward and AdamW on one batch that lies on the device, in a plain loop. All
methods and both ways take turns in random order; first steps are not counted. The heads have their published sizes.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import flora.launch.installed

import numpy as np
import torch
from PIL import Image

import flora
from flora.bench.loop import SPREAD, add_options, given, lines_of, row, train_seconds, trainer_settings
from flora.bench.methods import Methods, Ranks
from flora.bench.networks import Network
from flora.bench.report import DTYPES, Measuring, device_of, facts, main, options, positive, table, write
from flora.bench.timing import timed
from flora.errors import ConfigError
from flora.models import get
from flora.models.spec import ModelSpec
from flora.tasks import Detect, Segment, Splits
from flora.tasks.base import Task
from flora.training import frozen_norms, layout

METHODS = ("full", "lora", "flora")
DISTINCT = 64  # photographs; files of the same content beside them make an epoch
CLASSES = {"segment": 150, "detect": 80}
OBJECTS = 7  # in an image, as COCO has them on average


def bench_dense() -> None:
    """Parse the command line, measure, print a table, write the JSON file."""
    arguments = parsed()
    positive(r=arguments.r, kernel_rank=arguments.kernel_rank, rounds=arguments.rounds, steps=arguments.steps)
    positive(batch=arguments.batch, warmup=arguments.warmup, images=arguments.images, size=arguments.size)
    names = arguments.methods.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise ConfigError(f"--methods: choose of {','.join(METHODS)}; got {unknown[0]!r}")
    device = device_of(arguments.device)
    dtype = arguments.dtype or ("bf16" if device.type == "cuda" else "fp32")
    settings, measuring = trainer_settings(arguments, device, dtype), Measuring()
    with tempfile.TemporaryDirectory() as folder:
        task, spec, splits = made(arguments, Path(folder))
        try:
            methods = Methods(Network(spec, arguments.batch, DTYPES[dtype]), Ranks(arguments.r, arguments.kernel_rank))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        order = random.Random(arguments.seed)
        rates: dict[tuple[str, str], list[float]] = {}
        losses: dict[str, float] = {}
        pairs = [(name, what) for name in names for what in ("train", "bare")]
        turns = ((n, *pair) for n in range(arguments.rounds) for pair in order.sample(pairs, len(pairs)))
        with measuring:
            for number, name, what in turns:
                if what == "train":
                    seconds, losses[name] = train_seconds(task, spec, splits, methods.tuning(name), settings, arguments)
                else:
                    seconds = bare_seconds(task, spec, splits, methods, name, device, arguments)
                rate = arguments.steps * arguments.batch / seconds
                rates.setdefault((name, what), []).append(rate)
                print(f"round {number + 1}: {name} {what} {rate:.1f} examples/s", file=sys.stderr, flush=True)
    result = {
        **facts("dense", device),
        "task": arguments.task,
        "masks": arguments.masks,
        "model": arguments.model,
        "batch": arguments.batch,
        "size": arguments.size,
        "dtype": dtype,
        "cpus": len(os.sched_getaffinity(0)),
        "r": arguments.r,
        "kernel_rank": arguments.kernel_rank,
        "trainer": given(arguments.trainer),
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "spread": SPREAD,
        **measuring.facts(),
        "rows": [row(n, losses.get(n), rates.get((n, "train")), rates.get((n, "bare"))) for n in names],
    }
    print(shown(result))
    write(arguments.json, result)
    measuring.end()


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    parser.set_defaults(size=512)
    parser.add_argument("--task", choices=("segment", "detect"), default="segment")
    parser.add_argument("--masks", action="store_true", help="detect: Mask R-CNN")
    parser.add_argument("--model", default="convnext", help="an image model: a preset or a name of timm")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--methods", default="lora,flora", help=f"comma-separated, of {','.join(METHODS)}")
    parser.add_argument("--images", type=int, default=1600, help="to train on, an epoch")
    parser.add_argument("--width", type=int, default=256, help="channels of decoder (twice) and pyramid, as published")
    add_options(parser)
    return parser.parse_args()


def made(arguments: argparse.Namespace, folder: Path) -> tuple[Task[Any], Any, Splits]:
    """The task on made files, its network as a spec without pretrained weights, and the data."""
    if arguments.masks and arguments.task != "detect":
        raise ConfigError("--masks is for --task detect: leave it out")
    backbone: Any = get(arguments.model)
    backbone.pretrained = False
    task: Task[Any]
    if arguments.task == "segment":
        write_scenes(folder / "ade20k", arguments)
        sizes: dict[str, Any] = {"size": arguments.size, "crop": arguments.size, "hidden_size": 2 * arguments.width}
        task = Segment(name="segment", dataset="ade20k", epochs=1, **sizes)
    else:
        write_objects(folder / "coco", arguments)
        sizes = {"short_sides": [arguments.size], "longest_side": round(arguments.size * 1333 / 800)}
        sizes |= {"channels": arguments.width, "hidden": 4 * arguments.width, "masks": arguments.masks}
        task = Detect(name="detect", dataset="coco", epochs=1, **sizes)
    spec = task.network(backbone)
    return task, spec, task.load_for(spec, folder)


def photograph(random: np.random.RandomState, width: int, height: int) -> Image.Image:
    """Smooth colours with some noise, which JPEG decodes about as fast as a photograph."""
    small = Image.fromarray(random.randint(0, 256, (height // 16, width // 16, 3)).astype(np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((pixels + random.randint(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8))


def write_scenes(folder: Path, arguments: argparse.Namespace) -> None:
    """ADE20K's official folder: photographs of 4 to 3 with a short side of ``--size``, masks of blocks."""
    random = np.random.RandomState(arguments.seed)
    width, height = arguments.size * 4 // 3, arguments.size
    for split, count in (("training", arguments.images), ("validation", arguments.batch)):
        images, masks = folder / "images" / split, folder / "annotations" / split
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for number in range(count):
            if number >= DISTINCT:
                os.link(images / f"{number % DISTINCT}.jpg", images / f"{number}.jpg")
                os.link(masks / f"{number % DISTINCT}.png", masks / f"{number}.png")
                continue
            photograph(random, width, height).save(images / f"{number}.jpg", quality=90)
            blocks = Image.fromarray(random.randint(0, CLASSES["segment"] + 1, (6, 8)).astype(np.uint8))
            blocks.resize((width, height), Image.Resampling.NEAREST).save(masks / f"{number}.png")


def write_objects(folder: Path, arguments: argparse.Namespace) -> None:
    """COCO's layout: photographs of 4 to 3 with a short side of 480, and objects with polygons."""
    random = np.random.RandomState(arguments.seed)
    width, height = 640, 480
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train2017", arguments.images), ("val2017", arguments.batch)):
        (folder / split).mkdir()
        images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
        for number in range(count):
            place = folder / split / f"{number}.jpg"
            if number >= DISTINCT:
                os.link(folder / split / f"{number % DISTINCT}.jpg", place)
            else:
                photograph(random, width, height).save(place, quality=90)
            images.append({"id": number, "file_name": place.name, "height": height, "width": width})
            for _ in range(OBJECTS):
                w, h = random.randint(20, 300), random.randint(20, 300)
                x, y = random.randint(0, width - w), random.randint(0, height - h)
                outline = [x, y, x + w, y, x + w, y + h, x + w // 2, y + h // 2, x, y + h]
                box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": [outline]}
                label = int(random.randint(1, CLASSES["detect"] + 1))
                annotations.append({"id": len(annotations), "image_id": number, "category_id": label} | box)
        whole: dict[str, Any] = {"images": images, "annotations": annotations}
        whole["categories"] = [{"id": i + 1, "name": str(i)} for i in range(CLASSES["detect"])]
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(whole, default=int))


def bare_seconds(
    task: Task[Any],
    spec: ModelSpec,
    splits: Splits,
    methods: Methods,
    name: str,
    device: torch.device,
    arguments: argparse.Namespace,
) -> float:
    """Seconds of as many steps on one batch, without data, schedule or clipping."""
    torch.manual_seed(arguments.seed)
    model = methods.prepare(name, spec.build(splits.num_classes).to(device).train()).model
    if given(arguments.trainer).get("channels_last"):
        layout.channels_last(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-4, fused=True)
    batch = {key: tensor.to(device) for key, tensor in splits.train.__getitems__(range(arguments.batch)).items()}
    forward, dtype, together = task.forward(spec), methods.network.dtype, flora.batched(model)
    scaling = frozen_norms.Scaling(frozen_norms.of(model))

    def run() -> None:
        optimizer.zero_grad()
        with scaling:
            with together:
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    outputs, targets = forward(model, batch, True)
                loss = task.loss(outputs, targets, 0.0)
            loss.backward()
        optimizer.step()

    timed(run, arguments.warmup, device)
    return sum(timed(run, arguments.steps, device)) / 1000


def shown(result: dict[str, Any]) -> str:
    """The result as a table for a terminal."""
    head = f"{result['task']}, {result['model']}, batch {result['batch']}, {result['size']} px, {result['dtype']}"
    head += f"; {result['device']}, {result['cpus']} CPUs"
    bare = {one["method"]: one["bare"] for one in result["rows"]}
    tail = f"images per second, medians; spread: {result['spread']}"
    if bare.get("lora") and bare.get("flora"):
        tail += f"\nFLoRA's bare step takes {bare['lora'] / bare['flora']:.3f} times as long as LoRA's"
    return f"{head}\n{table(lines_of(result['rows']))}\n{tail}"


if __name__ == "__main__":
    main(bench_dense)
