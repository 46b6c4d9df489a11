"""Whether rendered files are what rendering would give, told without rendering: results/rendered.json.

``make_tables.py`` writes there what it rendered, a sha256 of each file, and what from: one sha256 over everything that
a rendered byte depends on. Where both sides are as they were, nothing is stale. Where anything differs this says
nothing, and what is stale is found by rendering and comparing.
"""

import ast
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flora.files import ROOT, write_json

MANIFEST = "rendered.json"
PAGE, README, ANSWERS = "report.html", "../README.md", "README.md"  # seen from the folder of what is rendered
README_TABLE = re.compile(
    r"(<!-- (table|means|tests) (\w+), rendered by scripts/make_tables.py -->\n).*?(<!-- end of \2 -->)", re.S
)
"""Places in a README: a table at a glance, or its means, or its paired tests."""
# What run ids, tests of significance and pages come from. Not matplotlib: a figure is told by the hash of its data.
_PACKAGES = ("hydra-core", "omegaconf", "pyyaml", "numpy", "scipy", "jinja2", "markupsafe")
_RENDERER = ROOT / "flora" / "results" / "render.py"


def inputs(results: Sequence[Path], output: Path) -> str:
    """Sha256 over what decides rendered bytes: records, benchmarks, cells, configs, published numbers, code, packages.

    Args:
        results: the folders of the records.
        output: the folder of benchmarks/, and of what is rendered.
    """
    groups: list[tuple[Path, Iterable[Path]]] = [
        *((folder, [p for p in folder.glob("*.json") if not p.name.startswith(".")]) for folder in results),
        (output, (output / "benchmarks").glob("*.json")),
        (output, (output / "tables").glob("delta_*.csv")),
        (ROOT, (ROOT / "experiments").glob("*.yaml")),
        (ROOT, (ROOT / "configs").rglob("*.yaml")),
        (ROOT, (ROOT / "results" / "reported").glob("*.csv")),
        (ROOT, (_RENDERER.parent / "page").iterdir()),
        (ROOT, sources(_RENDERER)),
    ]
    sums = [[(p.relative_to(base).as_posix(), _input(p)) for p in sorted(ps)] for base, ps in groups]
    versions = [platform.python_version_tuple()[:2], *(version(package) for package in _PACKAGES)]
    records_from_page = [os.path.relpath(folder.resolve(), output.resolve()) for folder in results]
    answers = output / ANSWERS
    words = README_TABLE.sub("", answers.read_text()) if answers.is_file() else ""  # the page opens with them
    return _sha256(json.dumps([sums, versions, records_from_page, words]).encode())


def _input(path: Path) -> str:
    try:
        return _sha256(path.read_bytes()) if path.is_file() else "not a file"  # the reader of records reports it
    except OSError as error:
        return f"not readable: {error.strerror}"


def sources(module: Path) -> set[Path]:
    """A module's file, and those of all modules of flora that it imports, anywhere in it and through others."""
    seen: set[Path] = set()
    ahead = {module}
    while ahead:
        path = ahead.pop()
        seen.add(path)
        for name in _imports(path.read_text()):
            place = ROOT.joinpath(*name.split("."))
            ahead |= {file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()} - seen
    return seen


@cache
def _imports(code: str) -> set[str]:
    """Names below flora that code imports, and what they are in."""
    found: set[str] = set()
    for node in _executed(ast.parse(code)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        for parts in (name.split(".") for name in names if name.startswith("flora")):
            found |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return found


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those below ``if TYPE_CHECKING``, which only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING"):
            yield node
            yield from _executed(node)


def fresh(table: str | None, results: Sequence[Path], output: Path) -> bool:
    """Whether files are proved to be what rendering would give now.

    Args:
        table: the name of one table's files; None: everything, the README's tables and the page too.
        results, output: as of ``inputs``. A page that is not there is not missed: it is rendered when it is wanted.
    """
    manifest = _read(output)
    if not (manifest["everything"] or table) or manifest["inputs"] != inputs(results, output):
        return False
    files = tables_and_figures(output, table or "*")
    due = {key: digest for key, digest in manifest["files"].items() if table is None or _belongs(key, table)}
    if table is None:
        files += [output / name for name in (PAGE, README, ANSWERS) if (output / name).exists()]
        if not (output / PAGE).exists():
            due.pop(PAGE, None)
    return bool(due) and {_key(path, output): _sum(path) for path in files} == due


def keep(table: str | None, made_from: str, files: Iterable[Path], output: Path) -> None:
    """Write down what has been rendered.

    Args:
        table: the name of the one table's files; None: everything was rendered.
        made_from: ``inputs`` before anything was read.
        files: what was rendered.
        output: the folder that they are in.
    """
    manifest = _read(output)
    digests = {_key(path, output): _sum(path) for path in files}
    if table is None or manifest["inputs"] != made_from:
        manifest = {"everything": table is None, "inputs": made_from, "files": {}}
    elif not digests.items() <= manifest["files"].items():
        manifest["everything"] = False  # the page shows the new, and may miss what nothing renders any more
    digests = manifest["files"] | digests
    write_json(output / MANIFEST, manifest | {"files": dict(sorted(digests.items()))})


def forget(output: Path) -> None:
    """Remove what was written down, as nothing is proved any more."""
    (output / MANIFEST).unlink(missing_ok=True)


def tables_and_figures(output: Path, table: str) -> list[Path]:
    """Files that rendering may have made of a table, of all for ``*``; not what scripts/analyze_delta.py writes."""
    files = {*(output / "tables").glob(f"{table}.*"), *(output / "figures").glob(f"{table}/*.*")}
    return sorted(path for path in files if not path.name.startswith((".", "delta_")))


def _read(output: Path) -> dict[str, Any]:
    nothing: dict[str, Any] = {"everything": False, "inputs": None, "files": {}}
    try:
        manifest = json.loads((output / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return nothing
    sound = isinstance(manifest, dict) and manifest.keys() == nothing.keys() and isinstance(manifest["files"], dict)
    return manifest if sound else nothing


def _belongs(key: str, table: str) -> bool:
    folder, _, name = key.partition("/")
    return name.startswith({"tables": f"{table}.", "figures": f"{table}/"}.get(folder, "\0"))


def _key(path: Path, output: Path) -> str:
    return Path(os.path.relpath(path, output)).as_posix()


def _sum(path: Path) -> str:
    """Of a file's content; of the README, of its tables alone."""
    if path.name != Path(README).name:
        return _sha256(path.read_bytes())
    return _sha256("".join(match[0] for match in README_TABLE.finditer(path.read_text())).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
