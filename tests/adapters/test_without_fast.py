"""FLoRA without its fast path: the same forms, chosen alike, and the same results up to rounding."""

import os
import subprocess
import sys
from pathlib import Path

HIDE = """
import sys
class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.startswith('flora.adapters.fast'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Hidden)
"""

CHOICES = """
import copy, sys, peft, torch
from torch import nn
import flora
from flora.adapters import FloraLayer
torch.manual_seed(0)
convs = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
base = nn.Sequential(*convs, nn.Flatten(), nn.Linear(128, 600), nn.Linear(600, 600))
x = torch.randn(2, 3, 8, 8)
for form in ("auto", "factored", "merged"):
    torch.manual_seed(1)
    config = flora.FloraConfig(target_modules=["0", "1", "3", "4"], r=4, forward=form, init_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    layers = [layer for layer in model.modules() if isinstance(layer, FloraLayer)]
    print([layer.form_for(["default"]) for layer in layers], [round(y, 3) for y in model(x)[0, :5].tolist()])
    print(*(line.partition(":")[0] for line in model.base_model.explain()), sep=" | ", file=sys.stderr)
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=900)


def test_the_same_forms_give_the_same_outputs_and_their_tests_pass_where_it_cannot_be_imported(capsys):
    exec(CHOICES, {})
    out, err = capsys.readouterr()
    assert "dense" in out
    file = str(Path(__file__).with_name("test_forms.py"))
    code = f"{HIDE}{CHOICES}\nimport pytest\nsys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', {file!r}]))"
    done = python("-c", code)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.startswith(out)
    assert done.stderr.startswith(err)
    assert " passed" in done.stdout
