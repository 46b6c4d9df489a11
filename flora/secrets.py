"""What nobody else may read: secrets of the environment and of the config stay out of all that a process leaves."""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any
from urllib.parse import quote

# What nothing but a secret is called; a tokenizer's special tokens are none.
_CLEAR = r"""(?:
    [\w-]*pass(?:word|wd|phrase) | [\w-]+(?:secrets?|credentials?|bearer)
  | (?:[\w-]*[_-])?(?:api|access|private|auth|hub|ssh|client|wandb|hf)[_-]?(?:keys?|tokens?)
  | (?!(?:bos|eos|unk|sep|pad|cls|mask|image|video|audio)_)[\w-]+[_-]token
)"""
# What is one as the key of a config or in an override, and not in a sentence.
_VAGUE = r"""(?:
    (?!full_)[\w-]+[_-]key | token | secrets? | credentials? | bearer | [\w-]*pass
  | (?:[\w-]+[_-])?(?:pwd|pat|pw|passcode|jwt)
)"""
_NAME = re.compile(rf"{_CLEAR}|{_VAGUE}", re.IGNORECASE | re.VERBOSE)
_NONE = r"""["']?(?:<[\w\ ]+>|\$\{[^},]*\}|null|none|true|false|\?\?\?)["']?(?=[\s,;&}\]]|\Z)"""  # where no secret is
_VALUE = rf"""(?!{_NONE})(?:"[^"]+"|'[^']+'|[^\s,;&}}\]"']+)"""

_NOTHING = re.compile(_NONE, re.IGNORECASE)
_TEXTS = [
    (re.compile(pattern, re.IGNORECASE | re.VERBOSE | re.MULTILINE | re.DOTALL), replacement)
    for pattern, replacement in (
        # A whole argument, which may hold blanks; then what a text assigns, and a config's lines.
        (
            rf"""\A([+~]*(?:[\w@/-]+\.)*(?:{_CLEAR}|{_VAGUE})=)(?!{_NONE})(?!\S*\s+[+~]*[\w.]+=).+\Z""",
            r"\1<secret>",
        ),
        (rf"((?<![\w-])(?:{_CLEAR}|{_VAGUE})=){_VALUE}(?:,{_VALUE})*", r"\1<secret>"),
        (rf"""((?<![\w-]){_CLEAR}["']?\s*:[ \t]*){_VALUE}""", r"\1<secret>"),
        (rf"""((?:^[ \t-]*|[{{,]\s*)["']?{_VAGUE}["']?\s*:[ \t]*){_VALUE}""", r"\1<secret>"),
        # What is one by its form.
        (r"(\bbearer[ ]+)(?!<)[\w.~+/=-]{8,}", r"\1<secret>"),
        (r"(\w://)[^\s/]+@", r"\1<secret>@"),
        (r"([?&](?:sig|signature|x-amz-signature)=)[^\s&]+", r"\1<secret>"),
        (
            r"(?-i:\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_\w{30,}|\bgithub_pat_\w{20,}|\bsk-[\w-]{20,}|\bAKIA[A-Z0-9]{16})",
            "<secret>",
        ),
    )
]
_VARIABLE = re.compile(
    r"(?:KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL)S?\d*(?![a-z])"
    r"|(?:PASS|PASSWD|PASSPHRASE|BEARER|(?:^|_)(?:PAT|AUTH|PW|JWT|SAS|DSN|OTP|COOKIE)|_PWD)_?\d*$",
    re.IGNORECASE,
)
_LONG, _SHORT = 8, 4  # characters of values that are looked for: anywhere, and as a word that is no plain one


def without_secrets(node: Any) -> Any:
    """Anything of texts, lists and mappings in which no text holds a secret.

    Secrets are the values of variables of the environment named ...KEY, ...TOKEN, ...PASS and the like, what stands
    under such a name in a config or follows it in an override (``api_key=...``), the password of an address, and
    tokens whose form gives them away. A reference (``${oc.env:NAME}``) is none.
    """
    return _shown(node, cache(partial(_text, environment=_of_environment())))  # names come up again and again


@contextlib.contextmanager
def unspoken() -> Iterator[None]:
    """Around a program: what it prints shows no secret, nor does the trace of an error that ends it."""
    out, err = sys.stdout, sys.stderr
    if isinstance(err, Masked):  # a program within one
        yield
        return
    masked: Any = tuple(stream and Masked(stream) for stream in (out, err))  # None where it was closed before
    sys.stdout, sys.stderr = masked
    try:
        yield
    except Exception:
        sys.excepthook = _trace
        raise
    finally:
        if (sys.stdout, sys.stderr) == masked:
            sys.stdout, sys.stderr = out, err


def _trace(*error: Any) -> None:
    print(without_secrets("".join(traceback.format_exception(*error))), end="", file=sys.stderr)


class Masked:
    """A text stream that is written without secrets."""

    def __init__(self, stream: Any) -> None:
        self.unmasked = stream

    def write(self, text: str) -> int:
        """Write a text without its secrets; what is split between two calls is not seen."""
        self.unmasked.write(without_secrets(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unmasked, name)


def _of_environment() -> list[tuple[re.Pattern[str], str]]:
    """Secrets of the environment as a text may write them, with what to put in their place; the longest first."""
    found: dict[str, str] = {}
    for name, whole in os.environ.items():
        if _VARIABLE.search(name) and not (whole.startswith("/") and os.path.exists(whole)):
            for value in map(str.strip, whole.splitlines()):
                if len(value) >= _LONG or (len(value) >= _SHORT and not re.fullmatch(r"[A-Za-z]+|[\d.]+", value)):
                    found |= dict.fromkeys((value, quote(value, safe=""), repr(value)[1:-1]), f"<{name}>")
    longest = sorted(found.items(), key=lambda item: -len(item[0]))
    return [(re.compile(re.escape(v) if len(v) >= _LONG else rf"(?<!\w){re.escape(v)}(?!\w)"), n) for v, n in longest]


def _shown(node: Any, text: Callable[[str], str]) -> Any:
    if isinstance(node, dict):
        named = {key: isinstance(key, str) and _NAME.fullmatch(key) for key in node}
        return {_shown(key, text): _hidden(value) if named[key] else _shown(value, text) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_shown(value, text) for value in node]
    return text(node) if isinstance(node, str) else node


def _text(text: str, environment: list[tuple[re.Pattern[str], str]]) -> str:
    for value, name in environment:
        text = value.sub(name, text)
    for pattern, replacement in _TEXTS:
        text = pattern.sub(replacement, text)
    return text


def _hidden(value: Any) -> Any:
    """A value under a secret's name: no text of it is shown."""
    if isinstance(value, dict):
        return {key: _hidden(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(part) for part in value]
    return "<secret>" if isinstance(value, str) and value and not _NOTHING.fullmatch(value) else value
