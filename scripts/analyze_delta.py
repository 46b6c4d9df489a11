"""How low-rank fine-tuned changes are: `python scripts/analyze_delta.py outputs/RUN_ID ...`, runs with adapter=full."""

import argparse
import csv
import json
from pathlib import Path

import flora.launch.installed  # noqa: F401

import torch
from matplotlib import pyplot as plt
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flora.config import instantiate
from flora.errors import ConfigError, DataError, first_line
from flora.launch.entry import main
from flora.methods.heads import in_head
from flora.results.delta import Kept, energy_kept
from flora.results.energy import STRUCTURES
from flora.results.escape import file_name, label, spreadsheet
from flora.results.looks import style
from flora.results.store import read
from flora.training import saved


def analyze_delta() -> None:
    """Parse the command line, compare the weights before and after, write a table and a figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="run", help="output folder of a finished run with adapter=full")
    parser.add_argument("--r", type=int, default=8, help="rank of the channel modes")
    parser.add_argument("--kernel-rank", type=int, default=2, help="rank of the kernel modes")
    parser.add_argument("--results", type=Path, default=Path("outputs/records"), help="folder of the records")
    parser.add_argument("--output", type=Path, default=Path("results"), help="tables/ and figures/ go in here")
    arguments = parser.parse_args()

    for name, rank in (("--r", arguments.r), ("--kernel-rank", arguments.kernel_rank)):
        if rank < 1:
            raise ConfigError(f"{name} {rank}: at least 1")
    for run in arguments.runs:
        analyze(run, arguments, alone=len(arguments.runs) == 1)


def analyze(run: str, arguments: argparse.Namespace, alone: bool) -> None:
    """Compare one run's weights before and after, print means and write its table; a figure too where it is alone."""
    folder = saved.adapter_folder(run)
    facts = saved.facts(folder)
    if facts.get("adapter") != "full":
        raise ConfigError(f"{run} is a run with adapter={facts.get('adapter')}: choose one with adapter=full")
    run_id, classes = facts.get("run_id"), facts.get("num_classes")
    if run_id != file_name(str(run_id)) or type(classes) is not int or classes < 1:
        raise DataError(f"{folder / 'run.json'}: run_id {run_id!r:.40}, num_classes {classes!r:.40} are of no run")
    path = arguments.results / f"{run_id}.json"
    record, problem = read(path)
    if record is None:
        raise DataError(problem or f"{path}: no record")
    if record.get("weights", {}).get("pretrained") is False:
        raise ConfigError(f"{run} started from random weights, which are not kept: choose a pretrained model")
    config = OmegaConf.create(record.get("config", {}))
    model, task = instantiate(config.get("model")), instantiate(config.get("task"))
    if not hasattr(model, "build") or not hasattr(task, "network"):
        raise DataError(f"{path}: config.model is of no model, or config.task of no task")
    model = task.network(model)
    weights = folder / "model.safetensors"
    trained = weights_of(weights)
    if classes > max((weight.numel() for weight in trained.values()), default=0):
        raise DataError(f"{weights} has no head of {classes} classes, which run.json names")
    before = model.build(classes).state_dict()
    check_same(trained, before, weights, record["model"])
    layers = [
        energy_kept(name.removesuffix(".weight"), after - before[name], arguments.r, arguments.kernel_rank)
        for name, after in trained.items()
        if name.endswith(".weight") and after.ndim > 1 and not in_head(name, model.classifier)
        if not torch.equal(after, before[name])
    ]
    if not layers:
        raise DataError(f"{run}: no weight outside the head has changed")
    stem = file_name("delta", record["dataset"], record["model"], run_id)
    title = f"{record['dataset']}, {record['model']}, full fine-tuning ({run_id}), r = {arguments.r}"
    table = arguments.output / "tables" / f"{stem}.csv"
    of_run = (record["dataset"], record["model"], arguments.r, arguments.kernel_rank)
    write_table(layers, table, of_run)
    convolutions = [k for k in layers if k.shuffled is not None]
    means = {structure: mean(convolutions, structure) for structure in STRUCTURES}
    print(json.dumps({"layers": len(layers), "convolutions": len(convolutions)} | means))
    print(table)
    if alone:
        figure = arguments.output / "figures" / f"{stem}.png"
        draw(layers, f"{title}, kernel rank {arguments.kernel_rank}", figure)
        print(figure)


def weights_of(path: Path) -> dict[str, Tensor]:
    """The tensors in a file; DataError where it cannot be read, or holds numbers that are not finite."""
    try:
        trained = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read as weights ({first_line(error)}): save the run again") from error
    if broken := [name for name, weight in sorted(trained.items()) if not weight.isfinite().all()]:
        raise DataError(f"{path}: {broken[0]} holds numbers that are not finite")
    return trained


def check_same(trained: dict[str, Tensor], before: dict[str, Tensor], path: Path, model: str) -> None:
    """Refuse weights in a file that are not those of a model: DataError."""
    for name in sorted(trained.keys() | before.keys()):
        if name not in before:
            raise DataError(f"{path}: model {model} has no {name}")
        if name not in trained:
            raise DataError(f"{path}: {name} of model {model} is missing")
        new, old = trained[name], before[name]
        if new.shape != old.shape or new.is_floating_point() != old.is_floating_point():
            raise DataError(f"{path}: {name} is {new.dtype} {list(new.shape)}, model {model} has another shape")


def mean(layers: list[Kept], structure: str) -> float | None:
    """The mean share over layers that a structure keeps."""
    return round(sum(getattr(k, structure) for k in layers) / len(layers), 4) if layers else None


def write_table(layers: list[Kept], path: Path, of_run: tuple[str, str, int, int]) -> None:
    """One line per layer: shape, parameters, shares kept by structure and by mode, and what was analyzed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["layer", "shape", "params", *STRUCTURES, "modes", "dataset", "model", "r", "kernel_rank"])
        for k in layers:
            shares = ["" if share is None else f"{share:.6f}" for share in (k.tucker, k.flattened, k.shuffled)]
            modes = " ".join(f"{share:.4f}" for share in k.modes)
            writer.writerow(
                [spreadsheet(k.layer), "x".join(map(str, k.shape)), k.params, *shares, modes, *map(spreadsheet, of_run)]
            )


def draw(layers: list[Kept], title: str, path: Path) -> None:
    """Shares kept per layer, one marker per structure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(6.4, 0.9 + 0.16 * len(layers)), layout="constrained")
    for structure, method in STRUCTURES.items():
        colour, marker = style(method)
        points = [(getattr(k, structure), i) for i, k in enumerate(layers) if getattr(k, structure) is not None]
        axes.plot(
            *zip(*points, strict=True) if points else ([], []), marker, color=colour, label=structure, markersize=4
        )
    axes.set_yticks(range(len(layers)), [label(k.layer) for k in layers], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("share of the change's squared norm kept at equal parameters")
    axes.set_title(label(title), fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main(analyze_delta, trace=lambda: False)
