"""Adapters from other layouts: published FLoRA checkpoints, PEFT's LoRA, and full fine-tunes.

What comes in becomes a ``TuckerUpdate`` per layer, then an adapter of a model (``attach``). ``flora.adapters.export``
goes the other way.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flora.adapters.config import FloraConfig
from flora.adapters.tucker import clip_ranks, hooi, hosvd, mode_product, ranks_for_energy, reduce_ranks


@dataclass
class TuckerUpdate:
    """An update in Tucker form, its scale multiplied into the core; modes in the order of the stored weight."""

    core: Tensor
    factors: Sequence[Tensor | None]


def from_published(state: Mapping[str, Tensor], scale: float) -> dict[str, TuckerUpdate]:
    """Read a checkpoint of the paper's repository (SJTU-DeepVisionLab/FLoRA, flora/layers.py).

    Its layers hold ``LAYER.flora_layer.param_G`` and ``param_0`` .. ``param_N-1`` with modes [in, out, kernel...]; the
    first two are swapped here.

    Args:
        state: state dict of the wrapped model, or of its layers.
        scale: the constant of the run, which the checkpoint does not hold.

    Raises:
        ValueError: if nothing of that layout is found, or a factor is missing.
    """
    updates = {}
    for key, core in state.items():
        layer, marker, _ = key.partition(".flora_layer.param_G")
        if not marker:
            continue
        names = [f"{layer}.flora_layer.param_{mode}" for mode in range(core.dim())]
        missing = [name for name in names if name not in state]
        if missing:
            raise ValueError(f"checkpoint: {missing[0]} is missing; the core has {core.dim()} modes")
        factors = [state[name] for name in names]
        factors[:2] = factors[1::-1]
        # The repository's wrapper keeps the model in an attribute named `model`.
        updates[layer.removeprefix("model.")] = TuckerUpdate(core.transpose(0, 1) * scale, factors)
    if not updates:
        raise ValueError("checkpoint: no *.flora_layer.param_G in it; is it from SJTU-DeepVisionLab/FLoRA?")
    return updates


def from_published_nlp(state: Mapping[str, Tensor], alpha: float) -> dict[str, TuckerUpdate]:
    """Read a checkpoint of the published NLP code (Chongjie-Si/Subspace-Tuning), update = scale * B E A.

    Both of its layouts are known by their keys: ``LAYER.lora_A`` / ``lora_E`` / ``lora_B`` (loralib; divides alpha by
    r + 1e-5, and takes r for an alpha of 0 or less) and ``LAYER.lora_A.weight`` and so on (peft fork; alpha / r).

    Args:
        state: state dict of the model or of its adapter.
        alpha: ``lora_alpha`` of the run.

    Raises:
        ValueError: if nothing of either layout is found.
    """
    updates = {}
    for key, middle in state.items():
        match = re.fullmatch(r"(.*)\.lora_E(\.weight)?", key)
        if match is None:
            continue
        layer, suffix = match[1], match[2] or ""
        inward, outward = state[f"{layer}.lora_A{suffix}"], state[f"{layer}.lora_B{suffix}"]
        rank = middle.shape[0]
        scale = alpha / rank if suffix else (alpha if alpha > 0 else rank) / (rank + 1e-5)
        updates[layer.removeprefix("base_model.model.")] = TuckerUpdate(middle * scale, [outward, inward.mT])
    if not updates:
        raise ValueError("checkpoint: no *.lora_E in it; is it from Subspace-Tuning's FLoRA?")
    return updates


def from_lora(model: nn.Module, folder: str | Path) -> dict[str, TuckerUpdate]:
    """Read a PEFT LoRA adapter (linear, Conv1D, embedding and convolution layers), exactly.

    Args:
        model: the base model, for the kinds of its layers.
        folder: holds adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: for another method, a pickle file, use_dora, a trained lora_bias, or layers without a Tucker form.
    """
    folder = Path(folder)
    weights_file = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights_file.exists():
        raise ValueError(f"{weights_file} does not exist; save the adapter as safetensors")
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG_NAME} is no configuration of an adapter ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG_NAME} is no configuration of an adapter (it holds no JSON object)")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG_NAME}: peft_type is {config.get('peft_type')}, not LORA")
    if config.get("use_dora") or config.get("lora_bias"):
        raise ValueError(f"{folder / CONFIG_NAME}: use_dora and lora_bias have no form as an update of the weight")
    updates = {}
    state = load_file(weights_file)
    for key, inward in state.items():
        match = re.fullmatch(r"base_model\.model\.(.*)\.lora_(embedding_)?A(\.weight)?", key)
        if match is None:
            continue
        name, outward = match[1], state[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        rank = config["rank_pattern"].get(get_pattern_key(config["rank_pattern"], name), config["r"])
        alpha = config["alpha_pattern"].get(get_pattern_key(config["alpha_pattern"], name), config["lora_alpha"])
        scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
        layer = model.get_submodule(name)
        if getattr(layer, "groups", 1) > 1:
            raise ValueError(f"{name}: LoRA of a grouped convolution is not a Tucker form of its weight")
        updates[name] = _from_factors(inward, outward.flatten(1), scale)
        if isinstance(layer, nn.Embedding | Conv1D):  # stored as [in, out]
            updates[name] = TuckerUpdate(updates[name].core.mT, updates[name].factors[::-1])
    if not updates:
        raise ValueError(f"{weights_file}: no LoRA matrices in it")
    return updates


def _from_factors(inward: Tensor, outward: Tensor, scale: float) -> TuckerUpdate:
    """Exact Tucker form of outward (out x r) times inward (r x in x kernel...), at its own ranks."""
    basis, rest = torch.linalg.qr(outward.double())
    tensor = mode_product(inward.double(), rest, 0)
    core, factors = hosvd(tensor, ranks_for_energy(tensor, 1.0))
    first = basis if factors[0] is None else basis @ factors[0]
    return TuckerUpdate(core * scale, [None if first.shape == (1, 1) else first, *factors[1:]])


def from_difference(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    layers: Iterable[str],
    ranks: Sequence[int] | None = None,
    energy: float | None = None,
) -> dict[str, TuckerUpdate]:
    """Compress a full fine-tune: Tucker forms of the differences of weights, by HOOI from the HOSVD.

    Args:
        base: state dict before fine-tuning.
        tuned: state dict after it.
        layers: names of the layers whose weights to compress.
        ranks: ``(r, kernel_rank)``, clipped per layer to what is useful.
        energy: instead of ranks, the share of the squared norm that each mode keeps, in (0, 1].

    Raises:
        ValueError: if not exactly one of ranks and energy is given, a weight is missing, or shapes differ.
    """
    if (ranks is None) == (energy is None):
        raise ValueError("ranks, energy: give exactly one of them")
    updates = {}
    for name in layers:
        key = f"{name}.weight"
        if key not in base or key not in tuned:
            raise ValueError(f"checkpoint: {key} is missing")
        if base[key].shape != tuned[key].shape:
            raise ValueError(
                f"checkpoint: {key} is {list(base[key].shape)} in one, {list(tuned[key].shape)} in the other"
            )
        difference = tuned[key].double() - base[key].double()
        if ranks is not None:
            wanted = [ranks[0], ranks[0], *[ranks[1]] * (difference.dim() - 2)]
            kept = clip_ranks(difference.shape, wanted)
        else:
            kept = ranks_for_energy(difference, float(energy or 0))
        updates[name] = TuckerUpdate(*hooi(difference, kept))
    return updates


def attach(model: nn.Module, updates: Mapping[str, TuckerUpdate], **settings: Any) -> peft.PeftModel:
    """Give a model a FLoRA adapter with these updates; ``save_pretrained`` then writes it.

    Args:
        model: the base model, wrapped in place.
        updates: by layer name.
        settings: further fields of ``FloraConfig``.

    Raises:
        ValueError: if a layer is missing or of another shape.
    """
    modules = dict(model.named_modules())
    reduced = {}
    for name, update in updates.items():
        if name not in modules:
            raise ValueError(f"{name}: the model has no such layer")
        sizes = [1 if factor is None else factor.shape[0] for factor in update.factors]
        expected = list(getattr(modules[name], "weight", torch.empty(0)).shape)
        if sizes != expected:
            raise ValueError(f"{name}: an update of shape {sizes} does not fit the weight, which is {expected}")
        reduced[name] = TuckerUpdate(*reduce_ranks(update.core, update.factors))
    config = FloraConfig(
        target_modules=exactly(reduced, modules),
        rank_pattern={f"^{re.escape(name)}$": list(update.core.shape) for name, update in reduced.items()},
        scale=1.0,
        **settings,
    )
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, update in reduced.items():
            layer: Any = wrapped.get_base_model().get_submodule(name)
            layer.core("default").copy_(update.core)
            for own, factor in zip(layer.factors("default"), update.factors, strict=True):
                if own is not None:
                    own.copy_(factor)
    return wrapped


def exactly(names: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str] | str:
    """Targets that match these modules only; PEFT also takes a listed name for the ending of longer ones."""
    wanted = set(names)
    longer = any(module.endswith(f".{name}") for name in wanted for module in modules if module not in wanted)
    return "|".join(re.escape(name) for name in sorted(wanted)) if longer else sorted(wanted)
