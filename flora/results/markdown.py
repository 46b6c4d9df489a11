"""Tables in Markdown, and numbers in them."""

from collections.abc import Sequence

from flora.results.escape import markdown

DASH = "-"  # where nothing was measured


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> list[str]:
    """The lines of a table of any texts; ``numbers``: every column but the first is set flush right."""
    rule = ["---"] + ["---:" if numbers else "---"] * (len(head) - 1)
    return ["| " + " | ".join(map(markdown, row)) + " |" for row in (head, rule, *rows)]


def formatted(value: float | None, spec: str) -> str:
    """A number by a format specification such as ``.2f``; a dash where there is none."""
    return DASH if value is None else format(value, spec)
