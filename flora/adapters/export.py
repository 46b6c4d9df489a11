"""Adapters to other layouts: PEFT's LoRA, which vLLM and diffusers load, and LyCORIS.

LoRA's is written from the adapter of a model (``to_lora``) or from a saved one alone (``folder_to_lora``). What LoRA
cannot hold is refused, or merged into the base (``merge_what_lora_cannot_hold``).
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import peft
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, _get_submodules, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flora.adapters.config import FloraConfig
from flora.adapters.convert import exactly
from flora.adapters.layer import FloraLayer
from flora.adapters.tucker import mode_product
from flora.replaced.weights import AdaptedWeight, ModeKind, configured, plain, scaling_of

_PREFIX = "base_model.model."
_CONVS = {3: "Conv1d", 4: "Conv2d", 5: "Conv3d"}


@dataclass
class _Update:
    """The update of a layer that LoRA can hold: scale * (core x factors), with 1 x 1 for modes without a factor."""

    name: str
    kind: str  # Linear, Conv1D, Embedding, Conv1d, Conv2d, Conv3d
    core: Tensor
    factors: list[Tensor]
    scale: float


# ---------------------------------------------------------------------- PEFT's LoRA


def to_lora(
    model: peft.PeftModel, folder: str | Path, adapter_name: str = "default", leave_out: bool = False
) -> dict[str, str]:
    """Write an adapter as a PEFT LoRA adapter with the same updates up to rounding.

    ``lora_B`` is scale * A_out (a 1 x 1 convolution), ``lora_A`` the core with its input and kernel factors; alpha = r,
    with one rank per layer: a reader that knows no patterns, such as vLLM, takes the factor alpha / r = 1 too. Trained
    heads and biases go along.

    Args:
        model: that carries the adapter.
        folder: what to write.
        adapter_name: which adapter.
        leave_out: leave out the layers whose update PEFT's LoRA cannot hold; what is written is then another model.

    Returns:
        The layers that were left out, each with the reason.

    Raises:
        ValueError: for layers whose update PEFT's LoRA cannot hold or would apply differently.
    """
    config, layers = _adapter(model, adapter_name)
    if not layers:
        raise ValueError("adapter_name: no layer is left to convert; save the merged model alone")
    updates, left = _held({name: partial(_of_layer, name, layer, adapter_name) for name, layer in layers}, leave_out)
    modules = dict(model.get_base_model().named_modules())
    _write_lora(updates, config, _others(model, adapter_name), modules, Path(folder))
    return left


def folder_to_lora(
    source: str | Path,
    folder: str | Path,
    model: nn.Module | None = None,
    embeddings: Collection[str] = (),
    leave_out: bool = False,
) -> dict[str, str]:
    """Write a saved adapter as a PEFT LoRA adapter, without the weights of its base.

    Args:
        source: holds adapter_config.json and adapter_model.safetensors.
        folder: what to write.
        model: the base's architecture, for the kinds of its layers; may lie on the meta device. Without it, matrices
            are taken for linear layers [out, in], and weights of more modes for convolutions that neither have groups
            nor dilate nor pad with anything but zeros.
        embeddings: names (full or endings) of adapted embeddings, where there is no model.
        leave_out: leave out the layers whose update PEFT's LoRA cannot hold; what is written is then another model.

    Returns:
        The layers that were left out, each with the reason.

    Raises:
        ValueError: for layers whose update PEFT's LoRA cannot hold or would apply differently, and for folders that
            hold no FLoRA adapter.
    """
    source = Path(source)
    file = source / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise ValueError(f"{file} does not exist; name the folder of a saved adapter")
    config = peft.PeftConfig.from_pretrained(str(source))
    if not isinstance(config, FloraConfig):
        raise ValueError(f"{source}: its peft_type is {config.peft_type.value}, not FLORA")
    modules = None if model is None else dict(model.named_modules())
    # Saved from a model that diffusers or transformers adapted, names lack the prefix of PEFT's wrapper.
    state = {f"{_PREFIX}{key.removeprefix(_PREFIX)}": value for key, value in load_file(file).items()}
    readings, others = dict[str, Callable[[], _Update]](), {}
    for key, value in state.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.tucker_(core|factors|magnitude)\.(.+)", key)
        if match is None:
            others[key] = value
        elif match[2] == "magnitude":
            _refuse(match[1], "use_dora is not a sum and has no LoRA layout")
        elif match[2] == "core":
            name, weight = match[1], match[3]
            read = partial(_of_file, name, weight, state, config, modules, embeddings)
            readings[f"{name}.{weight}".removesuffix(".weight")] = read
    if not readings:
        raise ValueError(f"{file}: no tucker_core in it; was it saved by FLoRA?")
    updates, left = _held(readings, leave_out)
    _write_lora(updates, config, others, modules or {update.name: nn.Module() for update in updates}, Path(folder))
    return left


def _held(readings: Mapping[str, Callable[[], _Update]], leave_out: bool) -> tuple[list[_Update], dict[str, str]]:
    """The updates that LoRA can hold, and why it cannot hold the others; without ``leave_out`` these are errors."""
    updates, left = list[_Update](), dict[str, str]()
    for name, read in readings.items():
        try:
            updates.append(read())
        except LoraCannotHold as error:
            if not leave_out:
                raise
            left[name] = error.reason
    if not updates:
        name, reason = next(iter(left.items()))
        _refuse(name, reason)
    return updates, left


def _of_file(
    name: str,
    key: str,
    state: Mapping[str, Tensor],
    config: FloraConfig,
    modules: Mapping[str, nn.Module] | None,
    embeddings: Collection[str],
) -> _Update:
    """The update that a saved adapter holds for one weight of a layer."""
    if key != "weight":
        _refuse(name, f"its {key} is one of several or a bare parameter, and has no LoRA layout")
    prefix = f"{_PREFIX}{name}"
    core = state[f"{prefix}.tucker_core.{key}"]
    found = [state.get(f"{prefix}.tucker_factors.{key}_{mode}") for mode in range(core.dim())]
    factors = [core.new_ones(1, 1) if factor is None else factor for factor in found]
    sizes = [factor.shape[0] for factor in factors]
    kinds: list[ModeKind] = ["channel", "channel", *["kernel"] * (core.dim() - 2)]  # type: ignore[list-item]
    weight = plain(key, sizes, kinds)
    if configured(config.fold_pattern, name, weight) is not None:
        _refuse(name, "a folded weight has more modes than LoRA's matrices")
    if modules is None:
        kind = _guessed(name, sizes, embeddings)
    elif name not in modules:
        raise ValueError(f"{name}: the model has no such layer")
    else:
        kind = _kind(name, modules[name])
        expected = list(getattr(modules[name], "weight", torch.empty(0)).shape)
        if sizes != expected and kind != "Linear":  # a quantised linear layer stores another shape
            raise ValueError(f"{name}: an update of shape {sizes} does not fit the weight, which is {expected}")
    return _Update(name, kind, core, factors, scaling_of(weight, config, name))


def _guessed(name: str, sizes: list[int], embeddings: Collection[str]) -> str:
    """Kind of a layer whose weight has this shape."""
    if len(sizes) == 2:
        named = any(name == ending or name.endswith(f".{ending}") for ending in embeddings)
        return "Embedding" if named else "Linear"
    if len(sizes) not in _CONVS:
        _refuse(name, f"a weight of {len(sizes)} modes has no LoRA layout")
    if sizes[1] == 1 < sizes[0]:
        _refuse(name, "one input channel looks like a depthwise convolution, which has no LoRA layout; give the model")
    return _CONVS[len(sizes)]


def _write_lora(
    updates: list[_Update],
    own: FloraConfig,
    others: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    folder: Path,
) -> None:
    state: dict[str, Tensor] = {}
    ranks = {}
    for update in updates:
        out_mode = 1 if update.kind in ("Embedding", "Conv1D") else 0
        outward, inward = update.factors[out_mode] * update.scale, update.core
        for mode, factor in enumerate(update.factors):
            if mode != out_mode:
                inward = mode_product(inward, factor, mode)
        ranks[update.name] = outward.shape[1]
        prefix = f"{_PREFIX}{update.name}"
        if update.kind == "Embedding":
            state[f"{prefix}.lora_embedding_A"], state[f"{prefix}.lora_embedding_B"] = inward.mT, outward
        else:
            state[f"{prefix}.lora_A.weight"] = inward.mT if update.kind == "Conv1D" else inward
            state[f"{prefix}.lora_B.weight"] = outward.reshape(*outward.shape, *[1] * (update.core.dim() - 2))
    r = max(ranks.values())
    patterns = {f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != r}
    transposed = [update.kind == "Conv1D" for update in updates if update.kind != "Embedding"]
    config = peft.LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        target_modules=exactly(ranks, modules),
        bias={"flora_only": "lora_only"}.get(own.bias, own.bias),  # type: ignore[arg-type]
        fan_in_fan_out=bool(transposed) and all(transposed),
        modules_to_save=own.modules_to_save,
        task_type=own.task_type,
        base_model_name_or_path=own.base_model_name_or_path,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {key: value.detach().cpu().contiguous() for key, value in {**others, **state}.items()}
    save_file(contiguous, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def merge_what_lora_cannot_hold(model: peft.PeftModel, adapter_name: str = "default") -> list[str]:
    """Merge the layers that ``to_lora`` refuses into the base model, whose weights must then be saved and served.

    Args:
        model: left with an adapter on its other layers only.
        adapter_name: its only adapter.

    Returns:
        The names of the merged layers.

    Raises:
        ValueError: if the model has other adapters too, or a weight cannot be merged into.
    """
    if others := sorted(set(model.peft_config) - {adapter_name}):
        raise ValueError(
            f"adapter_name: {', '.join(others)} would lose the base that it was trained on; delete it first"
        )
    _, layers = _adapter(model, adapter_name)
    chosen = [(name, layer) for name, layer in layers if not _holds(name, layer, adapter_name)]
    base = model.get_base_model()
    for name, layer in chosen:
        parent, _, child_name = _get_submodules(base, name)
        if hasattr(layer, "unload_and_optionally_merge_module"):
            cast(Any, layer).unload_and_optionally_merge_module(
                merge=True, safe_merge=True, adapter_names=[adapter_name]
            )
        else:
            layer.merge(safe_merge=True, adapter_names=[adapter_name])
        cast(Any, model.base_model)._replace_module(parent, child_name, layer.get_base_layer(), layer)
    return [name for name, _ in chosen]


# ---------------------------------------------------------------------- LyCORIS


def to_lycoris(model: peft.PeftModel, file: str | Path, adapter_name: str = "default", prefix: str = "lycoris") -> None:
    """Write an adapter as LyCORIS' LoCon with Tucker decomposition: lora_up, lora_mid, lora_down, alpha = rank.

    Args:
        model: a model whose adapter is on ungrouped Conv2d layers.
        file: the safetensors file to write.
        adapter_name: which adapter.
        prefix: first part of LyCORIS' names; dots in layer names become underscores.

    Raises:
        ValueError: for any other kind of layer.
    """
    state = {}
    for name, layer in _adapter(model, adapter_name)[1]:
        update = _of_layer(name, layer, adapter_name)
        if update.kind != "Conv2d":
            raise ValueError(f"{name}: {type(layer.get_base_layer()).__name__} has no Tucker LoCon; only Conv2d has")
        core, factors = update.core, update.factors
        for mode in (2, 3):
            core = mode_product(core, factors[mode], mode)
        rank = max(core.shape[:2])  # LoCon has one rank for both channel modes: the smaller is padded with zeros
        mid = core.new_zeros(rank, rank, *core.shape[2:])
        mid[: core.shape[0], : core.shape[1]] = core
        up, down = (nn.functional.pad(factor, (0, rank - factor.shape[1])) for factor in factors[:2])
        key = f"{prefix}_{name.replace('.', '_')}"
        if tuple(core.shape[2:]) == (1, 1):  # LoCon leaves the middle out of pointwise convolutions
            up = up @ mid[:, :, 0, 0]
        else:
            state[f"{key}.lora_mid.weight"] = mid
        state[f"{key}.lora_up.weight"] = (up * update.scale)[:, :, None, None]
        state[f"{key}.lora_down.weight"] = down.mT[:, :, None, None]
        state[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file({key: value.contiguous() for key, value in state.items()}, Path(file), metadata={"format": "pt"})


# ---------------------------------------------------------------------- what LoRA can hold


class LoraCannotHold(ValueError):
    """An update that has no place in LoRA's layout, with the ``reason``."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}; merge the adapter instead")
        self.reason = reason


def _refuse(name: str, reason: str) -> NoReturn:
    raise LoraCannotHold(name, reason)


def _kind(name: str, base: nn.Module) -> str:
    """Kind of a base layer that LoRA layouts can hold; raises ValueError for all others."""
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if base.groups > 1:
            _refuse(name, "a grouped convolution has no LoRA layout")
        if base.padding_mode != "zeros" or set(base.dilation) != {1}:
            _refuse(
                name,
                f"LoRA layers pad with zeros and do not dilate (padding_mode={base.padding_mode!r}, "
                f"dilation={base.dilation})",
            )
        return f"Conv{len(base.kernel_size)}d"
    for kind in (nn.Linear, Conv1D, nn.Embedding):
        if isinstance(base, kind):
            return kind.__name__
    _refuse(name, f"{type(base).__name__} has no LoRA layout")


def _of_layer(name: str, layer: FloraLayer, adapter_name: str) -> _Update:
    """The update of an adapted layer; raises ValueError where LoRA layouts cannot hold it."""
    if layer.child_name:
        _refuse(name, "bare parameters have no LoRA layout")
    kind = _kind(name, layer.get_base_layer())
    if adapter_name in layer.tucker_magnitude:
        _refuse(name, "use_dora is not a sum and has no LoRA layout")
    weight: AdaptedWeight = layer.weights[adapter_name]["weight"]
    if weight.folded:
        _refuse(name, "a folded weight has more modes than LoRA's matrices")
    core = layer.core(adapter_name).detach()
    factors = [core.new_ones(1, 1) if f is None else f.detach() for f in layer.factors(adapter_name)]
    return _Update(name, kind, core, factors, layer.scaling[adapter_name])


def _holds(name: str, layer: FloraLayer, adapter_name: str) -> bool:
    try:
        _of_layer(name, layer, adapter_name)
    except LoraCannotHold:
        return False
    return True


def _adapter(model: peft.PeftModel, adapter_name: str) -> tuple[Any, list[tuple[str, FloraLayer]]]:
    """The configuration of an adapter, and the layers that carry it."""
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, FloraConfig):
        raise ValueError(f"adapter_name: the model has no FLoRA adapter {adapter_name!r}")
    named = model.get_base_model().named_modules()
    return config, [(name, m) for name, m in named if isinstance(m, FloraLayer) and adapter_name in m.weights]


def _others(model: peft.PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """What is saved with an adapter besides it: trained heads and biases."""
    saved: Any = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {key: value for key, value in saved.items() if ".tucker_" not in key}
