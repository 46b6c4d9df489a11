"""Where a run is going to write: what else lies there is refused before anything is trained."""

import os
from functools import partial

import pytest

import train
from flora.config import composed
from flora.errors import ConfigError
from flora.launch.entry import main
from flora.training.identity import identify
from flora.training.settings import Paths
from tests.launch.test_sweep import TINY

PLACES = {"adapter": "outputs/run/adapter", "checkpoints": "outputs/run/checkpoints"}
PLACES |= {"record": "results/run.json", "metrics": "outputs/run/metrics.csv"}
KINDS = {
    "file": lambda path: path.write_text(""),
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "dangling": lambda path: path.symlink_to("nowhere"),
    "link": lambda path: path.symlink_to(path.parent),
}
SOUND = {("adapter", "folder"), ("checkpoints", "folder"), ("checkpoints", "link")}
SOUND |= {("record", "file"), ("metrics", "file")}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_could_not_replace_is_refused(tmp_path, name, kind):
    path = tmp_path / PLACES[name]
    path.parent.mkdir(parents=True)
    KINDS[kind](path)
    paths = Paths("data", str(tmp_path / "outputs"), str(tmp_path / "results"))
    if (name, kind) in SOUND:
        assert paths.prepare("run") == tmp_path / "outputs" / "run"
    else:
        with pytest.raises(ConfigError, match=rf"{path} is not a (file|folder), as .* move it away"):
            paths.prepare("run")
    assert os.path.lexists(path)


@pytest.mark.parametrize("name", ["outputs/RUN/metrics.csv", "results/RUN.json"])
def test_a_pipe_holds_no_run_up(tmp_path, monkeypatch, script, name):
    monkeypatch.chdir(tmp_path)
    overrides = [*TINY, "model.image_size=32", "trainer.max_steps=1", "logger=csv", "paths.results=results"]
    path = tmp_path / name.replace("RUN", identify(composed(overrides)).run_id)
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    code, _, err = script(partial(main, train.job, trace=lambda: False), "train.py", *overrides)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: {name.partition('/')[0]}")
    assert err.endswith(f"{path.name} is not a file, as this run has to write there: move it away\n")
    assert not list(tmp_path.glob("outputs/*/adapter"))


@pytest.mark.parametrize("key", ["data", "output", "results"])
@pytest.mark.parametrize("blank", ["", " ", None])
def test_a_folder_without_a_name_is_refused(key, blank):
    with pytest.raises(ConfigError, match=f"paths.{key} must be a folder"):
        Paths(**{"data": "data", "output": "outputs", "results": "results", key: blank})
