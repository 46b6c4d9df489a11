"""task=oriented: whole runs of two steps on tiny random networks, what they leave, and what is refused."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from flora.errors import ConfigError
from flora.launch.entry import main
from flora.methods import Peft
from flora.models import TimmModel, get
from flora.tasks import Oriented
from flora.tasks.oriented import rendered
from flora.training import Protocol, Run, TrainerSettings, evaluate
from tests.models.test_quads import shapely_iou
from tests.tasks.oriented.made import scenes, write_dota, write_photographs
from tests.training.processes import together

SMALL = {"tile": 64, "overlap": 16, "seen": [64], "anchors": [8, 16, 32, 64, 128], "channels": 8, "hidden": 16}
SMALL |= {"proposals": 30, "regions": 64, "most": 30, "at_once": 3}
TINY = (
    *("task=oriented", "model=timm", "model.timm_name=resnet18", "model.pretrained=false", "task.dataset=dota"),
    "+model.architecture={channels: [8, 8, 16, 16]}",
    *(f"task.{key}={value}".replace(" ", "") for key, value in {**SMALL, "at_once": 8}.items()),
    *("trainer.max_steps=2", "trainer.batch_size=3", "trainer.eval_batch_size=2", "logger=none", "trainer.device=cpu"),
)


@pytest.fixture
def folder(tmp_path):
    """Bars and squares as DOTA has its files."""
    for number, (split, count) in enumerate((("train", 6), ("val", 5))):
        write_dota(tmp_path / "data" / "dota", split, scenes(number, count))
    return tmp_path / "data"


@pytest.fixture
def run(tmp_path, folder, monkeypatch, script):
    """Run train.py in this process: (exit code, record or None, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides):
        places = (f"paths.data={folder}", f"paths.output={tmp_path}/outputs", f"paths.results={tmp_path}/results")
        keyed = {o.split("=")[0]: o for o in (*TINY, "task.held_out=0.3", *places, *overrides)}  # the last one wins
        code, out, err = script(partial(main, train.job, trace=lambda: False), "train.py", *keyed.values())
        lines = out.strip().splitlines()
        record = json.loads(Path(lines[-1].removeprefix("record: ")).read_text()) if code == 0 else None
        return code, record, err

    return call


@pytest.mark.parametrize("adapter", ["flora", "linear_probe", "full"])
def test_two_steps_leave_a_record_a_picture_and_what_was_trained(run, adapter):
    code, record, err = run(f"adapter={adapter}")

    assert code == 0, err
    assert (record["task"], record["dataset"], record["metric"]) == ("oriented", "dota", "mAP")
    assert record["value"] == record["metrics"]["mAP"]
    assert {"mAP", "AP50", "AP75", "AP50_horizontal", "AP50_plane", "AP50_ship"} <= {*record["metrics"]}
    assert record["data"]["counts"] == {"train": 4, "validation": 2, "test": 5}
    assert record["data"]["tiles"]["side"] == 64
    assert record["data"]["tiles"]["train"] > 4
    assert (record["trainable_params"] == 0) == (adapter == "linear_probe")
    assert record["head_params"] > 0
    with Image.open(Path(record["adapter_path"]).parent / "detections.png") as picture:
        assert picture.width > 100

    card = Path(record["adapter_path"], "README.md").read_text()
    loaded = {"images": [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]}
    exec(card.partition("```python\n")[2].partition("```")[0], loaded)
    assert loaded["found"].shape == (2, 30, 10)

    _, again, err = run(f"adapter={adapter}", "mode=eval", f"checkpoint={record['adapter_path']}")
    assert again["metrics"] == pytest.approx(record["metrics"], abs=1e-9), err


def test_what_is_rendered_says_so(run, folder, monkeypatch):
    said = []
    monkeypatch.setattr("matplotlib.figure.Figure.supxlabel", lambda figure, text, **kwargs: said.append(text))
    monkeypatch.setattr(rendered, "COUNTS", {"train": 4, "validation": 3, "test": 3})
    write_photographs(folder / "rsscn7")

    code, record, err = run("task.dataset=rendered")

    assert code == 0, err
    assert (record["dataset"], record["data"]["source"]) == ("rendered", "rendered")
    assert record["data"]["counts"] == {"train": 4, "validation": 3, "test": 3}
    assert record["data"]["split_rule"] == "drawn on photographs of the same split of rsscn7, seed 0"
    assert said[0].startswith("rendered images; ")
    assert "dataset rendered (source: rendered)" in Path(record["adapter_path"], "README.md").read_text()


def test_images_that_cannot_be_read_are_counted(run, folder):
    whole = (folder / "dota" / "val" / "images" / "P0003.png").read_bytes()
    (folder / "dota" / "val" / "images" / "P0002.png").write_bytes(b"no image")
    (folder / "dota" / "train" / "images" / "P0004.png").write_bytes(b"no image")
    (folder / "dota" / "val" / "images" / "P0003.png").write_bytes(whole[:100])  # its size can be read

    code, _, err = run()
    assert code == 2
    assert "P0004.png: image cannot be decoded" in err
    code, record, err = run("task.unreadable=skip")
    assert code == 0, err
    of = record["data"]["unreadable"]["of"]
    assert of["test"] == 2
    assert of["train"] + of["validation"] == 1


def test_a_run_is_known_by_its_labels_and_its_images(folder):
    task = read(folder)[0]
    before = task.contents(folder)
    labels = folder / "dota" / "train" / "labelTxt" / "P0001.txt"
    labels.write_text(labels.read_text() + "10 10 30 10 30 20 10 20 ship 0\n")
    between = task.contents(folder)
    (folder / "dota" / "val" / "images" / "P0001.png").write_bytes(b"another")

    assert before["images"] == between["images"] != task.contents(folder)["images"]
    assert before["labels"] != between["labels"] == task.contents(folder)["labels"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("task.dataset=ships", "there is no folder"),
        ("task.anchors=[8,16]", "there are five levels"),
        ("task.tile=16", "task.tile=16 must be a whole number of at least 32"),
        ("task.overlap=64", "task.overlap=64 must be a whole number below task.tile=64"),
        ("task.visible=0", "task.visible=0.0 must lie above 0"),
        ("task.seen=[8]", "task.seen=[8] must be whole numbers of at least 32 pixels"),
        ("task.flip=2", "task.flip=2.0 must lie in [0, 1]"),
        ("task.unreadable=no", "task.unreadable=no must be error or skip"),
        ("trainer.label_smoothing=0.1", "trainer.label_smoothing=0.1 is for classification"),
    ],
)
def test_bad_settings_are_one_line(run, override, said):
    code, _, err = run(override)

    assert code == 2
    assert said in err.splitlines()[-1]


def read(folder, **settings):
    options = {"name": "oriented", "dataset": "dota", "epochs": 1, "held_out": 0.3, **SMALL, **settings}
    task = Oriented(**options)
    spec = task.network(TimmModel("resnet18", pretrained=False, architecture={"channels": (8, 8, 16, 16)}))
    return task, spec, task.load_for(spec, folder)


def test_training_mirrors_and_turns_tiles_and_evaluation_does_not(folder):
    task, spec, splits = read(folder, flip=1.0, turn=False)
    batch = splits.train.__getitems__([0, 1])
    given = {}

    def network(images, targets):
        given["images"], given["quads"] = images, [target["quads"] for target in targets]
        return {"losses": torch.zeros(6), "detections": torch.full((len(images), 2, 10), -100.0)}

    forward = task.forward(spec)
    forward(network, batch, False)
    plain = dict(given)
    forward(network, batch, True)
    for image, corners, mirrored, others in zip(*plain.values(), *given.values(), strict=True):
        assert torch.equal(mirrored, image.rot90(2, (1, 2)))
        assert torch.equal(others, 64 - corners)


def test_a_small_image_is_filled_up_with_the_mean_colour(folder):
    task, spec, splits = read(folder, tile=128, overlap=16)
    given = []

    def network(images, targets):
        given.extend(images)
        return {"losses": torch.zeros(6)}

    task.flip, task.turn = 0.0, False
    task.forward(spec)(network, splits.train.__getitems__([0, 1]), True)

    assert {tuple(image.shape) for image in given} == {(3, 128, 128)}
    for image in given:
        torch.testing.assert_close(image[:, -1, -1], torch.tensor(spec.mean))


def test_an_evaluation_finds_each_object_once_in_the_whole_image(folder):
    """A network that finds in each tile what it is told is there: tiles overlap, and what they find is united."""
    task, spec, splits = read(folder)
    passes = []

    def network(images, targets):
        passes.append(len(images))
        found = torch.full((len(images), 30, 10), -100.0)
        for rows, target in zip(found, targets, strict=True):
            for row, corners, label in zip(rows, target["quads"], target["labels"], strict=False):
                row[:] = torch.cat([corners.flatten(), torch.tensor([0.9, label - 1])])
        return {"losses": torch.full((6,), float(len(images))), "detections": found}

    batch = splits.test.__getitems__([1, 0, 2])
    outputs, labels = task.forward(spec)(network, batch, False)

    assert max(passes) == 3
    assert sum(passes) == len(batch["tiles"]) == 12
    assert outputs["losses"].tolist() == [3.0] * 6
    objects, twice = task.annotated.objects, 0
    for rows, image in zip(outputs["detections"].numpy(), labels.tolist(), strict=True):
        rows, inside = rows[rows[:, 9] >= 0], objects.of(image)
        seen = [i for i in range(inside.start, inside.stop) if i in splits.test.catalogue.members]
        assert len(rows) == len(seen)
        twice += sum((splits.test.catalogue.members == i).sum() > 1 for i in seen)
        for i in seen:
            same = rows[rows[:, 9] == objects.classes[i], :8].reshape(-1, 4, 2)
            assert shapely_iou(same.astype(float), objects.corners[[i] * len(same)]).max() > 0.999
    assert twice > 0


def test_training_learns_bars_and_squares(folder):
    task, spec, splits = read(folder, flip=0.0, turn=False)
    torch.manual_seed(0)
    network, forward = spec.build(splits.num_classes), task.forward(spec)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    batch = splits.train.__getitems__(range(4))
    losses = []
    for _ in range(15):
        outputs, targets = forward(network, batch, True)
        loss = task.loss(outputs, targets, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert np.mean(losses[-3:]) < 0.8 * losses[0]


def test_a_classifier_is_no_detector():
    task = Oriented(name="oriented", dataset="dota", epochs=1, **SMALL)

    with pytest.raises(ConfigError, match="model=resnet does not detect"):
        task.accepts(get("resnet"))


def trained(place, data, workers=0, **settings):
    """A run of two epochs of three steps or so."""
    task, spec, splits = read(data, at_once=8)
    options = {"epochs": 2, "lr": 1e-2, "batch_size": 3, "num_workers": workers, "device": "cpu", **settings}
    method = Peft("lora", "peft.LoraConfig", "all", r=2)
    return Run(task, spec, method, TrainerSettings(**options), Protocol("holdout", "best", "train"), splits, 0, place)


def state(outcome):
    return {name: tensor.numpy().tobytes() for name, tensor in outcome.adapted.model.state_dict().items()}


def test_runs_are_bit_equal_whoever_reads_the_images_and_wherever_they_were_resumed(tmp_path, folder):
    for name in "012":
        (tmp_path / name).mkdir()
    calm = trained(tmp_path / "0", folder).train()
    assert state(trained(tmp_path / "1", folder, 2).train()) == state(calm)

    class Killed(BaseException):
        pass

    def kill(callback, args, state, control, **kwargs):
        if state.epoch > 1:  # within the second epoch
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flora.training.callbacks.StepMeter.on_step_end", kill, raising=False)
        with pytest.raises(Killed):
            trained(tmp_path / "2", folder, checkpoint_every=1).train()
    resumed = trained(tmp_path / "2", folder, checkpoint_every=1).train()
    assert resumed.trainer.resumed_at[0] > 0
    assert state(resumed) == state(calm)
    assert resumed.metrics == calm.metrics


def test_a_run_trains_on_validation_as_well(tmp_path, folder):
    task, spec, splits = read(folder)
    options = {"epochs": 1, "lr": 1e-2, "batch_size": 3, "device": "cpu", "max_steps": 2}
    protocol = Protocol("vtab1k", "last", "train+validation")
    method = Peft("lora", "peft.LoraConfig", "all", r=2)

    outcome = Run(task, spec, method, TrainerSettings(**options), protocol, splits, 0, tmp_path).train()

    assert 0 <= outcome.metrics["mAP"] <= 1


def scored(data, size):
    """Test metrics of a random network in one of several processes."""
    task, spec, splits = read(data, unreadable="skip")
    torch.manual_seed(0)
    return evaluate(spec.build(2), spec, task, splits.test, size, "cpu")


@pytest.mark.dist
def test_two_processes_count_each_image_once(tmp_path, folder):
    alone = scored(folder, 2)  # five images: the last batch is of one process
    for metrics in together(tmp_path / "said", scored, folder, 2):
        assert {k: v for k, v in metrics.items() if k != "loss"} == {k: v for k, v in alone.items() if k != "loss"}


def steps(data, place):
    """An epoch in one of several processes: what of the pyramid it has learnt."""
    run = trained(
        place, data, epochs=1, batch_size=2, max_train_examples=11, eval_batch_size=1
    )  # a test of several draws, after validation
    return run.train().adapted.model.base_model.model.fpn.modules_to_save["default"].inner_blocks[0][0].weight.tolist()


@pytest.mark.dist
def test_two_processes_train_on_uneven_parts_and_agree(tmp_path, folder):
    (tmp_path / "run").mkdir()
    one, other = together(tmp_path / "said", steps, folder, tmp_path / "run")  # the last of eleven tiles is alone

    assert one == other


@pytest.mark.gpu
def test_a_gpu_trains_and_finds_as_a_cpu_does(folder):
    task, spec, splits = read(folder, flip=0.0, turn=False)
    torch.manual_seed(0)
    network, forward = spec.build(splits.num_classes).eval(), task.forward(spec)
    batch = splits.test.__getitems__(range(3))
    with torch.no_grad():
        there, _ = forward(network, batch, False)
        network.cuda()
        here, _ = forward(network, {name: value.cuda() for name, value in batch.items()}, False)
    torch.testing.assert_close(here["losses"].cpu(), there["losses"], rtol=0.05, atol=1e-3)  # other regions are drawn

    network.train()
    with torch.autocast("cuda", torch.bfloat16):
        outputs, targets = forward(network, {n: v.cuda() for n, v in splits.train.__getitems__([0, 1]).items()}, True)
    task.loss(outputs, targets, 0.0).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
