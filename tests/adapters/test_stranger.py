"""Loading an adapter in a process that never imported flora: what it is told, and where it reads what to do."""

import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import flora
from flora.methods.rivals.lotr import LotrConfig

LOAD = """
import sys, torch, peft
torch.manual_seed(0)
model = peft.PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(4, 3)), sys.argv[1])
print(model(torch.ones(1, 4)).tolist())
"""


def load(folder: Path, first: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", first + LOAD, str(folder)], capture_output=True, text=True)


@pytest.mark.parametrize("name", ["default", "second"])
def test_the_card_says_what_the_error_does_not(name, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3))
    model = peft.get_peft_model(net, flora.FloraConfig(r=2, target_modules=["0"], init_weights=False), name)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    card = (folder / "README.md").read_text()
    assert card.count("import flora") == 1
    assert "KeyError: 'FLORA'" in card
    stranger = load(folder)
    assert stranger.returncode == 1
    assert stranger.stderr.strip().splitlines()[-1] == "KeyError: 'FLORA'"
    informed = load(folder, "import flora")
    assert informed.stdout.strip() == str(model(torch.ones(1, 4)).tolist()), informed.stderr


def test_what_a_card_says_already_stays(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nwords\n")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 3)), LotrConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "license: mit" in card
    assert "words" in card
    assert "KeyError: 'LOTR'" in card
