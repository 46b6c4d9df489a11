"""Which run a config asks for: its data and weights count by what they hold, and a finished run is of the same ones."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import train
from flora import contents
from flora.config import composed, instantiate
from flora.errors import ConfigError, DataError, WeightsError
from flora.files import ROOT
from flora.launch.entry import main
from flora.results import Store
from flora.results.cells import _parts
from flora.results.store import SHIPPED
from flora.training.identity import finished, identify, notes
from flora.training.tested import check_weights
from tests.tasks.conftest import png

TINY = ("model=timm", "model.timm_name=test_resnet", "model.pretrained=false", "model.image_size=16", "adapter=lora")


@pytest.fixture
def run(tmp_path, monkeypatch, script):
    """Run train.py in this process, in an empty folder, for one step: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    quick = ("trainer.max_steps=1", "trainer.batch_size=4", "logger=none", "trainer.device=cpu")

    def call(*overrides):
        return script(partial(main, train.job, trace=lambda: False), "train.py", *overrides, *quick)

    return call


def pictures(folder, shade, count=6):
    """A folder of two classes, each image of one shade."""
    for split in ("train", "test"):
        for number in range(count):
            for which in ("cats", "dogs"):
                place = folder / split / which / f"{number}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16), (shade, 16 * number, 200 * (which == "dogs"))).save(place)
    return folder


def name(*overrides):
    return identify(composed(overrides)).run_id


def test_other_pictures_are_another_run_and_the_same_elsewhere_are_not(run, tmp_path):
    pictures(tmp_path / "a" / "mine", 10)
    pictures(tmp_path / "b" / "mine", 90)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    asked = ("task=imagefolder", "task.dataset=mine", *TINY)
    code, out, err = run(*asked, "paths.data=a")
    assert code == 0, err
    code, other, err = run(*asked, "paths.data=b")
    assert code == 0, err
    assert "finished before" not in err
    assert other.split()[-1] != out.split()[-1]
    assert f"other data than in run {Path(out.split()[-1]).stem}: this is another run" in err
    code, same, err = run(*asked, "paths.data=c")
    assert (code, same.split()[-1]) == (0, out.split()[-1])
    assert "finished before: mine" in err
    code, _, err = run(*asked, "paths.data=nowhere")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: there is no folder nowhere/mine")
    Image.new("RGB", (16, 16)).save(tmp_path / "c" / "mine" / "train" / "cats" / "new.png")
    code, more, err = run(*asked, "paths.data=c")
    assert code == 0, err
    assert len({said.split()[-1] for said in (out, other, more)}) == 3


def test_a_class_without_images_counts_as_it_has_an_output(tmp_path):
    pictures(tmp_path / "mine", 10)
    asked = ("task=imagefolder", "task.dataset=mine", f"paths.data={tmp_path}", *TINY)
    before = name(*asked)
    (tmp_path / "mine" / "train" / "birds").mkdir()
    assert name(*asked) != before


def test_a_sweep_over_folders_of_data_runs_each(tmp_path, monkeypatch, run):
    for folder, shade in (("a", 10), ("b", 90)):
        pictures(tmp_path / folder / "mine", shade)
    code, _, err = run("-m", "task=imagefolder", "task.dataset=mine", *TINY, "paths.data=a,b", "hydra/launcher=basic")
    assert code == 0, err
    assert len(list((tmp_path / "outputs" / "records").glob("*.json"))) == 2


def questions(folder, answer):
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = [{"image": {"bytes": png(1), "path": None}, "question": "what?", "answer": answer}] * 2
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")


def test_conversations_as_parquet_are_others_than_as_json_and_pictures_count(tmp_path):
    folder = tmp_path / "mine"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "images" / "1.x", "png")
    turns = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "it"}]
    for split in ("train", "test"):
        (folder / f"{split}.json").write_text(json.dumps([{"image": "1.x", "conversations": turns}]))
    cfg = composed(["task=instruct", "task.dataset=mine", "model=llava_mini", f"paths.data={tmp_path}"])
    ids = [identify(cfg).run_id]
    Image.new("RGB", (9, 9)).save(folder / "images" / "1.x", "png")
    ids.append(identify(cfg).run_id)
    for split in ("train", "test"):
        (folder / f"{split}.json").unlink()
    questions(folder, "it")
    ids.append(identify(cfg).run_id)
    questions(folder, "that")
    ids.append(identify(cfg).run_id)
    assert len(set(ids)) == 4


def test_weights_count_by_what_the_file_holds_and_not_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    kept = set()
    state = timm.create_model("test_resnet", num_classes=2).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    shutil.copy(tmp_path / "w.safetensors", tmp_path / "v.safetensors")
    asked = ("task=digits", "model=timm", "model.timm_name=test_resnet", "adapter=lora")
    for path in tmp_path.glob("*.safetensors"):
        os.utime(path, (1, 1))
    monkeypatch.setattr(contents, "SETTLED_NS", 0)
    before = name(*asked, f"model.weights={tmp_path}/w.safetensors")
    other = name(*asked, "seed=1", f"model.weights={tmp_path}/w.safetensors")  # in one process, known by now
    assert name(*asked, f"model.weights={tmp_path}/v.safetensors") == before
    save_file({n: t * 1.01 if t.is_floating_point() else t for n, t in state.items()}, tmp_path / "w.safetensors")
    for seed in (0, 1):
        kept.add(name(*asked, f"seed={seed}", f"model.weights={tmp_path}/w.safetensors"))
    assert kept.isdisjoint({before, other})
    assert len(kept) == 2
    assert name(*asked, "model.pretrained=false") != before


def sharded(folder, value):
    folder.mkdir(exist_ok=True)
    save_file({"w": torch.full((2,), value)}, folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))


def test_shards_and_a_tokenizer_beside_them_count(tmp_path):
    sharded(tmp_path / "bert", 1.0)
    (tmp_path / "bert" / "tokenizer.json").write_text("{}")
    (tmp_path / "glue" / "rte").mkdir(parents=True)
    for split in ("train", "validation"):
        (tmp_path / "glue" / "rte" / f"{split}.parquet").write_bytes(b"x")
    asked = ("task=glue", "task.dataset=rte", f"paths.data={tmp_path}", "model=minilm_l6")
    mine = (*asked, f"model.weights={tmp_path}/bert")
    ids = [name(*asked), name(*mine)]
    sharded(tmp_path / "bert", 2.0)
    ids.append(name(*mine))
    (tmp_path / "bert" / "tokenizer.json").write_text('{"a": 1}')
    ids.append(name(*mine))
    assert len(set(ids)) == 4
    shutil.copytree(tmp_path / "bert", tmp_path / "copy")
    assert name(*asked, f"model.weights={tmp_path}/copy") == ids[-1]
    assert name(*asked, f"model.tokenizer={tmp_path}/copy") != ids[0]


def test_a_saved_run_refuses_a_shard_that_has_changed(tmp_path):
    sharded(tmp_path / "bert", 1.0)
    (tmp_path / "bert" / "tokenizer.json").write_text("{}")
    model = instantiate(composed(["model=minilm_l6", f"model.weights={tmp_path}/bert"]).model)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"weights": model.facts}))
    check_weights(tmp_path / "run", model)
    sharded(tmp_path / "bert", 2.0)
    with pytest.raises(WeightsError, match=r"but .*run was trained on weights with sha256"):
        check_weights(tmp_path / "run", model)


@pytest.mark.data
def test_cifar_called_eurosat_is_not_the_record_of_eurosat(tmp_path):
    data = Path(os.environ["FLORA_DATA"])
    (tmp_path / "eurosat").symlink_to(data / "cifar10")
    asked = ("task=vtab", "task.augment=auto", "model=resnet", "protocol.lr_grid=[5e-4,2e-3,6e-3,2e-2]")
    asked = (*asked, "task.dataset=eurosat", "adapter=lora", "adapter.r=8", "seed=2")
    found = {}
    for folder in (data, tmp_path):
        cfg = composed([*asked, "reuse=reference", f"paths.data={folder}", f"paths.results={tmp_path}/records"])
        asks = identify(cfg)
        found[folder] = finished(asks, Store(cfg.paths.results), cfg)
        if folder == tmp_path:
            (said,) = notes(asks, Store(SHIPPED).read_all())
            assert said.startswith("other data than in run ")
    record, path = found[data]
    assert path == SHIPPED / f"{record['run_id']}.json"
    assert record["adapter"] == "lora"
    assert found[tmp_path] is None


OURS = (  # a record that ships, of a data set that is rendered
    *("task=vtab", "task.augment=auto", "task.dataset=dsprites_location", "model=resnet", "adapter=linear_probe"),
    "protocol.lr_grid=[3e-3,1e-2,3e-2,1e-1]",
)


def test_a_command_trains_though_a_record_of_ours_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = composed(OURS)
    asks = identify(cfg)
    assert finished(asks, Store(cfg.paths.results), cfg) is None
    assert not (ROOT / cfg.paths.results).resolve().is_relative_to(SHIPPED.resolve())
    cfg.reuse = "reference"
    record, path = finished(asks, Store(cfg.paths.results), cfg)
    assert (path.parent, record["adapter"]) == (SHIPPED, "linear_probe")
    cfg.force = True
    assert finished(asks, Store(cfg.paths.results), cfg) is None


def test_a_run_of_ours_is_told_as_ours_and_is_not_written(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in SHIPPED.glob("*.json")}
    words = (*OURS, "reuse=reference")
    code, out, err = script(partial(main, train.job, trace=lambda: False), "train.py", *words)
    assert code == 0, err
    assert "a record that ships with flora" in err
    assert Path(out.split()[-1]).parent == SHIPPED
    assert {path.name: path.stat().st_mtime_ns for path in SHIPPED.glob("*.json")} == before
    assert not (tmp_path / "outputs" / "records").exists()


def test_data_that_is_not_there_is_an_error_although_its_record_is(run, tmp_path):
    place = tmp_path / "data" / "glue" / "rte"
    place.mkdir(parents=True)
    for split in ("train", "validation"):
        (place / f"{split}.parquet").write_bytes(b"x")
    cfg = composed(["task=glue", "task.dataset=rte", "model=minilm_l6", "paths.data=data"])
    assert identify(cfg)
    shutil.rmtree(place)
    with pytest.raises(DataError, match="no data for rte"):
        identify(cfg)


def test_of_what_a_run_starts_from_its_cell_counts_and_what_it_holds(tmp_path):
    rng = np.random.default_rng(0)
    questions(tmp_path / "easy_vqa", "it")
    asked = ["task=instruct", "model=llava_mini", "task.dataset=easy_vqa", f"paths.data={tmp_path}"]
    made = []
    for folder, cell in (("one", "c" * 12), ("two", "c" * 12), ("three", "d" * 12)):
        adapter = tmp_path / folder / "adapter"
        adapter.mkdir(parents=True)
        number = 1.0 if folder == "three" else float(rng.random())
        save_file({"w": torch.tensor([number])}, adapter / "model.safetensors")
        (adapter / "run.json").write_text(json.dumps({"run_id": folder, "cell_id": cell}))
        made.append(identify(composed([*asked, f"model.projector={tmp_path / folder}"])))
    assert made[0].config["model"]["projector"] == f"outputs/{'c' * 12}"
    assert made[0].cell_id == made[1].cell_id != made[2].cell_id
    assert len({made[0].run_id, made[1].run_id, made[2].run_id}) == 3


def test_what_is_tested_are_the_classes_and_the_data_that_the_run_was_trained_on(run, tmp_path):
    pictures(tmp_path / "data" / "mine", 10)
    code, out, err = run("task=imagefolder", "task.dataset=mine", *TINY)
    assert code == 0, err
    record = json.loads(Path(out.split()[-1]).read_text())
    again = ("mode=eval", f"checkpoint={Path(record['adapter_path']).parent}")
    code, out, err = run(*again)
    assert (code, "other data" in err) == (0, False), err
    (tmp_path / "data" / "mine" / "test" / "cats" / "0.png").write_bytes(png(7))
    code, out, err = run(*again)
    assert code == 0, err
    assert "tested on other data than the run was trained on" in err
    assert "data" in json.loads(Path(out.split()[-1]).read_text())["execution"]["set_anew"]
    for split in ("train", "test"):
        (tmp_path / "data" / "mine" / split / "cats").rename(tmp_path / "data" / "mine" / split / "elks")
    code, _, err = run(*again)
    assert code == 2
    assert "tells cats, dogs apart, in this order, but the data has dogs, elks" in err
    (tmp_path / "data").rename(tmp_path / "gone")
    code, _, err = run(*again)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: there is no folder data/mine")


@pytest.mark.parametrize("ending", ["", ".jfif"])
@pytest.mark.parametrize("linked", [False, True])
def test_images_that_a_table_names_count_whatever_they_are_called_and_behind_links(tmp_path, ending, linked):
    folder, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    for place in (folder, elsewhere):
        place.mkdir()
    if linked:
        (folder / "pics").symlink_to(elsewhere)
    else:
        (folder / "pics").mkdir()
    for split in ("train", "test"):
        rows = [{"image": {"bytes": None, "path": f"pics/i{n}{ending}"}, "label": n % 2} for n in range(4)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    ids = set()
    for shade in range(2):
        for number in range(4):
            (folder / "pics" / f"i{number}{ending}").write_bytes(png(10 * shade + number))
        ids.add(name("task=imagefolder", "task.dataset=mine", "task.classes=2", f"paths.data={tmp_path}", *TINY))
    assert len(ids) == 2


def test_code_and_arguments_of_an_own_network_count(tmp_path, monkeypatch):
    package = tmp_path / "ownnets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text("def build(num_classes, **more): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = ("task=digits", "model=module", "model.target=ownnets.nets.build", "model.allow=[ownnets]")
    ids = [name(*own), name(*own, "model.arguments={act: 1}"), name(*own, "model.arguments={act: false}")]
    (package / "nets.py").write_text("def build(num_classes, **others): ...\n")
    ids.append(name(*own))
    assert len(set(ids)) == 4


def test_a_setting_that_no_config_has_counts_also_where_it_is_off():
    asked = ("task=digits", "model=timm", "model.timm_name=resnet10t", "model.pretrained=false", "adapter=ia3")
    assert name(*asked) != name(*asked, "+adapter.init_ia3_weights=false")


def test_a_table_may_allow_no_code(monkeypatch, tmp_path):
    cells = {"common": ["task=digits", "model=module", "model.allow=[evil]"], "grid": {"seed": [0]}}
    with pytest.raises(ConfigError, match=r"model\.allow=\[evil\]: a table may not allow code to run"):
        _parts("evil", cells)
