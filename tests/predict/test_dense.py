"""``mode=predict`` and ``flora.load`` of runs that say something of each place in an image."""

import csv
import json
import sys
from functools import partial
from pathlib import Path

import hotcoco
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from shapely import Polygon

import flora
import train
from flora.errors import ConfigError, DataError
from flora.launch.entry import main
from flora.models.feature_maps import FeatureMaps
from flora.models.oriented import united
from flora.predict import Prediction
from flora.predict.command import _names
from flora.tasks.base import Predicted
from flora.tasks.detect.found import Found
from flora.tasks.oriented import dota
from flora.tasks.segment import maps
from flora.tasks.segment.datasets import DATASETS
from tests.tasks.detect.made import squares, write_coco, write_parquet
from tests.tasks.oriented.made import scenes, write_dota
from tests.tasks.segment.made import encoded, scene, write_camvid

TINY = (
    "model=timm",
    "model.timm_name=resnet18",
    "model.pretrained=false",
    "+model.architecture={channels: [8, 8, 16, 16]}",
)
TINY += ("adapter=lora", "trainer.max_steps=2", "trainer.batch_size=4", "trainer.device=cpu", "logger=none")
DETECTOR = ("task=detect", "task.short_sides=[64]", "task.longest_side=96", "task.anchors=[8,16,32,64,128]")
DETECTOR += ("task.channels=8", "task.hidden=16")
RUNS = {
    "scenes": ("task=segment", "task.size=48", "task.crop=32", "task.hidden_size=8"),
    "squares": DETECTOR,
    "turned": (  # long enough to find some
        *(
            "task=oriented",
            "task.dataset=dota",
            "task.held_out=0.3",
            "task.tile=64",
            "task.overlap=8",
            "task.seen=[64]",
        ),
        *("task.anchors=[8,16,32,64,128]", "task.channels=16", "task.hidden=32", "task.proposals=40", "task.most=30"),
        *("task.at_once=8", "task.turn=false", "task.flip=0", "adapter=full", "trainer.max_steps=200"),
        *("trainer.lr=3e-3", "trainer.head_lr=3e-3", "trainer.max_grad_norm=10", "trainer.eval_steps=200"),
    ),
    "masks": (*DETECTOR, "task.dataset=coco", "task.masks=true", "task.held_out=0.25"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder that holds data and each run of RUNS under its name; records by name."""
    place, records = tmp_path_factory.mktemp("dense"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        write_camvid(Path("data"))
        Path("data/coco").mkdir()
        for number, split in enumerate(("train", "validation", "test")):
            write_parquet(Path(f"data/bccd/{split}.parquet"), squares(number, 5))
        for number, split in enumerate(("train2017", "val2017")):
            write_coco(Path("data/coco"), split, squares(number, 12))
        for number, split in enumerate(("train", "val")):
            write_dota(Path("data/dota"), split, scenes(number, 9))
        for name, overrides in RUNS.items():
            keyed = {o.split("=")[0]: o for o in (*TINY, *overrides)}  # the last one wins
            patch.setattr(sys, "argv", ["train.py", *keyed.values()])
            known = set(Path("outputs/records").glob("*.json"))
            main(train.job, trace=lambda: True)
            (path,) = set(Path("outputs/records").glob("*.json")) - known
            records[name] = json.loads(path.read_text())
            Path(records[name]["adapter_path"]).parent.rename(name)
    return place, records


@pytest.fixture
def predict(finished, tmp_path, monkeypatch, script):
    """Run mode=predict in this process, with the output in ``tmp_path``: its folder."""
    monkeypatch.chdir(finished[0])

    def call(run, *overrides, code=0):
        asked = ("mode=predict", f"checkpoint={run}", "trainer.device=cpu", *overrides)
        if not any(word.startswith("output=") for word in overrides):
            asked += (f"output={tmp_path / 'out'}",)
        ended, out, err = script(partial(main, train.job, trace=lambda: False), "train.py", *asked)
        assert ended == code, err
        return err.splitlines()[-1] if code else Path(out.splitlines()[-1].removeprefix("predictions: "))

    return call


def write_pictures(folder, images):
    """PNG files by name, in folders of their own where names have some."""
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(image))


def test_maps_of_the_tests_own_images_give_its_metrics(predict, finished, tmp_path):
    scenes = {f"town/{number:02}.png": scene(number) for number in (8, 9, 10)}
    write_pictures(tmp_path / "images", {name: image for name, (image, _) in scenes.items()})
    folder = predict("scenes", f"input={tmp_path / 'images'}")
    names = json.loads((folder / "classes.json").read_text())
    assert [entry["name"] for entry in names] == list(DATASETS["camvid"].classes)
    confusion = np.zeros((11, 11))
    with (folder / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["path"] for row in rows] == [str(tmp_path / "images" / name) for name in scenes]
    for row, (image, mask) in zip(rows, scenes.values(), strict=True):
        with Image.open(folder / row["map"]) as drawn:
            classes = np.asarray(drawn)
            shown = np.asarray(drawn.convert("RGB"))
        assert classes.shape == mask.shape
        assert all((shown[classes == entry["class"]] == entry["colour"]).all() for entry in names)
        assert float(row[f"share({names[classes[3, 3]]['name']})"]) == pytest.approx((classes == classes[3, 3]).mean())
        with Image.open(folder / row["overlay"]) as overlay:
            blend = (image.astype(float) + shown) / 2
            assert np.abs(np.asarray(overlay) - blend).mean() < 8, "JPEG"
        np.add.at(confusion, (mask[mask < 255], classes[mask < 255]), 1)
    record = finished[1]["scenes"]
    right, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    assert record["metrics"]["pixel_accuracy"] == pytest.approx(right.sum() / confusion.sum())
    assert record["value"] == pytest.approx((right[union > 0] / union[union > 0]).mean())


def test_boxes_of_the_tests_own_images_give_its_map_by_cocos_own_files(predict, finished, tmp_path):
    """For who has the annotations: results load into COCO's tools, with the class ids of the annotation file."""
    record, whole = finished[1]["masks"], json.loads(Path("data/coco/annotations/instances_val2017.json").read_text())
    folder = predict("masks", "input=data/coco/val2017")
    results = json.loads((folder / "predictions.json").read_text())
    assert {result["category"]: result["category_id"] for result in results}.items() <= {
        entry["name"]: entry["id"] for entry in whole["categories"]
    }.items()
    by_name = {entry["file_name"]: entry["id"] for entry in whole["images"]}
    listed = sorted(by_name)
    for result in results:
        assert listed[result["image_id"]] == Path(result["file_name"]).name
        result["image_id"] = by_name[Path(result["file_name"]).name]
    truth = hotcoco.COCO(whole)
    for kind, name in (("bbox", "mAP"), ("segm", "mask_mAP")):
        evaluation = hotcoco.COCOeval(truth, truth.load_res(results), kind)
        evaluation.run()
        assert evaluation.get_results()["AP"] == pytest.approx(record["metrics"][name], abs=1e-6)
    pictures = sorted((folder / "pictures").iterdir())
    assert [picture.name for picture in pictures] == [f"{Path(name).stem}.jpg" for name in listed]
    with Image.open(pictures[0]) as drawn, Image.open(f"data/coco/val2017/{listed[0]}") as given:
        assert drawn.size == given.size


def test_dotas_files_of_the_tests_own_images_give_its_ap(predict, finished):
    """For who has the labels: AP at eleven recalls, by shapely, from the texts that DOTA's task 1 takes."""
    folder = predict("turned", "input=data/dota/val/images")
    truth = {}
    for path in sorted(Path("data/dota/val/labelTxt").iterdir()):
        for line in path.read_text().splitlines()[2:]:
            *corners, name, difficult = line.split()
            polygon = Polygon(np.array(corners, float).reshape(4, 2))
            truth.setdefault(name, []).append((path.stem, polygon, difficult == "1"))
    assert sorted(path.name for path in (folder / "task1").iterdir()) == ["Task1_plane.txt", "Task1_ship.txt"]
    record, many = finished[1]["turned"], 0
    assert record["metrics"]["AP50"] > 0.1, "a task that finds nothing would show nothing"
    for name, there in truth.items():
        lines = [line.split() for line in (folder / "task1" / f"Task1_{name}.txt").read_text().splitlines()]
        many += len(lines)
        taken, right, wrong, curve = set(), 0, 0, []
        for image, _, *corners in sorted(lines, key=lambda line: -float(line[1])):
            found = Polygon(np.array(corners, float).reshape(4, 2))
            overlaps = [
                found.intersection(p).area / found.union(p).area if image == where else 0 for where, p, _ in there
            ]
            best = int(np.argmax(overlaps))
            if overlaps[best] > 0.5 and there[best][2]:
                continue
            hit = overlaps[best] > 0.5 and best not in taken
            taken |= {best} if hit else set()
            right, wrong = right + hit, wrong + (not hit)
            curve.append((right / sum(not hard for _, _, hard in there), right / (right + wrong)))
        each = [max((p for r, p in curve if r >= bound), default=0) for bound in np.arange(0, 1.1, 0.1)]
        assert np.mean(each) == pytest.approx(record["metrics"][f"AP50_{name}"], abs=1e-9)
    results = json.loads((folder / "predictions.json").read_text())
    assert len(results) == many > 10
    for one in results:
        x, y = one["segmentation"][0][::2], one["segmentation"][0][1::2]
        assert one["bbox"] == pytest.approx([min(x), min(y), max(x) - min(x), max(y) - min(y)])
        assert ("plane", "ship")[one["category_id"]] == one["category"]
    pictures = sorted((folder / "pictures").iterdir())
    assert [picture.stem for picture in pictures] == [f"P{number:04}" for number in range(9)]
    with Image.open(pictures[1]) as shown, Image.open("data/dota/val/images/P0001.png") as given:
        assert shown.size == given.size


def test_names_that_would_break_dotas_files_do_not(tmp_path):
    corners = ((0.0, 1.0), (2.0, 1.0), (2.0, 3.0), (0.25, 3.0))
    found = Found("a/b", 0, 0.5, (0, 1, 2, 3), None, corners)
    results = dota.Results(["a/b", "a%2Fb"])
    results.noted(Predicted(0, "in/my photo.png", "my photo", lambda: None, Prediction(objects=[found])))
    results.write(tmp_path / "task1")
    assert (tmp_path / "task1/Task1_a%2Fb.txt").read_text() == "my_photo 0.5 0 1 2 1 2 3 0.25 3\n"
    assert (tmp_path / "task1/Task1_a%252Fb.txt").read_text() == ""


def test_in_python_a_map_and_objects_with_names(predict, finished):
    predictor = flora.load("scenes", device="cpu")
    image, _ = scene(8)
    said, other = predictor.predict([Image.fromarray(image), Image.fromarray(image[:40, :50])])
    assert said.classes.shape == (48, 64)
    assert other.classes.shape == (40, 50)
    with torch.no_grad():
        logits = predictor.model(predictor.preprocess([Image.fromarray(image)]))
    whole = torch.nn.functional.interpolate(logits, size=(48, 64), mode="bilinear", align_corners=False)
    assert np.array_equal(said.classes, whole[0].argmax(dim=0))
    predictor = flora.load("masks", device="cpu")
    found = predictor.predict("data/coco/val2017/001.png").objects
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert {one.label for one in found} <= set(predictor.class_names)
    with Image.open("data/coco/val2017/001.png") as given:
        assert found[0].mask.shape == given.size[::-1]
    with torch.no_grad():
        rows = predictor.model(predictor.preprocess(["data/coco/val2017/001.png"]))["detections"][0]
    assert found[0].box == tuple(rows[rows[:, 4].argmax(), :4].tolist())
    predictor = flora.load("turned", device="cpu")
    place = "data/dota/val/images/P0002.png"  # 100 x 100
    found = predictor.predict(place).objects
    tiles = predictor.preprocess([place])
    assert [tuple(tile.shape) for tile in tiles] == [(3, 64, 64)] * 4
    with Image.open(place) as given:
        below = np.asarray(given)[36:, :64]
    assert np.array_equal((255 * tiles[2]).round().permute(1, 2, 0), below)
    for batches, rounding in ((tiles[:3], tiles[3:]), 1e-6), ((tiles,), 0):  # the second as it was predicted
        with torch.no_grad():
            rows = torch.cat([predictor.model(batch)["detections"] for batch in batches])
        shifted = rows[..., :8] + torch.tensor([[0, 0], [36, 0], [0, 36], [36, 36]]).repeat(1, 4)[:, None]
        whole = united(torch.cat([shifted, rows[..., 8:]], dim=2).flatten(0, 1)[(rows[..., 9] >= 0).flatten()])
        assert np.allclose([np.ravel(one.corners) for one in found], whole[:, :8], atol=1e-4)
        assert np.allclose([one.score for one in found], whole[:, 8], rtol=0, atol=rounding)


def test_one_picture_or_a_table_of_them_and_those_that_cannot_be_read(predict, tmp_path):
    cells = [{"bytes": encoded(squares(7, 2)[1][0]), "path": None}, {"bytes": b"none", "path": None}]
    pq.write_table(pa.table({"image": cells}), tmp_path / "some.parquet")
    assert "row 1: image cannot be decoded" in predict("squares", f"input={tmp_path / 'some.parquet'}", code=2)
    assert not (tmp_path / "out").exists(), "nothing half-written"
    folder = predict("squares", f"input={tmp_path / 'some.parquet'}", "task.unreadable=skip")
    assert [path.name for path in (folder / "pictures").iterdir()] == ["row_000000.jpg"]
    said = predict("squares", f"input={tmp_path / 'some.parquet'}", "task.unreadable=skip", code=2)
    assert "out is there already: name a new folder" in said


def test_logits_that_are_not_finite_are_refused_and_classes_are_looked_at_in_parts(monkeypatch):
    logits = torch.randn(1, 7, 5, 6, generator=torch.Generator().manual_seed(0))

    def network(image):
        return logits

    images, sizes = torch.zeros(1, 3, 20, 24), [[20, 24, 40, 31]]
    expected = torch.nn.functional.interpolate(logits, size=(40, 31), mode="bilinear", align_corners=False)[0].argmax(0)
    for least in (1 << 28, 2 * 40 * 31):
        monkeypatch.setattr(maps, "_AT_ONCE", least)
        assert np.array_equal(maps.of_row(maps.maps(network, images, sizes).numpy()[0]), expected)
    logits[0, 3, 2, 2] = float("nan")
    assert (maps.maps(network, images, sizes) == maps.NOTHING).any()
    row = maps.maps(network, images, sizes).numpy()[0]
    with pytest.raises(ConfigError, match="outputs are not finite"):
        flora.tasks.Segment(name="segment", dataset="camvid", epochs=1).understood(row, [])


@pytest.mark.parametrize("run", ["squares", "turned"])
def test_a_detector_whose_features_are_not_finite_is_refused(finished, monkeypatch, run):
    """It would say that there is nothing."""
    monkeypatch.chdir(finished[0])
    predictor = flora.load(run, device="cpu")
    (features,) = (module for module in predictor.model.modules() if isinstance(module, FeatureMaps))
    features.register_forward_hook(lambda module, given, maps: [*maps[:-1], maps[-1] * float("nan")])
    with pytest.raises(ConfigError, match="outputs are not finite"):
        predictor.predict("data/coco/val2017/001.png")


def test_files_are_called_as_their_images():
    assert _names(["in/a.jpg", "in/b/a.png", "in/b/c.png"]) == ["a", "b/a", "b/c"]
    assert _names(["/x/a.jpg", "/x/a.png"]) == ["a.jpg", "a.png"], "two of one name"
    assert _names(["photo.jpg"]) == ["photo"]
    assert _names(["row_000001"]) == ["row_000001"]


def test_a_missing_picture_is_one_line(predict):
    assert "this run writes a folder of files" in predict("scenes", "input=nowhere.png", "output=said.csv", code=2)
    assert "there is no such file or folder" in predict("scenes", "input=nowhere.png", code=2)
    with pytest.raises(DataError, match="no such file"):
        flora.load("scenes", device="cpu").predict("nowhere.png")
