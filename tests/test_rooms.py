"""Imports point one way: the lower rooms know nothing of the upper ones."""

import ast
from pathlib import Path

import pytest

ADAPTERS = ("flora.adapters", "flora.replaced")
UPPER = (
    "flora.launch",
    "flora.training",
    "flora.results",
    "flora.tasks",
    "flora.models",
    "flora.methods",
    "flora.bench",
)


def imported(path):
    """Modules of ours that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name == "flora" or name.startswith("flora."))


@pytest.mark.parametrize("path", [p for room in ADAPTERS for p in Path(room.replace(".", "/")).rglob("*.py")], ids=str)
def test_the_adapters_import_nothing_of_ours(path):
    assert [name for name in imported(path) if not name.startswith(ADAPTERS) and name != "flora"] == []


@pytest.mark.parametrize("name", ["errors", "files", "memory", "names", "secrets", "values"])
def test_what_everything_rests_on_imports_nothing_above(name):
    assert [name for name in imported(Path("flora", f"{name}.py")) if name.startswith(UPPER)] == []
