"""A search for the best settings on validation, with optuna: `python train.py -m hydra/sweeper=search`."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from flora import extras
from flora.config import HEAD_ALONE
from flora.errors import ConfigError, Interrupted
from flora.launch.sweep import error_of

DIGITS = 3  # significant ones of a number that is tried, so that it can be typed


def search(
    config: DictConfig,
    launcher: Launcher,
    arguments: list[str],
    trials: int,
    parallel: int,
    seed: int,
    space: dict[str, dict[str, Any]],
) -> list[JobReturn]:
    """Try settings, the next ones by what the finished ones scored on validation; say the best as a command line.

    Every trial is a run with a record of its own. The same command asks for the same trials, so finished ones are
    found again. Runs test what they train, but what is searched by is the validation metric alone.

    Args:
        config: what train.py composes without what is swept.
        launcher: Hydra's, which runs trials.
        arguments: the overrides as typed.
        trials, parallel: how many in all, and at once.
        seed: of the sampler.
        space: by key, ``low`` and ``high`` with or without ``log``, or ``choices``.

    Raises:
        ConfigError: optuna is not installed, the space is none, or the protocol has no validation.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError(extras.needs("a search", "optuna")) from None
    parsed = OverridesParser.create().parse_overrides(arguments)
    fixed = [override.input_line or "" for override in parsed if not override.is_sweep_override()]
    searched = _space(config, space, parsed)
    _check(config, trials, parallel, searched)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    _say(f"search: {trials} trials over {', '.join(searched)}, by the metric on validation")
    done: list[tuple[float, list[str], dict[str, Any]]] = []
    returns: list[JobReturn] = []
    while len(returns) < trials:
        asked = [study.ask() for _ in range(min(parallel, trials - len(returns)))]
        tried = [[f"{key}={_suggest(trial, key, of)}" for key, of in searched.items()] for trial in asked]
        answers = launcher.launch([[*fixed, *words] for words in tried], initial_job_idx=len(returns))
        for trial, words, answer in zip(asked, tried, answers, strict=True):
            returns.append(answer)
            if answer.status != JobStatus.COMPLETED:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            record = json.loads(Path(str(answer.return_value)).read_bytes())
            value = validation_value(record)
            study.tell(trial, value)
            done.append((value, words, record))
            _say(f"search: trial {len(returns)} of {trials}: {' '.join(words)}: validation {value:.4f}")
        if any(isinstance(error_of(answer), Interrupted) for answer in answers):
            break  # the same command goes on
    if done:
        value, words, record = max(done, key=lambda trial: trial[0])
        _say(f"best of {len(done)} trials: validation {record['metric']} {value:.4f}, run {record['run_id']}:")
        _say(shlex.join(["python", "train.py", *fixed, *words]))
    return returns


def validation_value(record: dict[str, Any]) -> float:
    """What a run scored on validation: of the rate that a grid chose, or of the epoch that the run kept.

    Raises:
        ConfigError: its history has no validation metric.
    """
    if selection := record.get("selection"):
        return selection["values"][f"{selection['chosen']:g}"]
    name = f"eval_{record['metric']}"
    seen = [entry[name] for entry in record["history"] if name in entry]
    if not seen:
        raise ConfigError(f"run {record['run_id']} never looked at validation: there is nothing to search by")
    return max(seen) if record["config"]["protocol"]["select"] == "best" else seen[-1]


def _space(config: DictConfig, space: dict[str, dict[str, Any]], typed: list[Override]) -> dict[str, dict[str, Any]]:
    """What is searched: the space without what is fixed or does not exist here, and what was typed as swept."""
    searched = {str(key): dict(of) for key, of in space.items()}
    if "trainer.lr" in searched and config.adapter.get("name") in HEAD_ALONE and config.trainer.get("head_lr"):
        searched = {key.replace("trainer.lr", "trainer.head_lr"): of for key, of in searched.items()}  # which trains it
    for override in typed:
        key, value = override.get_key_element(), override.value()
        searched.pop(key, None)
        if isinstance(value, ChoiceSweep):
            searched[key] = {"choices": list(override.sweep_string_iterator())}
        elif isinstance(value, IntervalSweep):
            searched[key] = {"low": value.start, "high": value.end, "log": "log" in value.tags}
        elif override.is_sweep_override():
            raise ConfigError(f"search: {override.input_line}: give choices (KEY=1,2,3) or KEY=interval(low,high)")
    missing = object()
    for key in [key for key in searched if "." in key and OmegaConf.select(config, key, default=missing) is missing]:
        del searched[key]
        _say(f"search: {key} is left out, nothing here has it")
    return searched


def _check(config: DictConfig, trials: int, parallel: int, searched: dict[str, dict[str, Any]]) -> None:
    if not searched:
        raise ConfigError("search: nothing is left to search: give a key fewer on the command line")
    if "seed" in searched:
        raise ConfigError("search: seed= takes one value; repeat the best settings with other seeds afterwards")
    for name, count in (("trials", trials), ("parallel", parallel)):
        if not isinstance(count, int) or count < 1:
            raise ConfigError(f"hydra.sweeper.{name}={count!r}: must be a whole number of at least 1")
    for key, of in searched.items():
        low, high = of.get("low"), of.get("high")
        least = 0 if of.get("log") else -float("inf")
        sound = isinstance(low, int | float) and isinstance(high, int | float) and least < low < high
        if not of.get("choices") and not sound:
            raise ConfigError(f"search: {key} needs choices, or low < high (above 0 where log), got {of}")
    if config.protocol.final_train != "train" and not config.protocol.lr_grid:
        raise ConfigError(
            f"search: protocol={config.protocol.name} trains on train and validation together, which leaves nothing to "
            "search by: add protocol=holdout"
        )


def _suggest(trial: Any, key: str, of: dict[str, Any]) -> Any:
    if of.get("choices"):
        return trial.suggest_categorical(key, list(of["choices"]))
    if isinstance(of["low"], int) and isinstance(of["high"], int):
        return trial.suggest_int(key, of["low"], of["high"], log=bool(of.get("log")))
    return f"{trial.suggest_float(key, of['low'], of['high'], log=bool(of.get('log'))):.{DIGITS}g}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
