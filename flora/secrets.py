"""What nobody else may read: secrets of the environment and of the config stay out of all that a process leaves."""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "image", "video", "audio")  # tokens of a tokenizer
# Ends of names, in lower case, that nothing but a secret has: what a sentence says of one is hidden too.
_SURE = (
    r"pass(?:word|wd|phrase)s?",
    r"(?:api|access|private|auth|hub|ssh|client|wandb|hf|secret|session|refresh|account)[_-]?(?:key|token)s?",
    r"[_-](?:secret|credential|bearer|cookie)s?",
    rf"{''.join(f'(?<!{word})' for word in _SPECIAL)}[_-]token",
    r"^cookie",
)
# Those that are a secret's where they name a setting, an override, a flag or a variable of the environment.
_NAMING = (
    r"(?:secret|credential)s?",
    r"(?:^|[_-])(?:bearer|session|private|auth|authorization|jwt|cookie|passcode|pwd|pw|pin|pat|otp|sas|dsn)s?",
    r"^token",
    r"(?<!by)(?<!com)pass",
    r"(?<!^full)[_-]key",
)
_VARIABLE = r"(?:key|token|secret|password|credential)s?\d*(?![a-z])|(?:pass|_pwd)_?\d*\Z"  # anywhere in one of these
_COUNTED = r"(?:pass(?:word|wd|phrase|code)?|(?:^|[_-])(?:pwd|pw|pin|otp))\Z"  # where a number is one too

# Tokens that their form gives away.
_FORMS = (
    r"hf_[A-Za-z0-9]{30,}",
    r"gh[pousr]_\w{30,}",
    r"github_pat_\w{20,}",
    r"glpat-[\w-]{20,}",
    r"npm_[A-Za-z0-9]{30,}",
    r"pypi-[\w-]{30,}",
    r"sk-(?=[\w-]*\d)[\w-]{20,}",
    r"xox[abeoprs]-[\w-]{10,}",
    r"AIza[\w-]{35}",
    r"A(?:KIA|SIA)[A-Z0-9]{16}",
    r"eyJ[\w-]{5,}\.eyJ[\w-]{5,}\.[\w-]*",  # JSON Web Token
)
_FORMED = [  # what holds a secret, whatever it is called
    (rf"\b(?:{'|'.join(_FORMS)})", "<secret>"),
    (r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", "<secret>"),
    (r"""(?i)(\bauthorization["']?\s*[:=]\s*["']?(?:basic|bearer|digest|token)[ ]+)(?!<)[^\s"']+""", r"\1<secret>"),
    (r"(?i)(\bbearer[ ]+)(?!<)[\w.~+/=-]{8,}", r"\1<secret>"),
    (r"(\w://)(?!<secret>@)[^\s/]+@", r"\1<secret>@"),
    (r"(?i)([?&](?:x-amz-)?sig(?:nature)?=)(?!<)[^\s&]+", r"\1<secret>"),
]
_PLACES = [(re.compile(form), shown) for form, shown in _FORMED]

# Where no secret is.
_NONE = r"""["']?(?:<[\w ]+>|\$\{[^},]*\}|(?i:null|none|true|false)|\?\?\?)["']?(?=[\s,;&}\]]|\Z)"""
_SCHEME = r"(?i:basic|bearer|digest|token)[ ]+<"  # of an authorization, already hidden
_VALUE = re.compile(
    rf"(?!{_NONE}|{_SCHEME})"
    r"""(?:"(?:[^"\\]|\\.)+"|'[^']+'|\[[^\]\n]+\]|["'](?=\w)\S+|[^\s,;&{}\[\]"'][^\s,;&}\]"']*)"""
)
# What leads to a value: the last group is the name. An argument's goes on to its end.
_ARGUMENT = re.compile(rf"(?s)(\A[+~]*(?:[\w@/-]+\.)*([\w-]+)=)(?!{_NONE}|\{{.*\}}\Z)(?!\S*\s+[+~]*[\w.]+=).+\Z")
_ASSIGNED = re.compile(r"(?<![\w-])([A-Za-z][\w-]*)=")
_FLAG = re.compile(r"(?<!\S)--?([A-Za-z][\w-]*)[ ]+(?!-)")
_SETTING = re.compile(r"""(?m)(?:^[ \t-]*|[{,]\s*)["']?([A-Za-z][\w-]*)["']?\s*:[ \t]*""")
_SENTENCE = re.compile(r"""(?<![\w-])([A-Za-z][\w-]*)["']?\s*:[ \t]*""")
_LINE = re.compile(r"""([ \t]*)(?:-[ ]+)*["']?([A-Za-z][\w-]*)["']?[ \t]*:(?=\s|\Z)[ \t]*""")  # of YAML
_LONG, _SHORT = 8, 4  # characters of values that are looked for: anywhere, and as a word that is no plain one


@cache
def _named(name: str, sure: bool = False) -> bool:
    """Whether a secret is called so; ``sure``: and nothing else is."""
    return re.search(rf"(?:{'|'.join(_SURE if sure else _SURE + _NAMING)})(?:_?\d+)?\Z", name.lower()) is not None


@cache
def _ours(word: str) -> bool:
    """Whether the suite itself writes a word: names of metrics, fields, data sets, methods and files."""
    package, whole = Path(__file__).parent, re.compile(rf"(?<!\w){re.escape(word)}(?!\w)".encode())
    files = [*package.rglob("*.py"), *(package.parent / "configs").rglob("*.yaml")]
    named = any(path.stem == word for path in files)
    return named or any(word.encode() in (text := path.read_bytes()) and whole.search(text) for path in files)


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
        if not (_named(name) or _variable(name)) or (whole.startswith("/") and os.path.exists(whole)):
            continue
        for value in filter(_telling, map(str.strip, whole.splitlines())):
            found |= dict.fromkeys((value, quote(value, safe=""), repr(value)[1:-1]), f"<{name}>")
    longest = sorted(found.items(), key=lambda item: -len(item[0]))
    return [(re.compile(re.escape(v) if _anywhere(v) else rf"(?<![\w.]){re.escape(v)}(?!\w)"), n) for v, n in longest]


@cache
def _variable(name: str) -> bool:
    return re.search(_VARIABLE, name, re.IGNORECASE) is not None


def _anywhere(value: str) -> bool:
    return len(value) >= _LONG and not value.isdecimal()


@cache
def _telling(value: str) -> bool:
    """Whether a value is so unlike a word or number that a result may hold that what is like it must be a secret."""
    if len(value) < _SHORT or re.fullmatch(r"[A-Za-z]{,7}|[\d.]{,7}", value):
        return False
    try:
        float(value)
        return value.isdecimal()
    except ValueError:
        return len(value) > 64 or not re.fullmatch(r"[A-Za-z][\w.-]*", value) or not _ours(value)


def _shown(node: Any, text: Callable[[str], str]) -> Any:
    if isinstance(node, dict):
        named = {key: isinstance(key, str) and re.fullmatch(r"[\w-]+", key) and _named(key) for key in node}
        return {_shown(k, text): _hidden(v, k) if named[k] else _shown(v, text) for k, v in node.items()}
    if isinstance(node, list | tuple):
        flags = [isinstance(part, str) and re.fullmatch(r"--?[A-Za-z][\w-]*", part) and _named(part) for part in node]
        after = zip(node, [False, *flags], strict=False)
        return [_hidden(part) if flag and str(part)[:1] != "-" else _shown(part, text) for part, flag in after]
    return text(node) if isinstance(node, str) else node


def _text(text: str, environment: list[tuple[re.Pattern[str], str]]) -> str:
    for value, name in environment:
        text = value.sub(name, text)
    for form, shown in _PLACES:
        text = form.sub(shown, text)
    if ":" in text:
        text = _unsaid(_unsaid(_lines(text), _SETTING), _SENTENCE, sure=True)
    if "=" in text:
        text = _ARGUMENT.sub(lambda said: f"{said[1]}<secret>" if _named(said[2]) else said[0], text)
        text = _unsaid(text, _ASSIGNED)
    return _unsaid(text, _FLAG) if "-" in text else text


def _unsaid(text: str, lead: re.Pattern[str], sure: bool = False) -> str:
    parts, end = list[str](), 0
    for said in lead.finditer(text):
        if said.start() < end or not _named(said[1], sure) or (value := _VALUE.match(text, said.end())) is None:
            continue
        parts += [text[end : said.end()], "<secret>"]
        end = value.end()
        while lead is _ASSIGNED and text[end : end + 1] == "," and (value := _VALUE.match(text, end + 1)):
            end = value.end()
    return "".join([*parts, text[end:]])


def _lines(text: str) -> str:
    """A text without what lines of YAML say under a secret's name, to the last line that belongs to it."""
    lines, kept = text.splitlines(keepends=True), list[str]()
    while lines:
        line = lines.pop(0)
        kept.append(line)
        said = _LINE.match(line)
        if said is None or not _named(said[2]):
            continue
        value, depth, block = line[said.end() :].strip(), len(said[1]), 0
        if re.match(rf"""["'{{\[]|{_NONE}\Z|{_SCHEME}""", value):
            continue  # it says where it ends
        for after in lines:
            indent = len(after) - len(after.lstrip())
            if after.strip() and indent <= depth and not (not value and indent == depth and after.lstrip()[:2] == "- "):
                break
            block += 1
        while block and not lines[block - 1].strip():
            block -= 1  # an empty line belongs to nobody
        if value or block:
            last = lines[block - 1] if block else line
            kept[-1] = f"{said[0].rstrip()} <secret>{last[len(last.rstrip()) :] if last.strip() else ''}"
            del lines[:block]
    return "".join(kept)


def _hidden(value: Any, name: Any = "") -> Any:
    """A value under a secret's name: no text of it is shown."""
    if isinstance(value, dict):
        return {key: _hidden(part, name) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(part, name) for part in value]
    if isinstance(value, int | float) and not isinstance(value, bool) and re.search(_COUNTED, name.lower()):
        return "<secret>"
    return "<secret>" if isinstance(value, str) and value and not re.fullmatch(_NONE, value) else value
