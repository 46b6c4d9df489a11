"""Configs: what train.py composes, safe instantiation, and the run's identity."""

import contextlib
import hashlib
import json
import math
import pickle
from collections.abc import Sequence
from functools import cache
from types import FunctionType
from typing import Any, cast

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from flora import names, values
from flora.errors import ConfigError, FloraError, first_line
from flora.files import ROOT
from flora.methods import alpha
from flora.secrets import without_secrets
from flora.tasks import aliases

# A ``_target_`` runs code, so a config may only name classes of ours, and the functions that make our models.
ALLOWED_TARGETS = ("flora.",)
_ALLOWED_FUNCTIONS = ("flora.models.presets",)

# Bumped whenever the same config would give other numbers; older records then show as stale.
METHOD_VERSION = 1

# Keys of configs/adapter that are no settings of the method: configs/trainer/default.yaml takes its rates from them.
_TRAINER_DEFAULTS = ("lr", "head_lr")

# Keys of a model's config that may name files of the user's: what those hold counts, not where they lie.
PLACES = ("weights", "vision_weights", "language_weights", "path", "projector", "tokenizer")

# What decides the result. Everything else (paths, logging, debugging) may differ between two equal runs.
_SEMANTIC = ("mode", "checkpoint", "task", "model", "adapter", "trainer", "protocol", "seed")
_GROUPS = ("task", "model", "adapter", "trainer", "protocol", "logger", "paths", "analysis")
_NOT_SEMANTIC: dict[str, tuple[str, ...]] = {
    "trainer": (
        *("num_workers", "device", "log_every", "cuda_graph", "compile", "channels_last", "cache_on_device"),
        *("resume", "checkpoint_every", "distributed"),
    ),
    "adapter": (*_TRAINER_DEFAULTS, "explain"),
    "model": ("allow",),  # so that no saved config allows code to run
}

# Methods that train nothing but the head: a grid is over its rate, whatever the trainer gives heads beside an adapter.
HEAD_ALONE = ("linear_probe",)

# Options where zero, false or an empty list says something else than null.
_ZERO_COUNTS = (
    *("scale", "alpha", "stack_modes", "color_jitter", "max_steps", "head_lr", "warmup_steps"),
    *("init_weights", "init_lora_weights", "init_ia3_weights"),
)


def composed(overrides: Sequence[str]) -> DictConfig:
    """What ``python train.py OVERRIDES`` composes: groups by Hydra, once for each choice of them, then the values.

    Raises:
        ConfigError: an override that does not fit the configs.
    """
    groups = {path.name for path in (ROOT / "configs").iterdir() if path.is_dir()}
    chosen = tuple(o for o in overrides if o.split("=")[0] in groups)
    cfg: DictConfig = pickle.loads(_choice(chosen))
    try:
        for override in (parsed(o) for o in overrides if o not in chosen):
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True, force_add=override.is_add())
    except OmegaConfBaseException as error:
        raise ConfigError(f"{' '.join(overrides)}: {one_line(error)}") from error
    return cfg


@cache
def _choice(groups: tuple[str, ...]) -> bytes:
    """What Hydra composes for a choice of groups; pickled, as a copy then takes a quarter of deepcopy's time."""
    with _initialized():
        return pickle.dumps(compose("train", overrides=list(groups)))


@cache
def parsed(text: str) -> Override:
    """An override as Hydra reads it."""
    return OverridesParser.create().parse_override(text)


def _initialized() -> Any:
    """The context in which Hydra composes from our configs."""
    return initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs"))


def check_shape(cfg: DictConfig) -> None:
    """Refuse what no setting of a run may be, before anything reads it.

    Raises:
        ConfigError: a group that is no mapping or is missing, a number that is not finite, a
            text with a null byte, an unknown mode, a checkpoint that it would not read, a seed that is none, a switch
            that is neither on nor off.
    """
    for group in _GROUPS:
        if not isinstance(cfg.get(group), DictConfig):
            raise ConfigError(f"{group} must be a group of settings, got {cfg.get(group)!r}")
    _check_values(OmegaConf.to_container(cfg, resolve=True), "")
    if cfg.mode not in ("train", "eval", "predict"):
        raise ConfigError(f"mode must be train, eval or predict, got {cfg.mode!r}")
    if cfg.mode == "train" and cfg.checkpoint is not None:
        raise ConfigError(f"checkpoint={cfg.checkpoint} is for mode=eval; a run that was cut short goes on without it")
    if cfg.mode != "predict" and (given := next((k for k in ("input", "output") if cfg.get(k) is not None), None)):
        raise ConfigError(f"{given}={cfg[given]} is for mode=predict")
    if type(cfg.seed) is not int or not 0 <= cfg.seed < 2**32:
        raise ConfigError(f"seed must be a whole number in 0..{2**32 - 1}, got {cfg.seed!r}")
    _check_allowed(cfg)
    if cfg.reuse not in ("own", "reference"):
        raise ConfigError(f"reuse must be own or reference, got {cfg.reuse!r}")
    for key in ("force", "retry"):
        if not isinstance(cfg[key], bool):
            raise ConfigError(f"{key} must be true or false, got {cfg[key]!r}")


def unread(words: Sequence[str]) -> list[str]:
    """Keys that overrides add to those there are (``+epochs=3``), and nothing reads unless an interpolation does."""
    configs = ROOT / "configs"
    known = yaml.safe_load((configs / "train.yaml").read_text(encoding="utf-8"))
    added = [word.lstrip("+").partition("=")[0].partition("@")[0] for word in words if word.startswith("+")]
    mentioned = " ".join(words)
    return [
        key
        for key in added
        if "." not in key and key not in known and not (configs / key).is_dir() and f"${{{key}}}" not in mentioned
    ]


def idle(cfg: DictConfig, words: Sequence[str]) -> list[str]:
    """Overrides that say how to look at gradients (``adapter.gradient``), where neither start nor ranks do that."""
    if _looks(cfg.adapter):
        return []
    return [word for word in words if word.lstrip("+").startswith("adapter.gradient.")]


def _check_allowed(cfg: DictConfig) -> None:
    """Believe ``model.allow``, which lets code run, only of who starts the run: not of configs that others wrote."""
    if not cfg.model.get("allow") or not HydraConfig.initialized():  # else Python code composed it
        return
    typed = any(o.lstrip("+").startswith("model.allow=") for o in HydraConfig.get().overrides.task)
    local = ROOT / "configs" / "local" / "default.yaml"
    if not typed and not (local.is_file() and OmegaConf.select(OmegaConf.load(local), "model.allow")):
        raise ConfigError(
            f"model.allow={list(cfg.model.allow)} comes from a config: type it on the command line, or write it into "
            f"{local}, where you trust the code"
        )


def _check_values(node: Any, name: str) -> None:
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            _check_values(value, f"{name}.{key}".lstrip("."))
    elif (isinstance(node, float) and not math.isfinite(node)) or (isinstance(node, str) and "\0" in node):
        raise ConfigError(f"{name} must be a finite number or plain text, got {node!r}")


def instantiate(node: DictConfig) -> Any:
    """Build the object that a config node's ``_target_`` names, refusing targets outside the package.

    Raises:
        ConfigError: a target that is not ours, an unknown key, or a value the constructor rejects.
    """
    return _built(_settings(node), node._get_full_key(None))


def instantiate_method(node: DictConfig) -> Any:
    """Build the fine-tuning method that a node of the group ``adapter`` describes: a ``flora.methods.Method``.

    Its constructor does not get what the node says to others: learning rates, which are the trainer's, the budget,
    which train.yaml asks of every method and a method with ranks takes by ``set_budget``, and how to look at gradients
    where nothing asks for that.

    Raises:
        ConfigError: as ``instantiate``, or a budget for a method without ranks.
    """
    said = _looking(_settings(node))
    settings = {key: value for key, value in said.items() if key not in _TRAINER_DEFAULTS}
    budget, allocation, gradient = (settings.pop(key, None) for key in ("budget", "allocation", "gradient"))
    method = _built(settings, node._get_full_key(None))
    if (budget is not None or allocation is not None) and not getattr(method, "has_ranks", False):
        key = "allocation" if budget is None else "budget"
        raise ConfigError(
            f"{settings['_target_']}: adapter.{key}: {method.name} has no ranks that a budget could set layer by "
            f"layer; leave the {key} out"
        )
    try:
        if budget is not None or allocation is not None:
            method.set_budget(budget, allocation, matched_method)
        if gradient is not None:
            method.set_gradient(**gradient)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{settings['_target_']}: {error}") from error
    return method


def matched_method(name: str, rank: int | None, targets: str | Sequence[str]) -> Any:
    """The method of configs/adapter that a budget ``match:NAME:RANK`` is counted by.

    Args:
        name: of the config.
        rank: sets ``adapter.r``; None leaves the config's.
        targets: layers, by pattern or names, in place of those that a model's config names.

    Raises:
        ValueError: no such config, or none with such a rank.
    """
    overrides = [f"adapter={name}", *([f"adapter.r={rank}"] if rank else [])]
    # A run composes from what Hydra was started with, which may have folders of the user's own.
    started = GlobalHydra.instance().is_initialized()
    context: Any = contextlib.nullcontext() if started else _initialized()
    try:
        with context:
            cfg = compose("train", overrides)
    except HydraException as error:
        methods = ", ".join(sorted(path.stem for path in (ROOT / "configs" / "adapter").glob("*.yaml")))
        raise ValueError(
            f"adapter.budget: no method {name!r} with such a rank to match; there are {methods}"
        ) from error
    with open_dict(cfg):
        cfg.model = {"adapter_targets": targets if isinstance(targets, str) else list(targets)}
    return instantiate_method(cfg.adapter)


def _settings(node: DictConfig) -> dict[str, Any]:
    """A node to instantiate, resolved, with current names."""
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ConfigError(f"{node!r} is not a config with a _target_")
    return names.current_targets(OmegaConf.to_container(node, resolve=True))


def _built(settings: dict[str, Any], group: str) -> Any:
    for target in _targets(settings):
        _check_target(target)
    settings = _fitted(settings, group)
    try:
        return hydra.utils.instantiate(settings, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, FloraError):
            raise cause from None
        if isinstance(cause, TypeError | ValueError):
            raise ConfigError(f"{settings['_target_']}: {cause}") from error
        raise ConfigError(first_line(error)) from error


def _fitted(node: Any, name: str) -> Any:
    """A node, and all in it that have a ``_target_``, with the kinds of numbers that the targets take."""
    if isinstance(node, list):
        return [_fitted(value, f"{name}.{index}") for index, value in enumerate(node)]
    if not isinstance(node, dict):
        return node
    inner = {key: _fitted(value, f"{name}.{key}") for key, value in node.items()}
    return values.fitted(hydra.utils.get_object(node["_target_"]), inner, name) if "_target_" in node else inner


def _check_target(target: str) -> None:
    """Refuse what is not ours, also where the name walks through a module of ours into one that it imports."""
    if not target.startswith(ALLOWED_TARGETS):
        raise ConfigError(f"_target_ {target!r} is not allowed: only {', '.join(ALLOWED_TARGETS)}* may be named")
    try:
        named = hydra.utils.get_object(target)
    except Exception as error:  # whatever an import of it raises
        raise ConfigError(f"_target_ {target!r} cannot be found: {one_line(error)}") from error
    home = str(getattr(named, "__module__", ""))
    ours = home.startswith(ALLOWED_TARGETS) and isinstance(named, type)
    if not ours and not (isinstance(named, FunctionType) and home in _ALLOWED_FUNCTIONS):
        raise ConfigError(f"_target_ {target!r} is not allowed: it is no class of flora")


def _targets(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [str(node["_target_"])] if "_target_" in node else []
        return own + [t for value in node.values() for t in _targets(value)]
    if isinstance(node, list):
        return [t for value in node for t in _targets(value)]
    return []


def semantic_config(cfg: DictConfig, method_version: int | None = None) -> dict[str, Any]:
    """The resolved part of the config that decides the result, as plain containers; by default of this version.

    A record's config has ``inputs`` as well, which identify the data and weights (``flora.inputs``).
    """
    resolved = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    if resolved["protocol"].get("lr_grid") and resolved["adapter"].get("name") in HEAD_ALONE:
        resolved["trainer"]["head_lr"] = resolved["protocol"]["head_lr_grid"] = None  # as flora.training.run trains
    semantic = _decisive(resolved) | {"method_version": method_version or METHOD_VERSION}
    task = semantic["task"]
    if said := aliases.augmentation(task):
        semantic["task"] = task | {"augment": said}
    version = aliases.data_version(task)
    return semantic | ({"data_version": version} if version else {})


def not_semantic(group: str) -> tuple[str, ...]:
    """Settings of a group that decide no result."""
    return _NOT_SEMANTIC.get(group, ())


def _decisive(resolved: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that decides the result."""
    semantic = {key: resolved[key] for key in _SEMANTIC if resolved.get(key) is not None}
    if (resolved.get("analysis") or {}).get("every_n_steps"):
        semantic["analysis"] = resolved["analysis"]  # such a run's record holds more
    unused = dict(_NOT_SEMANTIC)
    if semantic["protocol"].get("lr_grid"):
        chosen = ("lr", "head_lr") if semantic["protocol"].get("head_lr_grid") else ("lr",)
        unused["trainer"] = (*unused["trainer"], *chosen)
    for group, keys in unused.items():
        semantic[group] = {k: v for k, v in semantic[group].items() if k not in keys}
    semantic["adapter"] = _looking(alpha.resolved(semantic["adapter"]))  # 2r where that is 16 is the same run as 16
    return semantic


def _looking(adapter: dict[str, Any]) -> dict[str, Any]:
    """Settings of a method without those of looking at gradients, where neither its start nor its ranks do that."""
    return {key: value for key, value in adapter.items() if key != "gradient" or _looks(adapter)}


def _looks(adapter: Any) -> bool:
    return "gradient" in (adapter.get("init"), adapter.get("allocation"))


def cell_id(cfg: DictConfig, checkpoint_digest: str | None = None, method_version: int | None = None) -> str:
    """Twelve hex digits that name what is run, whatever the data and weights hold: a cell of a table.

    They are equal for equal semantic configs, on any machine and in every process. A checkpoint to evaluate counts by
    its content, not by where it lies.
    """
    return identity(semantic_config(cfg, method_version) | {"checkpoint": checkpoint_digest})


def recorded_id(config: dict[str, Any]) -> str:
    """The run id of a record's config.

    Raises:
        KeyError, TypeError, AttributeError: it is no config of a run.
    """
    kept = ("method_version", "data_version", "inputs")
    return identity(_decisive(config) | {key: config.get(key) for key in kept})


def recorded_cell(config: dict[str, Any]) -> str:
    """The cell id of a record's config; errors as of ``recorded_id``."""
    return recorded_id({key: value for key, value in config.items() if key != "inputs"})


def identity(semantic: dict[str, Any]) -> str:
    """The run id of what ``semantic_config`` gave and its inputs; without inputs, the cell id.

    Where weights count by what they hold, the places of the user's own do not.
    """
    if (semantic.get("inputs") or {}).get("weights"):
        semantic = semantic | {"model": _without_places(semantic["model"])}
    text = json.dumps(names.first(_pruned(semantic)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _without_places(model: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_places(value) if isinstance(value, dict) else value
        for key, value in model.items()
        if not (key in PLACES and isinstance(value, str))
    }


def _pruned(node: Any) -> Any:
    """Without null, false, zero and empty values, so that a new option that defaults to off keeps old run ids.

    Zeros that say something else than null stay (``_ZERO_COUNTS``), as does all that patterns give to single layers and
    what is handed on to other code.
    """
    if isinstance(node, dict):
        kept = {key: value for key, value in node.items() if value or (key in _ZERO_COUNTS and value is not None)}
        whole = {key for key in kept if key.endswith("_pattern") or key == "arguments"}
        return {key: value if key in whole else _pruned(value) for key, value in kept.items()}
    return [_pruned(value) for value in node] if isinstance(node, list) else node


def one_line(error: BaseException) -> str:
    """An error's message without line breaks or secrets, with the cause that Hydra and OmegaConf put in later lines."""
    parts = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error.__cause__, OmegaConfBaseException):
        parts.append(str(error.__cause__).splitlines()[0].strip())
    return without_secrets("; ".join(dict.fromkeys(parts))) or type(error).__name__
