"""What an override that Hydra refuses is answered with."""

import shlex
import sys
from pathlib import Path

import pytest

import train
from flora.errors import ConfigError
from flora.launch.entry import main
from flora.training.settings import TrainerSettings


def refused(word, monkeypatch, capsys):
    """The one line, and that it is the end with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["train.py", "task=imagefolder", "logger=none", word])
    with pytest.raises(SystemExit) as end:
        main(train.job, trace=lambda: False)
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("error: ")


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("task=vtb", "task=vtb: there is no such task; did you mean vtab? choose one of"),
        ("adapter=flra", "adapter=flra: there is no such adapter; did you mean flora"),
        ("tsk=vtab", "tsk: there is no such key; did you mean task? --cfg job lists all"),
        ("trainer.epoch=3", "trainer.epoch: there is no such key; did you mean trainer.epochs"),
        ("adapter.rnk=3", "adapter.rnk: there is no such key; did you mean adapter.r"),
        ("adapter.rank=3", "adapter.rank: there is no such key; did you mean adapter.r or "),
        ("trainer.learning_rate=1", "trainer.learning_rate: there is no such key; did you mean trainer.lr"),
        (
            "--max-steps=3",
            "--max-steps=3: there is no such flag; settings are KEY=VALUE, without dashes; did you mean trainer.max",
        ),
        ("--frobnicate", "--frobnicate: there is no such flag; settings are KEY=VALUE, without dashes; see --help"),
        ("image_size=64", "image_size: there is no such key; did you mean model.image_size"),
    ],
)
def test_the_nearest_name_is_offered(word, near, monkeypatch, capsys):
    assert refused(word, monkeypatch, capsys).startswith(near)


def test_keys_of_hydra_are_not_offered(monkeypatch, capsys):
    said = refused("model.target=1", monkeypatch, capsys)
    assert said.startswith("model.target: there is no such key; ")
    assert "_target_" not in said


@pytest.mark.parametrize(
    "path",
    [
        "it's",
        "/a(b)/c",
        "/a,b",
        "a=b",
        '"/a b',
        "/ä/b",
        "~/x",
        "/my pics (2020)/a",
        "/a[1]/{b}",
        'it\'s "x" \\',
    ],
)
def test_the_quoting_that_is_offered_works(path, monkeypatch, capsys):
    said = refused(f"paths.data={path}", monkeypatch, capsys)
    _, _, offered = said.partition("quote the value, for the shell too: ")
    (word,) = shlex.split(offered.removesuffix(", or add -m to run one after the other"))
    assert refused(word, monkeypatch, capsys).startswith(
        f"there is no folder {Path(path).expanduser()}: set paths.data"
    )


def test_a_word_that_is_no_override(monkeypatch, capsys):
    assert refused("b/c", monkeypatch, capsys).startswith("'b/c' is no KEY=VALUE: a value with spaces takes quotes")


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"trainer\.device=cuda, but torch finds no GPU here: leave it auto"):
        TrainerSettings(epochs=1, lr=1e-3, device="cuda")


def test_a_key_that_nothing_reads_is_said(monkeypatch, capsys):
    """It may be there for other settings to refer to."""
    words = ["+epohcs=3", "+far=away", "task.dataset=${far}"]
    monkeypatch.setattr(sys, "argv", ["train.py", "task=imagefolder", "logger=none", *words])
    with pytest.raises(SystemExit):
        main(train.job, trace=lambda: False)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings == ["warning: +epohcs: nothing reads such a key"]
