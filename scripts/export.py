"""Convert adapters: from published checkpoints, LoRA or a full fine-tune to FLoRA, from FLoRA to LoRA or LyCORIS.

A run, whatever its method, also becomes a program that needs no Python code: ONNX's, or torch.export's.

python scripts/export.py outputs/RUN_ID lora_folder --to lora
python scripts/export.py my_adapter lora_folder --to lora --model convnext --merge-rest base.safetensors
python scripts/export.py flora.pt adapter_folder --from published --scale 4 --model resnet50
python scripts/export.py outputs/RUN_ID model.onnx --to program
python scripts/export.py tuned.safetensors adapter_folder --from checkpoint --energy 0.9 --model transformers:bert
"""

import argparse
import copy
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flora.launch.installed

import peft
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import flora.models
from flora.adapters import convert
from flora.adapters.export import folder_to_lora, merge_what_lora_cannot_hold, to_lora, to_lycoris
from flora.errors import ConfigError
from flora.files import saved_weights
from flora.launch.entry import main
from flora.methods.base import first_lines
from flora.predict import program


def export(arguments: Sequence[str] | None = None) -> None:
    """Read the source, convert it on the architecture it belongs to, write the result."""
    options = _parser().parse_args(arguments)
    if options.live and options.to != "program":
        raise ConfigError("--live: only a program can hold an adapter that is not merged; it needs --to program")
    if options.to == "program":
        difference = program.write(options.source, options.output, options.live)
        print(f"program: {options.output}, logits equal to {difference:.1e} of the largest")
        return
    if options.source_kind in ("flora", "lora") and (weights := saved_weights(options.source)) is not None:
        options.source = weights.parent  # the adapter in the folder of a run
    if (options.source_kind == "flora") == (options.to == "flora"):
        raise ConfigError("--from, --to: one of the two must be flora, the other something else")
    if options.source_kind in ("flora", "lora") and not (options.source / "adapter_config.json").is_file():
        raise ConfigError(f"{options.source} has no adapter_config.json; name the folder of a saved adapter")
    if options.model is None and options.to != "lora":
        raise ConfigError("--model: needed, the layers to convert on are its own")
    if options.merge_rest and (options.model is None or options.to != "lora"):
        raise ConfigError("--merge-rest: needs --to lora and --model, into whose weights it merges")
    try:
        if options.to == "lora" and not options.merge_rest:
            architecture = None if options.model is None else build(options.model, options.num_classes, weights=False)
            left = folder_to_lora(options.source, options.output, architecture, options.embeddings, leave_out=True)
            tell(left)
            print(f"lora: {options.output}")
            return
        model = build(options.model, options.num_classes)
        if options.to == "flora":
            wrapped = convert.attach(model, _forms(options, model))
            wrapped.save_pretrained(str(options.output), save_embedding_layers=False)
        else:
            wrapped = peft.PeftModel.from_pretrained(model, str(options.source))
            if options.merge_rest:
                merge_rest(wrapped, options.merge_rest)
            write = to_lora if options.to == "lora" else to_lycoris
            write(wrapped, options.output)
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise ConfigError(first_lines(error)) from error
    print(f"{options.to}: {options.output}")


def tell(left: Mapping[str, str]) -> None:
    """Say which layers LoRA cannot hold, since what is written does less than the adapter."""
    for name, reason in left.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    if left:
        print(
            f"warning: {len(left)} layers are left out, so the LoRA adapter is not the whole update: --merge-rest FILE "
            "--model NAME merges them into the base instead",
            file=sys.stderr,
        )


def merge_rest(model: peft.PeftModel, place: Path) -> None:
    """Merge what LoRA cannot hold, and save the base with it: a folder for a model of transformers, else one file."""
    merged = merge_what_lora_cannot_hold(model)
    base = copy.deepcopy(model).unload()
    if isinstance(base, transformers.PreTrainedModel):
        base.save_pretrained(place)
    else:
        save_file({key: value.contiguous() for key, value in base.state_dict().items()}, place)
    print(f"base: {place}, {len(merged)} layers merged")


def _forms(options: argparse.Namespace, model: nn.Module) -> dict[str, convert.TuckerUpdate]:
    """What the source holds, as Tucker forms by layer."""
    if options.source_kind == "lora":
        return convert.from_lora(model, options.source)
    state = read(options.source)
    if options.source_kind == "published":
        return convert.from_published(state, _given(options, "scale"))
    if options.source_kind == "nlp":
        return convert.from_published_nlp(state, _given(options, "alpha"))
    base = model.state_dict()
    layers = options.layers or [
        key.removesuffix(".weight")
        for key, weight in base.items()
        if key.endswith(".weight") and weight.dim() > 1 and key in state and not torch.equal(weight, state[key])
    ]
    if not layers:
        raise ValueError(f"{options.source} has the weights of {options.model}: there is no difference to compress")
    ranks = None if options.r is None else (options.r, options.kernel_rank)
    return convert.from_difference(base, state, layers, ranks=ranks, energy=options.energy)


def build(spec: str, num_classes: int, weights: bool = True) -> nn.Module:
    """The model to convert on: ``transformers:FOLDER``, or a name that ``model=`` takes; bare on the meta device."""
    kind, _, folder = spec.partition(":")
    if kind != "transformers":
        return flora.models.load(spec, num_classes) if weights else flora.models.get(spec).skeleton(num_classes)
    if not Path(folder).is_dir():
        raise ValueError(f"--model: there is no folder {folder}")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not config.architectures:
        raise ValueError(f"--model: {folder}/config.json names no architecture")
    architecture: Any = getattr(transformers, config.architectures[0])
    if not weights:
        with torch.device("meta"):
            return architecture(config)
    has_weights = any(Path(folder).glob("*.safetensors"))
    return architecture.from_pretrained(folder) if has_weights else architecture(config)


def read(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a pickle that holds nothing but tensors."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} holds more than tensors and is not loaded; save its state dict alone") from error
    except Exception as error:  # unpickling raises almost any type on broken bytes
        raise ValueError(f"{file} cannot be read as weights ({error!r})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file} cannot be read as weights: it must hold tensors by name, as a state dict")
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _given(options: argparse.Namespace, name: str) -> float:
    if getattr(options, name) is None:
        raise ValueError(f"--{name}: needed, the checkpoint does not hold it")
    return getattr(options, name)


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("source", type=Path, help="run or adapter folder (flora, lora), or checkpoint file")
    parser.add_argument(
        "output", type=Path, help="adapter folder (flora, lora), safetensors file (lycoris), .onnx or .pt2"
    )
    sources = ("flora", "published", "nlp", "lora", "checkpoint")
    parser.add_argument(
        "--from",
        dest="source_kind",
        choices=sources,
        default="flora",
        help="layout of the source: published (SJTU-DeepVisionLab/FLoRA), nlp (Subspace-Tuning), checkpoint (a full "
        "fine-tune of the model, compressed)",
    )
    parser.add_argument("--to", choices=("flora", "lora", "lycoris", "program"), default="flora", help="what to write")
    parser.add_argument("--live", action="store_true", help="program: leave the adapter beside the weights, not merged")
    parser.add_argument(
        "--model",
        help="transformers:FOLDER, or a name that train.py's model= takes; --to lora needs none, and of one only the "
        "architecture, where all layers are linear or plain convolutions",
    )
    parser.add_argument("--num-classes", type=int, default=1000, help="classes of the head (not for transformers)")
    parser.add_argument("--scale", type=float, help="published: the constant of the run")
    parser.add_argument("--alpha", type=float, help="nlp: lora_alpha of the run")
    parser.add_argument("--r", type=int, help="checkpoint: channel rank")
    parser.add_argument("--kernel-rank", type=int, default=2, help="checkpoint: kernel rank, with --r")
    parser.add_argument("--energy", type=float, help="checkpoint: share of the squared norm to keep, instead of --r")
    parser.add_argument(
        "--merge-rest", type=Path, help="lora: where to save the base with what LoRA cannot hold merged"
    )
    parser.add_argument("--embeddings", nargs="+", default=(), help="lora without --model: names of adapted embeddings")
    parser.add_argument("--layers", nargs="+", help="checkpoint: layers to compress (default: all that changed)")
    return parser


if __name__ == "__main__":
    main(export, trace=lambda: False)
