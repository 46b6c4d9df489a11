"""Whether a record can be what it says: its fields are of their kinds, its id is its config's, and all of it agrees."""

import json
import re
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from flora import config, names
from flora.results.record import SCHEMA_VERSION, STATUSES

_REQUIRED = ("schema_version", "run_id", "status", "task", "dataset", "model", "adapter", "seed")
_MASK = re.compile(r"<(?:secret|\w+)>")  # what flora.secrets puts in a secret's place

# Where the metrics of the suite's tasks lie, by the end of their names: further test sets and kinds of questions go
# before or after. Of a metric that is not among them nothing is known.
_SIGNED = ("matthews_correlation", "pearson", "spearmanr", "mean_correlation")
_SHARES = ("accuracy", "exact_match", "precision", "recall", "f1", "share")
_ROUNDING = 1e-9
_SAID_TWICE = {  # fields of a record, and where its config says the same
    "mode": ("mode",),
    "seed": ("seed",),
    "task": ("task", "name"),
    "dataset": ("task", "dataset"),
    "adapter": ("adapter", "name"),
    "protocol": ("protocol", "name"),
    "dtype": ("trainer", "dtype"),
    "method_version": ("method_version",),
}


_OWN_SPLIT = tuple(f"flora.tasks.{name}" for name in ("Vtab", "Instruct", "Commonsense", "ImageFolder", "Digits"))
_ADD_NOTHING = ("flora.methods.Full", "flora.methods.LinearProbe", "flora.methods.BitFit")  # train what is there


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return _integer(value) and value >= 0


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _measured(value: Any) -> bool:
    return _finite(value) and value >= 0


def _share(value: Any) -> bool:
    return _measured(value) and value <= 1 + _ROUNDING


def _time(value: Any) -> bool:
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _or_none(sound: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or sound(value)


def _list(sound: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(sound, value))


def _named(sound: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(sound, value.values()))


def _selection(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return value == {}  # no grid
    rates = all(_list(_finite)(value.get(key, [])) for key in ("diverged", "added"))
    numbers = _finite(value.get("chosen")) and _measured(value.get("seconds"))
    return _named(_or_none(_finite))(value.get("values")) and numbers and rates


def _execution(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    flags = all(_flag(value.get(key, False)) for key in ("cuda_graph", "compile", "cached_on_device"))
    return flags and _list(_count)(value.get("resumed_at_steps", [])) and _count(value.get("processes", 1))


_Rules = tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...]
_KINDS: _Rules = (  # of fields that are there; the first records lack some
    (("run_id", "task", "dataset", "model", "adapter", "protocol", "dtype", "device", "command"), _text, "a string"),
    (("metric", "adapter_path", "commit", "lock", "error"), _or_none(_text), "a string or null"),
    (("mode",), lambda value: value in ("train", "eval"), "train or eval"),
    (("split",), lambda value: value in ("test", "validation"), "test or validation"),
    (("seed", "method_version"), _integer, "an integer"),
    (("config", "data", "weights"), _object, "an object"),
    (("metrics",), _named(_finite), "an object of finite numbers"),
    (("versions",), _named(_text), "an object of strings"),
    (("ranks",), _named(_list(_count)), "an object of lists of ranks"),
    (("skipped_layers",), _list(_text), "a list of names"),
    (
        ("selection",),
        _selection,
        "{} or a choice with chosen, seconds, and values that are finite, or null of a fit that diverged",
    ),
    (("execution",), _execution, "an object that says how the steps were run"),
    (("history",), _list(_named(_finite)), "a list of objects of finite numbers"),
    (("value", "lr"), _or_none(_finite), "a finite number or null"),
    (
        ("train_seconds", "examples_per_second", "steady_examples_per_second"),
        _or_none(_measured),
        "a number from 0 or null",
    ),
    (("gpu_busy_share",), _or_none(_share), "a share from 0 to 1 or null"),
    (("trainable_params", "head_params", "total_params", "peak_memory_bytes"), _or_none(_count), "a count or null"),
    (("deterministic", "masked"), _flag, "true or false"),
    (("dirty",), _or_none(_flag), "true, false or null"),
    (("started",), _time, "a time with its zone"),
    (("finished",), _or_none(_time), "a time with its zone or null"),
)
_FINISHED: _Rules = (  # what tables read, of which nothing may be missing then
    (("metric", "protocol", "mode", "dtype", "device"), _text, "a string"),
    (("value",), _finite, "a finite number"),
    (("metrics", "versions"), _object, "an object"),
    (("skipped_layers", "history"), _list(lambda value: True), "a list"),
    (("trainable_params", "head_params"), _count, "a number of parameters"),
    (("total_params",), lambda value: _count(value) and value > 0, "a number of parameters"),
    (("started", "finished"), _time, "a time with its zone"),
)


def bounds(metric: str) -> tuple[float, float]:
    """The least and the greatest value of a metric."""
    if metric == "loss" or metric.endswith("_loss"):
        return 0.0, float("inf")
    if metric.endswith(_SIGNED):
        return -1.0, 1.0
    shares = metric.endswith(_SHARES) or metric.startswith("exact_match")
    return (0.0, 1.0) if shares else (-float("inf"), float("inf"))


def fault(record: Any, run_id: str) -> str | None:
    """What a record says that cannot be, in one line; None if nothing.

    Args:
        record: what a file of a record holds.
        run_id: what the file is named after.
    """
    if not isinstance(record, dict) or any(key not in record for key in _REQUIRED):
        return f"not a record (needs {', '.join(_REQUIRED)})"
    if record["schema_version"] != SCHEMA_VERSION or isinstance(record["schema_version"], bool):
        remedy = ": python scripts/convert_records.py converts the folder" if record["schema_version"] == 1 else ""
        return f"schema version {record['schema_version']!r:.40}, this code reads {SCHEMA_VERSION}{remedy}"
    if record["status"] not in STATUSES:
        return f"unknown status {record['status']!r:.40}"
    if wrong := _unlike(_KINDS, record):
        return wrong
    if record["run_id"] != run_id:
        return f"is a record of run {record['run_id']}, name it {record['run_id']}.json"
    if record["status"] != "finished":
        return _of_config(record)
    return _unlike(_FINISHED, record, "finished with ") or _of_config(record) or _of_result(record)


def _unlike(rules: _Rules, record: dict[str, Any], said: str = "") -> str | None:
    for fields, sound, kind in rules:
        for field in fields:
            if (said or field in record) and not sound(record.get(field)):
                return f"{said}{field} {'' if said else 'is '}{record.get(field)!r:.40}, it must be {kind}"
    return None


def _of_config(record: dict[str, Any]) -> str | None:
    settings = record.get("config") or {}
    try:
        run_id = config.recorded_id(settings)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return "its config is not that of a run"
    masked = record.get("masked") is True and _MASK.search(json.dumps(settings))
    if run_id != record["run_id"] and not masked:  # what a secret was cannot be hashed again
        return f"its config is that of run {run_id}"
    for field, (group, *key) in _SAID_TWICE.items():
        if field == "adapter" and record.get("mode") == "eval":
            continue  # the record names the method that made the checkpoint
        within = settings.get(group)
        expected = within.get(key[0]) if key and isinstance(within, dict) else within
        if expected is not None and record.get(field, expected) != expected:
            return f"{field} is {record[field]!r:.40}, its config says {expected!r:.40}"
    if (expected := _model(settings["model"])) is not None and record["model"] != expected:
        return f"model is {record['model']!r:.40}, its config says {expected!r:.40}"
    if (expected := _split(settings["task"])) is not None and record.get("split", expected) != expected:
        return f"split is {record['split']!r:.40}, its config says {expected!r:.40}"
    return None


def _model(settings: dict[str, Any]) -> str | None:
    """The name of the model that a config builds; None where only its class knows."""
    target = str(names.current_targets(settings).get("_target_"))
    home, _, own = target.rpartition(".")
    if home != "flora.models":
        return None
    return settings.get("name") or settings.get("timm_name") or (own if own.islower() else None)


def _split(settings: dict[str, Any]) -> str | None:
    """The split that a config's task tests on; None where only its class knows."""
    target = names.current_targets(settings).get("_target_")
    if (
        target == "flora.tasks.Glue"
    ):  # the development set, from which nothing is chosen where some of train is held out
        return "test" if settings.get("held_out", 0.1) else "validation"
    return "test" if target in _OWN_SPLIT else None


def _of_result(record: dict[str, Any]) -> str | None:
    metrics, metric, value = record["metrics"], record["metric"], record["value"]
    if metrics.get(metric) != value:
        return f"value is {value!r:.40}, but its metric {metric} {metrics.get(metric)!r:.40}"
    for name, number in metrics.items():
        low, high = bounds(name)
        if not low - _ROUNDING <= number <= high + _ROUNDING:
            return f"{name} is {number!r:.40}, outside [{low:g}, {high:g}]"
    settings, lr, selection = record["config"], record.get("lr"), record.get("selection")
    rates = settings["protocol"].get("lr_grid") or [settings["trainer"].get("lr")]
    if settings["protocol"].get("extend"):
        rates = [*rates, *(selection or {}).get("added", [])]
    trained = record["mode"] == "train" and settings["trainer"].get("max_steps") != 0
    if trained and lr not in rates:
        return f"lr is {lr!r:.40}, its config says {rates!r:.80}"
    if selection and (selection["chosen"] != lr or selection["values"].get(f"{lr:g}") is None):
        return f"lr is {lr!r:.40}, its selection chose {selection['chosen']!r:.40} of {[*selection['values']]!r:.80}"
    head, total = record["head_params"], record["total_params"]
    method = names.current_targets(settings["adapter"]).get("_target_")
    own = record["trainable_params"] if method in _ADD_NOTHING else 0  # an adapter's stand beside the model's
    if own + head > total:
        return f"{own + head} parameters of the model were trained, it has {total}"
    if datetime.fromisoformat(record["finished"]) < datetime.fromisoformat(record["started"]):
        return f"finished at {record['finished']}, before it started at {record['started']}"
    return None
