"""Tables in Markdown, and numbers in them."""

from collections.abc import Sequence

DASH = "-"  # where nothing was measured


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> list[str]:
    """The lines of a table; ``numbers``: every column but the first is set flush right."""
    rule = ["---"] + ["---:" if numbers else "---"] * (len(head) - 1)
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]


def formatted(value: float | None, spec: str) -> str:
    """A number by a format specification such as ``.2f``; a dash where there is none."""
    return DASH if value is None else format(value, spec)
