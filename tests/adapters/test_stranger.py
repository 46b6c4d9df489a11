"""Loading an adapter in a process that never imported flora: what it is told, and where it reads what to do."""

import copy
import subprocess
import sys

import peft
import pytest
import torch
from torch import nn

import flora
from flora.methods.rivals.lotr import LotrConfig

LOAD = """
import sys, traceback, torch, peft
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 3))
try:
    peft.PeftModel.from_pretrained(net, sys.argv[1])
except Exception:
    traceback.print_exc()
import flora
print(peft.PeftModel.from_pretrained(net, sys.argv[1])(torch.ones(1, 4)).tolist())
"""


@pytest.mark.parametrize("name", ["default", "second"])
def test_the_card_says_what_the_error_does_not(name, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3))
    model = peft.get_peft_model(
        copy.deepcopy(net), flora.FloraConfig(r=2, target_modules=["0"], init_weights=False), name
    )
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    card = (folder / "README.md").read_text()
    assert card.count("import flora") == 1
    assert "KeyError: 'FLORA'" in card
    output = model(torch.ones(1, 4)).tolist()
    if name == "second":
        assert peft.PeftModel.from_pretrained(net, folder)(torch.ones(1, 4)).tolist() == output
        return
    told = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True)
    assert told.stderr.strip().splitlines()[-1] == "KeyError: 'FLORA'"
    assert told.stdout.strip() == str(output)


def test_what_a_card_says_already_stays(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nwords\n")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 3)), LotrConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "license: mit" in card
    assert "words" in card
    assert "KeyError: 'LOTR'" in card
