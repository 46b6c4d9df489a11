"""train.py beside what a user would otherwise run: examples a second, seconds from start to end, peak memory.

python scripts/bench_end_to_end.py --workload convnext_64 --data data --json results/benchmarks/NAME.json
python scripts/bench_end_to_end.py --workload minilm_sst2 --random --tokenizer DIR --data data

Contenders: train.py with FLoRA and with LoRA; transformers' Trainer and, for images, timm's loop, both with PEFT's LoRA
(flora/bench/rivals). Each is a process of its own, which builds the network, trains two epochs, looks at validation
after each, tests, and saves. Same files, network, weights, examples, sizes of batches, rank, rates and precision;
images are cropped and flipped at random by all. Else each does what it does by default: train.py puts texts of similar
length into a batch, keeps small data on the GPU and workers over epochs, and writes checkpoints by the clock;
transformers and timm write one an epoch; transformers resizes bilinearly and fuses AdamW; timm lets cuDNN try its
kernels. Rounds in random order, medians. The rate leaves out the first quarter of the steps, evaluation and
checkpoints; the seconds leave out nothing.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import flora.launch.installed  # noqa: F401

import yaml

from flora.bench.loop import SPREAD, given
from flora.bench.report import Measuring, device_of, facts, main, options, positive, table, write
from flora.bench.timing import spread
from flora.bench.workloads import WORKLOADS, Extent, Prepared, emptied, last_words, prepare
from flora.errors import ConfigError
from flora.files import ROOT
from flora.results.markdown import formatted

OURS = ("flora", "lora")
RIVALS = {"huggingface": "flora.bench.rivals.huggingface", "timm": "flora.bench.rivals.timm_loop"}
CONTENDERS = (*OURS, *RIVALS)
IMPORTS = "import accelerate, datasets, hydra, peft, timm, torch, torchvision, transformers"


def bench_end_to_end() -> None:
    """Parse the command line, measure, print a table, write the JSON file."""
    arguments = parsed()
    positive(r=arguments.r, kernel_rank=arguments.kernel_rank, rounds=arguments.rounds, test=arguments.test)
    workload = WORKLOADS[arguments.workload]
    if arguments.steps < 4 or arguments.steps % 2:
        raise ConfigError(f"--steps must be an even number from 4 on, got {arguments.steps}")
    if arguments.batch is not None:
        positive(batch=arguments.batch)
        workload = replace(workload, batch=arguments.batch)
    if arguments.size is not None:
        positive(size=arguments.size)
        workload = replace(workload, size=arguments.size)
    if arguments.dataset is not None:
        workload = replace(workload, dataset=arguments.dataset)
    if workload.kind == "image" and (arguments.random or arguments.tokenizer):
        raise ConfigError(f"--random, --tokenizer: {arguments.workload} reads images, and its weights ship with flora")
    if workload.kind != "image" and (arguments.size or arguments.dataset):
        raise ConfigError(f"--size, --dataset: {arguments.workload} reads the texts of SST-2; leave them out")
    names = chosen(arguments.contenders, workload.kind)
    device = device_of(arguments.device)
    dtype = arguments.dtype or ("bf16" if device.type == "cuda" else "fp32")
    ours = [f"trainer.{key}={yaml.safe_dump(value).split()[0]}" for key, value in given(arguments.trainer).items()]
    extent = Extent(
        steps=arguments.steps,
        test=arguments.test,
        workers=arguments.workers,
        r=arguments.r,
        dtype=dtype,
        device=device.type,
        seed=arguments.seed,
        random=arguments.random,
        tokenizer=arguments.tokenizer,
    )
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    errors: dict[str, str] = {}
    measuring = Measuring()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepared = prepare(workload, extent, arguments.data, folder)
        watched([sys.executable, "-c", IMPORTS], folder)  # from the disk, before any of them pays for it
        order = random.Random(arguments.seed)
        turns = ((n, name) for n in range(arguments.rounds) for name in order.sample(names, len(names)))
        with measuring:
            for number, name in turns:
                if name in errors:
                    continue
                try:
                    done = run(name, prepared, [f"adapter.kernel_rank={arguments.kernel_rank}", *ours], folder)
                except RuntimeError as error:
                    errors[name] = said = str(error)
                else:
                    runs[name].append(done)
                    said = f"{done['examples_per_second']:.1f} examples/s, {done['seconds']:.1f} s in all"
                print(f"round {number + 1}: {name} {said}", file=sys.stderr, flush=True)
    if measuring.stopped:
        errors |= {name: Measuring.UNMEASURED for name in names if not runs[name] and name not in errors}
    result = {
        **facts("end_to_end", device),
        "workload": arguments.workload,
        "model": workload.model,
        "weights": prepared.weights,
        "dataset": workload.dataset,
        "batch": workload.batch,
        "size": workload.size or None,
        "max_length": workload.max_length or None,
        "dtype": dtype,
        "r": arguments.r,
        "kernel_rank": arguments.kernel_rank,
        "steps": arguments.steps,
        "epochs": prepared.job.epochs,
        "workers": prepared.job.workers,
        "cpus": len(os.sched_getaffinity(0)),
        "trainer": given(arguments.trainer),
        "rounds": arguments.rounds,
        "spread": SPREAD,
        **measuring.facts(),
        "rows": [row(name, runs[name], errors.get(name)) for name in names],
    }
    print(shown(result))
    write(arguments.json, result)
    measuring.end()


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, default="convnext_64", help="network and data")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of datasets, as paths.data")
    parser.add_argument("--dataset", help="another folder of images in it")
    parser.add_argument("--contenders", help=f"comma-separated, of {','.join(CONTENDERS)}; default: all that there are")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int, default=200, help="of training, in two epochs; images are taken again")
    parser.add_argument("--test", type=int, default=2000, help="examples at most of validation and of test")
    parser.add_argument("--workers", type=int, default=min(8, len(os.sched_getaffinity(0))), help="that load images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trainer", action="append", default=[], metavar="KEY=VALUE", help="of train.py: trainer.KEY")
    parser.add_argument("--random", action="store_true", help="texts: start with random weights, of the same size")
    parser.add_argument("--tokenizer", help="texts: folder of another tokenizer, where the network's is not to be had")
    return parser.parse_args()


def chosen(names: str | None, kind: str) -> list[str]:
    """The contenders that are asked for; ConfigError for one that there is not."""
    there = [name for name in CONTENDERS if name != "timm" or kind == "image"]
    asked = there if names is None else list(dict.fromkeys(names.split(",")))
    if unknown := [name for name in asked if name not in there]:
        raise ConfigError(f"--contenders: choose of {','.join(there)}; got {unknown[0]!r}")
    return asked


def run(name: str, prepared: Prepared, ours: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a contender once; what it reports, with the seconds that it took and its peak memory.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    output = emptied(folder / "output")
    if name in OURS:
        own = [*prepared.overrides, *(ours if name == "flora" else ours[1:]), f"adapter={name}", "logger=none"]
        own += [f"paths.output={output}", f"paths.results={output / 'records'}"]
        command = [sys.executable, str(ROOT / "train.py"), *own]
    else:
        replace(prepared.job, output=str(output)).write(folder / "job.json")
        command = [sys.executable, "-m", RIVALS[name], str(folder / "job.json")]
    spent, stdout = watched(command, folder)
    if name in OURS:
        record = json.loads(Path(stdout.split("record: ")[-1].strip()).read_text())
        done = {"examples_per_second": record["steady_examples_per_second"], "metric": record["metric"]}
        done |= {"peak_bytes": record["peak_memory_bytes"], "value": record["value"]}
        done |= {"trainable_params": record["trainable_params"]}
    else:
        done = json.loads((output / "result.json").read_text())
    if prepared.job.on_gpu:
        del spent["peak_bytes"]
    return done | spent


def watched(command: Sequence[str], folder: Path) -> tuple[dict[str, float], str]:
    """Run a program to its end: what it took, and what it printed.

    Returns:
        ``seconds``, those of all its processes on a CPU (``cpu_seconds``), and the resident peak of the largest of them
        (``peak_bytes``); stdout.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    with (folder / "stdout").open("w+") as out, (folder / "stderr").open("w+") as err:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=folder, env=environment(folder))
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}: {last_words(err.read())}")
        spent = {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": used.ru_maxrss * 1024}
        return spent, out.read()


def environment(folder: Path) -> dict[str, str]:
    """No hub is asked, and what is computed once for all rounds is kept in the folder."""
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets"), "FLORA_CACHE": str(folder / "cache")}
    own |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    return os.environ | own | {"TOKENIZERS_PARALLELISM": "false"}


def row(name: str, runs: list[dict[str, Any]], error: str | None) -> dict[str, Any]:
    """A contender's medians over the rounds; what it learnt in the last one."""
    listed: dict[str, Any] = {"method": name, "error": error}
    if not runs:
        return listed
    names = {"train": "examples_per_second", "seconds": "seconds", "cpu_seconds": "cpu_seconds"}
    for key, place in names.items():
        values, digits = [one[place] for one in runs], 1 if key == "train" else 2
        listed |= {key: round(statistics.median(values), digits), f"{key}_spread": round(spread(values), digits)}
    listed["peak_bytes"] = max(one["peak_bytes"] for one in runs)
    return listed | {key: runs[-1][key] for key in ("trainable_params", "metric", "value")}


def shown(result: dict[str, Any]) -> str:
    """The result as a table for a terminal."""
    lines = [["contender", "examples/s", "spread", "seconds", "spread", "CPU s", "peak GB", "accuracy", "trainable"]]
    specs = {"train": ",.1f", "train_spread": ",.1f", "seconds": ".1f", "seconds_spread": ".1f", "cpu_seconds": ".1f"}
    specs |= {"peak_bytes": ".2f", "value": ".4f", "trainable_params": ",d"}
    for one in result["rows"]:
        cells = one | {"peak_bytes": one["peak_bytes"] / 1e9 if "peak_bytes" in one else None}
        lines.append([one["method"], *(formatted(cells.get(key), spec) for key, spec in specs.items())])
    head = f"{result['workload']} ({result['dataset']}), batch {result['batch']}, {result['steps']} steps"
    head += f", {result['dtype']}, weights: {result['weights']}; {result['device']}, {result['cpus']} CPUs"
    failed = [f"{one['method']}: {one['error']}" for one in result["rows"] if one["error"]]
    return "\n".join([head, table(lines), f"medians; spread: {result['spread']}", *failed])


if __name__ == "__main__":
    main(bench_end_to_end)
