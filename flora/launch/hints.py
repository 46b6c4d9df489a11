"""What to type instead, where Hydra refuses an override: the nearest name there is, or the quoting that works."""

import difflib
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flora import config, extras
from flora.errors import FloraError
from flora.files import ROOT

_NO_OPTION = re.compile(r"Could not find '([^']+)/([^'/]+)'")
_NO_KEY = re.compile(r"Could not override '([^']+)'")
_MEANT = {"rank": "r", "ranks": "r", "learning_rate": "lr", "rate": "lr", "num_epochs": "epochs", "steps": "max_steps"}
_AMBIGUOUS = re.compile(r"Ambiguous value for argument '(.+?)'$", re.MULTILINE)


def explained(error: BaseException) -> str:
    """An error's one line; of one that Hydra refused, what is wrong with it and what to type instead."""
    said = None
    if isinstance(error, OverrideParseException):
        said = _unparsed(str(error.override))
    elif isinstance(error, ConfigCompositionException) and (match := _AMBIGUOUS.search(str(error))):
        said = f"{_unparsed(match[1])}, or add -m to run one after the other"
    elif isinstance(error, HydraException) and (match := _NO_OPTION.search(str(error))):
        said = _no_option(match[1], match[2])
    elif isinstance(error, HydraException) and (match := _NO_KEY.search(str(error))):
        said = _no_key(match[1])
    return said or config.one_line(error)


def flags(words: Sequence[str]) -> str | None:
    """What to type instead of ``--max-steps 3``, which Hydra's own parser would answer with its usage."""
    _, unknown = get_args_parser().parse_known_args(list(words))
    for word in unknown:
        if word.startswith("-"):
            name = word.lstrip("-").partition("=")[0].replace("-", "_")
            keys = _keys() if name else []
            same = [key for key in keys if key == name or key.endswith(f".{name}")]
            said = f"{word}: there is no such flag; settings are KEY=VALUE, without dashes"
            return f"{said}; {_did_you_mean(name, keys, same)}see --help"
    return None


def _no_option(group: str, option: str) -> str | None:
    if option.startswith("submitit_") and importlib.util.find_spec("submitit") is None:
        return extras.needs(f"{group}={option}", "submitit")
    folder = ROOT / "configs" / group
    options = sorted(path.stem for path in folder.glob("*.yaml"))
    if not options:
        return None
    near = _did_you_mean(option, options)
    return f"{group}={option}: there is no such {group}; {near}choose one of {', '.join(options)}"


def _no_key(key: str) -> str:
    keys, (group, _, last) = _keys(), key.rpartition(".")
    same = [known for known in keys if known.endswith(f".{last}")]
    if (meant := f"{group}.{_MEANT.get(last, '')}") in keys:
        same = [meant, *same]
    return f"{key}: there is no such key; {_did_you_mean(key, keys, same)}--cfg job lists all"


def _did_you_mean(name: str, names: list[str], first: Sequence[str] = ()) -> str:
    close = [*dict.fromkeys([*first, *difflib.get_close_matches(name, names)])][:3]
    return f"did you mean {' or '.join(close)}? " if close else ""


def _keys() -> list[str]:
    words = [word for word in sys.argv[1:] if "=" in word and "," not in word]
    groups = {path.name for path in (ROOT / "configs").iterdir() if path.is_dir()}
    for chosen in ([word for word in words if word.split("=")[0] in groups], []):
        try:
            return [*dict.fromkeys([*sorted(groups), *_dotted(OmegaConf.to_container(config.composed(chosen)), "")])]
        except (FloraError, HydraException, OmegaConfBaseException):
            continue  # another of them is wrong too
    return sorted(groups)


def _dotted(node: Any, prefix: str) -> list[str]:
    """Names of all keys within plain containers, but for Hydra's own; lists count as values."""
    if not isinstance(node, dict):
        return []
    own = [(key, value) for key, value in node.items() if not str(key).startswith("_")]
    return [name for key, value in own for name in (f"{prefix}{key}", *_dotted(value, f"{prefix}{key}."))]


def _unparsed(word: str) -> str:
    """Of a word that is no override in Hydra's grammar: what would be, tried out."""
    key, equals, value = word.partition("=")
    if not equals:
        return f"{word!r} is no KEY=VALUE: a value with spaces takes quotes, paths.data='my pictures'"
    value = os.path.expanduser(value)  # as the shell does not, after an equals sign
    for mark in "\"'":
        inner = value.replace("\\", "\\\\") if f"\\{mark}" in value or value.endswith("\\") else value
        quoted = f"{key}={mark}{inner.replace(mark, f'{chr(92)}{mark}')}{mark}"
        try:
            if OverridesParser.create().parse_override(quoted).value() == value:
                return f"{word!r} cannot be read: quote the value, for the shell too: {shlex.quote(quoted)}"
        except HydraException:
            continue
    return f"{word!r} cannot be read: rename what it names"
