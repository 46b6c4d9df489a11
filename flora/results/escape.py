"""Texts of records and configs as text, whatever they hold: in Markdown, LaTeX, CSV, figures and names of files."""

import re
from typing import Any

_MARKDOWN = re.compile(r"[\\`*\[\]<|$]|~(?=~)|(?<=~)~|(?<!\w)_|_(?!\w)|&(?=#?\w+;)")
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{raised: f"$^{{{digit}}}$" for digit, raised in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$"},
}
_LONGEST_NAME = 150  # characters; a file system takes 255 bytes


class Markdown(str):
    """Text that is Markdown already."""


def one_line(text: str) -> str:
    """A text without line breaks and other characters that control a device."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)


def markdown(text: str) -> Markdown:
    """Text of one line that Markdown shows as it is; ``Markdown`` stays as it is."""
    return text if isinstance(text, Markdown) else Markdown(_MARKDOWN.sub(r"\\\g<0>", one_line(text)))


def plain(text: str) -> str:
    """What ``markdown`` was given."""
    return re.sub(r"\\([^A-Za-z0-9\s])", r"\1", text)


def code(text: str) -> Markdown:
    """Text of one line as code in Markdown."""
    return Markdown(f"`{one_line(text).replace('`', chr(39))}`")


def latex(text: str) -> str:
    """Text with LaTeX's special characters made literal."""
    return "".join(_LATEX.get(character, character) for character in one_line(text))


def spreadsheet(cell: Any) -> Any:
    """A cell of a CSV file, which a spreadsheet must not take for a formula; nothing for None."""
    if cell is None:
        return ""
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip().startswith(("=", "+", "-", "@")) else cell


def label(text: str) -> str:
    """Text of a figure, of some lines, where dollars would be a formula."""
    return "\n".join(map(one_line, text.split("\n"))).replace("$", r"\$")


def file_name(*words: str) -> str:
    """Words as the name of a file in the folder that is meant, without its suffix."""
    return re.sub(r"[^\w.,=+-]+|^\.+", "_", "_".join(word for word in words if word))[:_LONGEST_NAME]
