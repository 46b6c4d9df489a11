"""The cells of a table: experiments/TABLE.yaml expanded to runs, each with its overrides and cell id.

A file gives a ``title`` and, per scale, one or several ``parts``: overrides in ``common`` times the product of
``grid``. A scale may have a ``title`` of its own. ``notes``, of the file and of a scale, stand below the table, and a
part's ``note`` as a footnote of its rows. ``protocol_name`` says how a part's runs are made: rows are compared within
one, and ``as published`` is that of the published numbers beside them.
A part whose task or model the code lacks says so in ``not_runnable_yet``: its cells are listed, and not run.
A part that goes on from what another cell trained names that cell by its settings: ``starts_from: {model.projector:
{task.dataset: easy_vqa, adapter: linear_probe}}`` sets ``model.projector=outputs/CELL_ID`` of the one cell that has
them; `reproduce.py` puts the folder of that cell's run in its place.
A scale or part whose runs are tested on several sets names these: ``tests: [boolq, piqa]`` gives each run a row for
each, of its metrics ``boolq_accuracy`` and ``piqa_accuracy``.
A part's ``label`` stands in its rows for the settings in which parts differ; empty: its rows show the method alone.
A scale that chooses says ``split: validation``: its values are those of validation, at the chosen rate and at each rate
of the grid. ``against: [lora, dora]``, names of rows, asks for means over data sets and models and for the differences
to these rows (``flora.results.means``), with paired tests. ``choose: [{method: M, label: L, of: [rows]}]`` adds rows
that take, seed by seed, the best of several rows on validation (``flora.results.rows.chosen_rows``).
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import yaml
from omegaconf import OmegaConf

from flora import config
from flora.errors import ConfigError
from flora.files import ROOT
from flora.results.escape import file_name

OUTPUTS = "outputs"  # the folder of runs that ``starts_from`` names: the default of paths.output
_NOT_LABELS = ("seed", "logger", "adapter", "model", "task", "task.dataset", "experiment", "trainer.max_eval_examples")


@dataclass(frozen=True)
class Cell:
    """One run of a table.

    Attributes:
        overrides: what to type after ``python train.py``.
        not_runnable_yet: why the cell cannot run, or None.
        published: which published rows the cell stands beside: a group of results/reported, or None.
        starts_from: the cells whose output folders overrides name, by key.
        protocol: how the run is made, in the table's words; empty where the table has one protocol.
        note: what is to be known of it, or None.
        tests: the sets that its run is tested on, each with a row of its own; none: it has one row.
        label: what its row says in place of the settings that vary, or None.
    """

    overrides: tuple[str, ...]
    not_runnable_yet: str | None = None
    published: str | None = None
    starts_from: tuple[tuple[str, "Cell"], ...] = ()
    protocol: str = ""
    note: str | None = None
    tests: tuple[str, ...] = ()
    label: str | None = None

    @cached_property
    def cell_id(self) -> str:
        """Names what the cell runs, whatever the data and weights hold: its record has an id of its own."""
        return config.identity(self._semantic(None))

    @cached_property
    def older(self) -> list[str]:
        """The cell's ids under earlier versions of the method."""
        versions = range(1, config.METHOD_VERSION)
        return [config.identity(self._semantic(v)) for v in versions]

    def _semantic(self, method_version: int | None) -> dict[str, Any]:
        """What the id is a hash of; cells that differ in the seed alone, of which nothing depends, compose once."""
        followed = any("${seed}" in override for override in self.overrides)
        others = tuple(o for o in self.overrides if followed or not o.startswith("seed="))
        return _semantic(others, method_version or config.METHOD_VERSION) | {"seed": self.seed}

    @cached_property
    def settings(self) -> dict[str, str]:
        """The overrides as a dict."""
        return dict(override.lstrip("+").split("=", 1) for override in self.overrides)

    @cached_property
    def depth(self) -> int:
        """How many cells run before it, one after the other."""
        return max((1 + cell.depth for _, cell in self.starts_from), default=0)

    @property
    def task(self) -> str:
        """Its data set, or its task where that has one data set."""
        return self.settings.get("task.dataset") or self.settings.get("task") or "?"

    @property
    def labelled(self) -> tuple[str, ...]:
        """Names the cells whose label it shares, of one data set, method and protocol; empty without a label."""
        return () if self.label is None else (self.label, self.task, self.method, self.protocol)

    @property
    def model(self) -> str:
        """Its model."""
        return self.settings.get("model.timm_name") or self.settings.get("model", "convnext")

    @property
    def method(self) -> str:
        """Its fine-tuning method."""
        return self.settings.get("adapter", "flora")

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.settings.get("seed", 0))


@dataclass(frozen=True)
class Table:
    """A table at a scale: its definition and its cells, in the YAML's order."""

    name: str
    scale: str
    definition: dict[str, Any]
    cells: list[Cell]

    @property
    def title(self) -> str:
        """What the table shows."""
        return self._of_scale.get("title", self.definition["title"])

    @property
    def notes(self) -> list[str]:
        """What is to be known of the whole table."""
        return [*self.definition.get("notes", []), *self._of_scale.get("notes", [])]

    @property
    def groups(self) -> dict[str, list[str]]:
        """Data sets by the group over which their mean is shown; empty where the table has no groups."""
        return self.definition.get("groups", {}).get(self.scale, {})

    @property
    def split(self) -> str:
        """The split that its values are of: ``test`` or ``validation``."""
        return self._of_scale.get("split", "test")

    @property
    def against(self) -> list[str]:
        """The rows, by name, that means over data sets and models are compared with; empty: there are no such means."""
        return self._of_scale.get("against", [])

    @property
    def choose(self) -> list[dict[str, Any]]:
        """Rows to add, each with its ``method``, its ``label`` and the names ``of`` rows that it chooses from."""
        return self._of_scale.get("choose", [])

    @property
    def _of_scale(self) -> dict[str, Any]:
        return self.definition.get("scales", {}).get(self.scale, {})

    @property
    def stem(self) -> str:
        """What its rendered files are called."""
        return file_name(self.name, "" if self.scale == "mini" else self.scale)

    @cached_property
    def rows(self) -> dict[tuple[str, str, str, str, str], list[Cell]]:
        """Cells that differ in the seed alone, by (task, model, method, other settings that vary here, protocol)."""
        alike: dict[tuple[str, ...], list[Cell]] = {(): self.cells}
        for cell in (cell for cell in self.cells if cell.label is not None):
            alike.setdefault(cell.labelled, []).append(cell)
        varying = {name: _varying(cells) for name, cells in alike.items()}
        rows: dict[tuple[str, str, str, str, str], list[Cell]] = {}
        for cell in self.cells:
            keys = varying[cell.labelled]
            settings = [f"{k.rpartition('.')[2]}={cell.settings[k]}" for k in keys if k in cell.settings]
            settings = [*([cell.label] if cell.label else []), *settings]
            for task in cell.tests or (cell.task,):
                key = (task, cell.model, cell.method, ", ".join(settings), cell.protocol)
                rows.setdefault(key, []).append(cell)
        return rows

    @cached_property
    def labels(self) -> dict[Cell, str]:
        """What each cell is called apart from its seed."""
        rows = [(row, cell) for row, cells in self.rows.items() for cell in cells]
        return {cell: " ".join(word for word in (cell.task, *row[1:]) if word) for row, cell in rows}


def row_name(method: str, settings: str) -> str:
    """What a row is called: its method, and what else varies in the table."""
    return f"{method} ({settings})" if settings else method


def names() -> list[str]:
    """Every table of experiments/."""
    return sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))


def scales(table: str) -> list[str]:
    """The scales that a table's file defines; none where it lists no cells of its own."""
    return list(read_definition(table).get("scales", {}))


def load(table: str, scale: str = "mini") -> Table:
    """A table at a scale.

    Raises:
        ConfigError: no such table or scale, the message lists those that exist; or its file defines no cells.
    """
    if table not in names():
        raise ConfigError(f"no table {table!r} in experiments/: choose one of {', '.join(names())}")
    definition = read_definition(table)
    if not scales(table):
        raise ConfigError(f"experiments/{table}.yaml lists no cells to run")
    if scale not in scales(table):
        raise ConfigError(f"{table} has no scale {scale!r}: choose one of {', '.join(scales(table))}")
    cells = list(_cells(table, definition["scales"][scale]))
    for cell, times in Counter(cells).items():
        if times > 1:
            raise ConfigError(f"experiments/{table}.yaml lists the same cell twice: {' '.join(cell.overrides)}")
    loaded = Table(table, scale, definition, cells)
    there = {row_name(method, settings) for _, _, method, settings, _ in loaded.rows}
    if missing := [name for choice in loaded.choose for name in choice["of"] if name not in there]:
        raise ConfigError(
            f"experiments/{table}.yaml: choose: no row is called {missing[0]!r}: choose of {', '.join(sorted(there))}"
        )
    there |= {row_name(choice["method"], choice["label"]) for choice in loaded.choose}
    if missing := [name for name in loaded.against if name not in there]:
        raise ConfigError(
            f"experiments/{table}.yaml: against: no row is called {missing[0]!r}: choose of {', '.join(sorted(there))}"
        )
    for row, of_row in loaded.rows.items():
        if len({cell.seed for cell in of_row}) < len(of_row):
            raise ConfigError(f"experiments/{table}.yaml: one seed twice in the row {' '.join(filter(None, row))}")
    return loaded


def read_definition(table: str) -> dict[str, Any]:
    """What a file of experiments/ says; ConfigError where it is not YAML, or of another shape."""
    path = ROOT / "experiments" / f"{table}.yaml"
    try:
        definition = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"experiments/{path.name} is not YAML: {config.one_line(error)}") from error
    if not isinstance(definition, dict) or not isinstance(definition.get("title"), str):
        raise ConfigError(f"experiments/{path.name} needs a title and scales")
    scales = definition.get("scales", {})
    if not isinstance(scales, dict) or not all(isinstance(name, str) for name in scales):
        raise ConfigError(f"experiments/{path.name}: scales must be named, got {scales!r:.100}")
    for part in (definition, *(scale for scale in scales.values() if isinstance(scale, dict))):
        notes, title = part.get("notes", []), part.get("title", "")
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise ConfigError(f"experiments/{path.name}: notes must be a list of texts, got {notes!r:.100}")
        if not isinstance(title, str):
            raise ConfigError(f"experiments/{path.name}: title must be a text, got {title!r:.100}")
    return definition


def _varying(cells: list[Cell]) -> list[str]:
    """Settings in which cells differ, but for those that are columns of their own."""
    keys = dict.fromkeys(key for cell in cells for key in cell.settings if key not in _NOT_LABELS)
    return [key for key in keys if len({cell.settings.get(key) for cell in cells}) > 1]


def _parts(table: str, scale: Any) -> list[dict[str, Any]]:
    """The parts of a scale, or itself where it has none."""
    parts = scale.get("parts", [scale]) if isinstance(scale, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ConfigError(f"experiments/{table}.yaml: a scale must be settings or a list of parts, got {scale!r:.100}")
    if scale.get("split", "test") not in ("test", "validation"):
        raise ConfigError(f"experiments/{table}.yaml: split must be test or validation, got {scale['split']!r:.100}")
    against = scale.get("against", [])
    if not isinstance(against, list) or not all(isinstance(name, str) for name in against):
        raise ConfigError(f"experiments/{table}.yaml: against must be a list of names of rows, got {against!r:.100}")
    choices = scale.get("choose", [])
    for choice in choices if isinstance(choices, list) else [choices]:
        sound = isinstance(choice, dict) and choice.keys() == {"method", "label", "of"}
        if not sound or not isinstance(choice["of"], list) or scale.get("split", "test") != "test":
            raise ConfigError(
                f"experiments/{table}.yaml: choose must list {{method, label, of: [rows]}}, of a table of tests;"
                f" got {choice!r:.100}"
            )
    for part in (scale, *parts):
        tests = part.get("tests", [])
        if not isinstance(tests, list) or not all(isinstance(name, str) for name in tests):
            raise ConfigError(f"experiments/{table}.yaml: tests must be a list of data sets, got {tests!r:.100}")
        common = part.get("common", [])
        if not isinstance(common, list) or not all(isinstance(o, str) and "=" in o for o in common):
            raise ConfigError(f"experiments/{table}.yaml: common must be a list of KEY=VALUE, got {common!r:.100}")
        settings = [*common, *(part.get("grid") or {})]
        if trusts := [word for word in settings if re.match(r"\+*model\.(allow|trust_remote_code)\b", str(word))]:
            raise ConfigError(
                f"experiments/{table}.yaml: {trusts[0]}: a table may not allow code to run; type it yourself"
            )
        for key in ("not_runnable_yet", "published", "protocol_name", "note", "label"):
            if not isinstance(part.get(key), str | None):
                raise ConfigError(f"experiments/{table}.yaml: {key} must be a text, got {part[key]!r:.100}")
    return parts


def _cells(table: str, scale: Any) -> Iterator[Cell]:
    parts = _parts(table, scale)
    made = {id(part): _part(table, scale, part, ()) for part in parts if "starts_from" not in part}
    first = [cell for cells in made.values() for cell in cells]
    after: list[Cell] = []  # those above that start from others themselves
    for part in parts:
        if "starts_from" in part:
            starts = part["starts_from"]
            if not isinstance(starts, dict) or not all(isinstance(settings, dict) for settings in starts.values()):
                raise ConfigError(
                    f"experiments/{table}.yaml: starts_from must give each key a cell's settings, got {starts}"
                )
            named = tuple((key, _only(table, key, first, after, of)) for key, of in starts.items())
            made[id(part)] = _part(table, scale, part, named)
            after += made[id(part)]
        yield from made[id(part)]


def _part(table: str, scale: dict[str, Any], part: dict[str, Any], starts: tuple[tuple[str, Cell], ...]) -> list[Cell]:
    """The cells of a part of a table; ``starts``: the cells that they start from, by the key that names them."""
    common = [*scale.get("common", []), *(f"{key}={OUTPUTS}/{cell.cell_id}" for key, cell in starts)]
    common += part.get("common", []) if part is not scale else []
    grid = part.get("grid")
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ConfigError(f"experiments/{table}.yaml: grid must give each key a list of values, got {grid}")
    axes = [[f"{key}={value}" for value in values] for key, values in grid.items()]
    reason = part.get("not_runnable_yet", scale.get("not_runnable_yet"))
    tests = tuple(part.get("tests", scale.get("tests", [])))
    said = (part.get("published"), starts, part.get("protocol_name") or "", part.get("note"), tests, part.get("label"))
    return [Cell((*common, *combination), reason, *said) for combination in itertools.product(*axes)]


def _only(table: str, key: str, first: list[Cell], after: list[Cell], settings: dict[str, Any]) -> Cell:
    """The one cell with these settings, among the first where any of those has them."""
    wanted = {name: str(value) for name, value in settings.items()}.items()
    having = [c for c in first if wanted <= c.settings.items()] or [c for c in after if wanted <= c.settings.items()]
    if len(having) != 1:
        words = " ".join(f"{name}={value}" for name, value in wanted)
        raise ConfigError(f"experiments/{table}.yaml: starts_from.{key} must name one cell, {len(having)} have {words}")
    return having[0]


@cache
def _semantic(overrides: tuple[str, ...], method_version: int) -> dict[str, Any]:
    cfg = config.composed(overrides)
    OmegaConf.resolve(cfg)  # each reference once, also what many others go through
    return config.semantic_config(cfg, method_version)
