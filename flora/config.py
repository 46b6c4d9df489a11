"""The boundary to Hydra: safe instantiation, the run's identity, and one-line errors with exit code 2."""

import contextlib
import hashlib
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flora import pipes, preemption, ranks, sweep
from flora.errors import ConfigError, FloraError, Interrupted, first_line
from flora.results.secrets import without_secrets

# A ``_target_`` runs code, so a config may only name classes of ours, and the functions that make our models.
ALLOWED_TARGETS = ("flora.",)
_ALLOWED_FUNCTIONS = ("flora.models.presets",)

# Bumped whenever the same config would give other numbers; older records then show as stale.
METHOD_VERSION = 1

# What decides the result. Everything else (paths, logging, debugging) may differ between two equal runs.
_SEMANTIC = ("mode", "checkpoint", "task", "model", "adapter", "trainer", "protocol", "seed")
_GROUPS = ("task", "model", "adapter", "trainer", "protocol", "logger", "paths", "analysis")
_NOT_SEMANTIC: dict[str, tuple[str, ...]] = {
    "trainer": (
        *("num_workers", "device", "log_every", "cuda_graph", "compile", "cache_on_device"),
        *("resume", "checkpoint_every", "distributed"),
    ),
    "adapter": ("lr", "head_lr", "explain"),  # the first two are only defaults of trainer.lr and trainer.head_lr
}


# Options where zero, false or an empty list says something else than null.
_ZERO_COUNTS = ("scale", "alpha", "init_weights", "init_lora_weights", "stack_modes", "color_jitter")


def check_shape(cfg: DictConfig) -> None:
    """Refuse what no setting of a run may be, before anything reads it.

    Raises:
        ConfigError: a group that is no mapping or is missing, a number that is not finite, a text with a null byte, an
            unknown mode, a checkpoint that it would not read, a seed that is none, a switch that is neither on nor off.
    """
    for group in _GROUPS:
        if not isinstance(cfg.get(group), DictConfig):
            raise ConfigError(f"{group} must be a group of settings, got {cfg.get(group)!r}")
    _check_values(OmegaConf.to_container(cfg, resolve=True), "")
    if cfg.mode not in ("train", "eval"):
        raise ConfigError(f"mode must be train or eval, got {cfg.mode!r}")
    if cfg.mode == "train" and cfg.checkpoint is not None:
        raise ConfigError(f"checkpoint={cfg.checkpoint} is for mode=eval; a run that was cut short goes on without it")
    if not isinstance(cfg.seed, int) or not 0 <= cfg.seed < 2**32:
        raise ConfigError(f"seed must be a whole number in 0..{2**32 - 1}, got {cfg.seed!r}")
    for key in ("force", "retry"):
        if not isinstance(cfg[key], bool):
            raise ConfigError(f"{key} must be true or false, got {cfg[key]!r}")


def _check_values(node: Any, name: str) -> None:
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            _check_values(value, f"{name}.{key}".lstrip("."))
    elif (isinstance(node, float) and not math.isfinite(node)) or (isinstance(node, str) and "\0" in node):
        raise ConfigError(f"{name} must be a finite number or plain text, got {node!r}")


def instantiate(node: DictConfig, **kwargs: Any) -> Any:
    """Build the object that a config node's ``_target_`` names, refusing targets outside the package.

    Raises:
        ConfigError: a target that is not ours, an unknown key, or a value the constructor rejects.
    """
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ConfigError(f"{node!r} is not a config with a _target_")
    for target in _targets(OmegaConf.to_container(node, resolve=True)):
        _check_target(target)
    try:
        return hydra.utils.instantiate(node, _convert_="all", **kwargs)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, FloraError):
            raise cause from None
        if isinstance(cause, TypeError | ValueError):
            raise ConfigError(f"{node.get('_target_', '?')}: {cause}") from error
        raise ConfigError(first_line(error)) from error


def _check_target(target: str) -> None:
    """Refuse what is not ours, also where the name walks through a module of ours into one that it imports."""
    if not target.startswith(ALLOWED_TARGETS):
        raise ConfigError(f"_target_ {target!r} is not allowed: only {', '.join(ALLOWED_TARGETS)}* may be named")
    try:
        found = hydra.utils.get_object(target)
    except Exception as error:  # whatever an import of it raises
        raise ConfigError(f"_target_ {target!r} cannot be found: {one_line(error)}") from error
    home = str(getattr(found, "__module__", ""))
    ours = home.startswith(ALLOWED_TARGETS) and isinstance(found, type)
    if not ours and not (isinstance(found, FunctionType) and home in _ALLOWED_FUNCTIONS):
        raise ConfigError(f"_target_ {target!r} is not allowed: it is no class of flora")


def _targets(node: Any) -> list[str]:
    if isinstance(node, dict):
        found = [str(node["_target_"])] if "_target_" in node else []
        return found + [t for value in node.values() for t in _targets(value)]
    if isinstance(node, list):
        return [t for value in node for t in _targets(value)]
    return []


def semantic_config(cfg: DictConfig, method_version: int | None = None) -> dict[str, Any]:
    """The resolved part of the config that decides the result, as plain containers; by default of this version."""
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    semantic = {key: resolved[key] for key in _SEMANTIC if resolved.get(key) is not None}
    if (resolved.get("analysis") or {}).get("every_n_steps"):
        semantic["analysis"] = resolved["analysis"]  # such a run's record holds more
    unused = dict(_NOT_SEMANTIC)
    if semantic["protocol"].get("lr_grid"):
        unused["trainer"] = (*unused["trainer"], "lr")
    for group, keys in unused.items():
        semantic[group] = {k: v for k, v in semantic[group].items() if k not in keys}
    return semantic | {"method_version": method_version or METHOD_VERSION}


def run_id(cfg: DictConfig, checkpoint_digest: str | None = None, method_version: int | None = None) -> str:
    """Twelve hex digits that name a run: equal for equal semantic configs, on any machine and rank.

    A checkpoint to evaluate counts by its content, not by where it lies.
    """
    return identity(semantic_config(cfg, method_version) | {"checkpoint": checkpoint_digest})


def identity(semantic: dict[str, Any]) -> str:
    """The run id of what ``semantic_config`` gave."""
    text = json.dumps(_pruned(semantic), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _pruned(node: Any) -> Any:
    """Without null, false, zero and empty values, so that a new option that defaults to off keeps old run ids.

    Zeros that say something else than null stay (``_ZERO_COUNTS``), and all that patterns give to single layers.
    """
    if isinstance(node, dict):
        kept = {key: value for key, value in node.items() if value or (key in _ZERO_COUNTS and value is not None)}
        return {key: value if key.endswith("_pattern") else _pruned(value) for key, value in kept.items()}
    return [_pruned(value) for value in node] if isinstance(node, list) else node


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Around a Hydra job: keep bad input from Hydra, which would print more than the one line; ``main`` raises it.

    In a multirun Hydra needs the exception, to mark the job as failed and go on to the next. A signal ends only jobs
    where a launcher's processes run them.
    """
    try:
        preemption.check()
        yield
    except preemption.Preempted as end:
        if not preemption.adopted():
            raise
        preemption.hand_on()
        raise Interrupted(str(end)) from None
    except FloraError as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            print(f"error: {one_line(error)}", file=sys.stderr)
            raise
        _kept.append(error)


_kept: list[FloraError] = []


@pipes.while_read()
def main(entry: Callable[[], Any], trace: Callable[[], bool]) -> None:
    """Run a Hydra entry point; bad input ends in one ``error:`` line on stderr and exit code 2, a sweep in a summary.

    Hydra prints its own composition errors and exits 1. With HYDRA_FULL_ERROR set it lets exceptions through, so that
    one place decides what the user sees.
    """
    preemption.install()
    ranks.hush()
    try:
        if ranks.launched() and {"-m", "--multirun"} & set(sys.argv):
            raise ConfigError("a sweep cannot be shared out by torchrun: start it once for each run")
        try:
            entry()
        except Exception as error:
            if lost := sweep.lost(error):
                preemption.check()
                sweep.summary()
                raise lost from error
            if _refused(error):
                raise ConfigError(one_line(error)) from error
            if not sweep.unfinished():
                raise
        if _kept:
            raise _kept.pop()
        if code := sweep.summary():
            sys.exit(code)
        ranks.finish()
    except KeyboardInterrupt as end:
        sweep.summary()
        if isinstance(end, preemption.Preempted):
            _tell(f"interrupted: {end}; start the same command again to go on")
            sys.exit(end.exit_code)
        sys.exit(130)
    except (FloraError, HydraException, OmegaConfBaseException) as error:
        _tell(f"error: {one_line(error)}", trace())
        sys.exit(error.exit_code if isinstance(error, FloraError) else 2)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and pipes.unread():
            raise
        where = f"{error.filename}: " if error.filename else ""
        _tell(f"error: {where}{error.strerror or error}", trace())
        sys.exit(2 if error.filename else 1)
    except Exception:
        ranks.tells()  # Python prints the trace, where it is heard
        raise


def _refused(error: Exception) -> bool:
    """Whether Hydra or a launcher refused its input before anything ran, though not with an error of its own kind."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, ValueError) and frame.f_globals["__name__"].startswith(("hydra.", "joblib."))


def _tell(line: str, trace: bool = False) -> None:
    if ranks.tells():
        if trace:
            traceback.print_exc()
        print(line, file=sys.stderr)


def one_line(error: BaseException) -> str:
    """An error's message without line breaks or secrets, with the cause that Hydra and OmegaConf put in later lines."""
    parts = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error.__cause__, OmegaConfBaseException):
        parts.append(str(error.__cause__).splitlines()[0].strip())
    return without_secrets("; ".join(dict.fromkeys(parts))) or type(error).__name__
