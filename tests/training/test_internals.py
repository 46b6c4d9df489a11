"""What training takes from its libraries beyond their public interface is what the installed versions have."""

import ast
import importlib
import inspect
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from flora.training import Trainer, internals

ROOT = Path(__file__).parents[2]
HERE = "flora/training/internals.py"
ADVICE = (
    f"compare {HERE} and flora/training/trainer.py with it, mend what relies on the old one, run tests/training, "
    f"then change the table and add the version to TESTED"
)


def parameters(function):
    """Names and defaults, as the tables have them."""
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(function).parameters.values()]
    return ", ".join(map(str, plain))


@pytest.mark.parametrize("name", [*internals.PRIVATE_METHODS, *internals.PUBLIC_METHODS])
def test_a_method_of_transformers_takes_what_the_table_says(name):
    table = {n: wanted for n, (wanted, _) in internals.PRIVATE_METHODS.items()} | internals.PUBLIC_METHODS
    method = getattr(transformers.Trainer, name, None)
    there = parameters(method) if method else "nothing of that name"
    said = f"transformers {transformers.__version__} changed Trainer.{name}: it has ({there}), not ({table[name]}): "
    assert there == table[name], said + ADVICE


def test_the_tables_name_every_method_that_is_overridden():
    ours = {name for kind in (internals.Loop, Trainer) for name in vars(kind) if not name.startswith("__")}
    overridden = {name for name in ours if hasattr(transformers.Trainer, name)}
    called = {"_prepare_inputs"}
    assert overridden == (internals.PRIVATE_METHODS.keys() - called) | internals.PUBLIC_METHODS.keys()
    assert not any(
        name.startswith("_") and hasattr(transformers.Trainer, name) for name in vars(Trainer) if name[1] != "_"
    )


def test_a_fit_has_the_fields_that_checkpoints_hold(tmp_path):
    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            fields.update({name: getattr(trainer, name, None) for name in internals.FIELDS})

    fields = {}
    data = [{"x": torch.ones(2), "labels": torch.ones(1)}] * 2
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = transformers.Trainer(Squares(), arguments, train_dataset=data, callbacks=[Look()])
    trainer.train()
    missing = [name for name, value in fields.items() if value is None]
    said = f"transformers {transformers.__version__} has no Trainer.{missing and missing[0]} when a fit begins: "
    assert missing == [], said + ADVICE


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x, labels):
        return {"loss": ((self.layer(x) - labels) ** 2).mean()}


@pytest.mark.parametrize("place", internals.NAMES)
def test_a_private_name_is_still_there(place):
    module, path = place.split(":")
    holder = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        holder = getattr(holder, part)
    there = (
        hasattr(holder, name)
        or f"self.{name} =" in inspect.getsource(holder)
        or name in vars(holder).get("__annotations__", {})
    )
    assert there, f"{module} has no {path} any more: {ADVICE}"


@pytest.mark.parametrize("mark", internals.MARKS)
def test_a_mark_is_still_looked_for(mark):
    module, _ = internals.MARKS[mark]
    source = inspect.getsource(importlib.import_module(module))
    assert f'"{mark}"' in source, f"{module} does not look for {mark} any more: {ADVICE}"


def test_the_range_in_pyproject_is_what_this_test_has_passed_on():
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (wanted,) = [r for r in map(Requirement, requirements) if r.name == "transformers"]
    first, last = Version(internals.TESTED[0]), Version(internals.TESTED[-1])
    assert str(wanted.specifier) == f"<{last.major}.{last.minor + 1},>={first.major}.{first.minor}"
    version = transformers.__version__
    assert Version(version) in wanted.specifier, f"transformers {version} is new here: {ADVICE}"


def private(tree):
    """Private names that code takes from others than itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            own |= isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            if not own:
                yield node.attr
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("flora"):
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))


def test_private_names_of_libraries_are_used_nowhere_else():
    elsewhere = {"_get_default_store": "flora/launch/processes.py", "_return_value": "flora/launch/sweep.py"}
    allowed = {"_target_": "flora/launch/sweep.py", "_chosen": "flora/launch/sweep.py"}  # Hydra's key; our own
    for folder in ("flora/training", "flora/launch"):
        for path in sorted((ROOT / folder).glob("*.py")):
            place = str(path.relative_to(ROOT))
            strays = {n for n in private(ast.parse(path.read_text())) if (elsewhere | allowed).get(n, HERE) != place}
            assert strays == set(), f"{place}: private names belong into {HERE}"
    assert elsewhere.keys() < {place.rpartition(":")[2].rpartition(".")[2] for place in internals.NAMES}
