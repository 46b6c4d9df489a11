"""Weighted sums of adapters, as one more adapter of the same model."""

import copy
import re
from typing import Any

from peft.utils.other import ModulesToSaveWrapper

from flora.adapters.tucker import clip_ranks, concatenate, reduce_ranks, truncate
from flora.adapters.weights import ranks_of


def add_weighted_adapter(
    model: Any,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str,
    r: int | list[int] | None,
    kernel_rank: int | list[int] | None,
) -> None:
    """Add the weighted sum of adapters to a ``FloraModel``; see its method of the same name."""
    if adapter_name in model.peft_config:
        raise ValueError(f"adapter_name: {adapter_name} exists already")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"weights: {len(weights)} given for {len(adapters)} adapters; give one per adapter")
    if combination_type not in ("cat", "hooi"):
        raise ValueError(f"combination_type: must be cat or hooi, got {combination_type!r}")
    configs = []
    for name in adapters:
        if name not in model.peft_config:
            raise ValueError(f"adapters: {name} does not exist; there are {', '.join(model.peft_config)}")
        configs.append(model.peft_config[name])
        if configs[-1].use_dora:
            raise ValueError(f"adapters: {name} uses use_dora; its update is not a sum and cannot be combined")
    if sum(bool(config.modules_to_save) for config in configs) > 1:
        raise ValueError("adapters: more than one has modules_to_save, which cannot be added up")

    config = copy.deepcopy(configs[0])
    config.r = config.r if r is None else r
    config.kernel_rank = config.kernel_rank if kernel_rank is None else kernel_rank
    combined = {}
    for name in adapters:
        for full_name, layer, weight in model.adapted_weights(name):
            if full_name not in combined:
                combined[full_name] = _combine(layer, weight, full_name, adapters, weights, combination_type, config)

    config.rank_pattern = {f"^{re.escape(name)}$": list(core.shape) for name, (core, _) in combined.items()}
    config.scale, config.scale_pattern, config.alpha, config.alpha_pattern = 1.0, {}, None, {}
    config.rank_stabilized, config.clip_ranks, config.init = False, "mode", "orthogonal"
    config.target_modules = _union(configs, "target_modules", model.targeted_module_names)
    config.target_parameters = sorted(_union(configs, "target_parameters", model.targeted_parameter_names)) or None
    config.modules_to_save = next((c.modules_to_save for c in configs if c.modules_to_save), None)

    model.peft_config[adapter_name] = config
    try:
        model.inject_adapter(model.model, adapter_name)
    except Exception:
        del model.peft_config[adapter_name]
        raise
    model._cast_adapter_dtype(adapter_name)
    for full_name, layer, weight in model.adapted_weights(adapter_name):
        core, factors = combined[full_name]
        layer.core(adapter_name, weight).copy_(core)
        for own, factor in zip(layer.factors(adapter_name, weight), factors, strict=True):
            if own is not None:
                own.copy_(factor)
    _copy_saved_modules(model, adapters, adapter_name)


def _combine(
    layer: Any, weight: str, name: str, adapters: list[str], weights: list[float], how: str, config: Any
) -> tuple[Any, list[Any]]:
    present = [(a, w) for a, w in zip(adapters, weights, strict=True) if weight in layer.weights.get(a, {})]
    described = layer.weights[present[0][0]][weight]
    if any(layer.weights[adapter][weight].shape != described.shape for adapter, _ in present):
        raise ValueError(f"adapters: {name} is folded differently in {', '.join(a for a, _ in present)}")
    parts = [(layer.core(a, weight) * (layer.scale_of(a, weight) * w), layer.factors(a, weight)) for a, w in present]
    core, factors = concatenate(parts) if len(parts) > 1 else reduce_ranks(*parts[0])
    if how == "hooi":
        ranks = clip_ranks(described.shape, ranks_of(described, config, name), "multilinear")
        core, factors = truncate(core, factors, ranks)
    return core, factors


def _union(configs: list[Any], field: str, names: list[str]) -> set[str]:
    """The names that at least one configuration targets."""
    union: set[str] = set()
    for config in configs:
        targets = getattr(config, field)
        if isinstance(targets, str):
            union |= {name for name in names if re.fullmatch(targets, name)}
        else:
            union |= set(targets or ())
    return union


def _copy_saved_modules(model: Any, adapters: list[str], adapter_name: str) -> None:
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            source = next(a for a in adapters if a in module.modules_to_save)
            module.modules_to_save[adapter_name].load_state_dict(module.modules_to_save[source].state_dict())
