"""task=detect: whole runs of two steps on tiny random networks, what they leave, and what is refused."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from flora.errors import ConfigError, DataError
from flora.launch.entry import main
from flora.methods import Peft
from flora.models import TimmModel, get
from flora.tasks import Detect
from flora.tasks.detect.task import _mirrored
from flora.training import Protocol, Run, TrainerSettings, evaluate
from tests.tasks.detect.made import squares, write_coco, write_parquet
from tests.training.processes import together

SMALL = {"short_sides": [64], "longest_side": 96, "anchors": [8, 16, 32, 64, 128], "channels": 8, "hidden": 16}
TINY = (
    *("task=detect", "model=timm", "model.timm_name=resnet18", "model.pretrained=false"),
    "+model.architecture={channels: [8, 8, 16, 16]}",
    *(f"task.{key}={value}".replace(" ", "") for key, value in SMALL.items()),
    *("trainer.max_steps=2", "trainer.batch_size=3", "trainer.eval_batch_size=5", "logger=none", "trainer.device=cpu"),
)


@pytest.fixture
def folder(tmp_path):
    """Squares in the layout of parquet, under bccd, and in COCO's, under coco."""
    for number, split in enumerate(("train", "validation", "test")):
        write_parquet(tmp_path / "data" / "bccd" / f"{split}.parquet", squares(number, 5))
    for number, split in enumerate(("train2017", "val2017")):
        (tmp_path / "data" / "coco").mkdir(exist_ok=True)
        write_coco(tmp_path / "data" / "coco", split, squares(number, 12))
    return tmp_path / "data"


@pytest.fixture
def run(tmp_path, folder, monkeypatch, script):
    """Run train.py in this process: (exit code, record or None, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides):
        places = (f"paths.data={folder}", f"paths.output={tmp_path}/outputs", f"paths.results={tmp_path}/results")
        keyed = {override.split("=")[0]: override for override in (*TINY, *places, *overrides)}  # the last one wins
        code, out, err = script(partial(main, train.job, trace=lambda: False), "train.py", *keyed.values())
        lines = out.strip().splitlines()
        record = json.loads(Path(lines[-1].removeprefix("record: ")).read_text()) if code == 0 else None
        return code, record, err

    return call


@pytest.mark.parametrize("adapter", ["flora", "linear_probe", "full"])
def test_two_steps_leave_a_record_a_picture_and_what_was_trained(run, adapter):
    code, record, err = run(f"adapter={adapter}")

    assert code == 0, err
    assert (record["task"], record["dataset"], record["metric"]) == ("detect", "bccd", "mAP")
    assert record["value"] == record["metrics"]["mAP"]
    assert {"mAP", "AP50", "AP75"} <= {*record["metrics"]}
    assert record["data"]["counts"] == {"train": 5, "validation": 5, "test": 5}
    assert (record["trainable_params"] == 0) == (adapter == "linear_probe")
    assert record["head_params"] > 0
    with Image.open(Path(record["adapter_path"]).parent / "detections.png") as picture:
        assert picture.width > 100

    card = Path(record["adapter_path"], "README.md").read_text()
    Image.fromarray(squares(0, 2)[1][0]).save("photo.jpg")
    loaded = {"images": [torch.rand(3, 48, 64), torch.rand(3, 70, 40)]}
    exec(card.partition("```python\n")[2].partition("```")[0], loaded)
    assert loaded["found"].shape == (2, 100, 6)

    _, again, err = run(f"adapter={adapter}", "mode=eval", f"checkpoint={record['adapter_path']}")
    assert again["metrics"] == pytest.approx(record["metrics"], abs=1e-9), err


def test_masks_are_found_in_cocos_files(run):
    code, record, err = run("task.dataset=coco", "task.masks=true", "task.held_out=0.25", "adapter=lora")

    assert code == 0, err
    assert {"mAP", "mask_mAP", "mask_AP50"} <= {*record["metrics"]}
    assert record["data"]["counts"] == {"train": 9, "validation": 3, "test": 12}
    assert record["data"]["split_rule"] == "validation a drawn 25.0% of train, seed 0"


def test_images_that_cannot_be_read_are_counted(run, folder):
    made = squares(2, 5)
    made[3] = (b"no image", [[0, 0, 9, 9]], [0])
    write_parquet(folder / "bccd" / "test.parquet", made)

    code, _, err = run()
    assert code == 2
    assert "test.parquet, row 3: image cannot be decoded" in err
    code, record, err = run("task.unreadable=skip")
    assert code == 0, err
    assert record["data"]["unreadable"]["of"] == {"train": 0, "validation": 0, "test": 1}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("task.masks=true", "not all objects have a mask: set task.masks=false"),
        ("task.dataset=cells", "there is no folder"),
        ("task.anchors=[8,16]", "there are five levels"),
        ("task.flip=2", "task.flip=2.0 must lie in [0, 1]"),
        ("task.unreadable=no", "task.unreadable=no must be error or skip"),
        ("trainer.label_smoothing=0.1", "trainer.label_smoothing=0.1 is for classification"),
    ],
)
def test_bad_settings_are_one_line(run, override, said):
    code, _, err = run(override)

    assert code == 2
    assert said in err.splitlines()[-1]


def test_a_split_of_other_classes_is_refused(folder):
    write_parquet(folder / "bccd" / "test.parquet", squares(3, 4), names=("red", "blue", "green"))

    with pytest.raises(DataError, match=r"test\.parquet: class names or their order differ from train's"):
        read(folder)


def test_a_split_without_objects_is_refused(folder):
    write_parquet(folder / "bccd" / "test.parquet", squares(3, 1))

    with pytest.raises(DataError, match="no image of test shows an object"):
        read(folder)


def read(folder, **settings):
    task = Detect(name="detect", dataset="bccd", epochs=1, **SMALL, **settings)
    spec = task.network(TimmModel("resnet18", pretrained=False, architecture={"channels": (8, 8, 16, 16)}))
    return task, spec, task.load_for(spec, folder)


def test_training_mirrors_images_with_their_objects_and_evaluation_does_not(folder):
    task, spec, splits = read(folder, flip=1.0)
    batch = splits.train.__getitems__([1, 2])
    given = {}

    def network(images, targets):
        given["images"], given["boxes"] = images, [target["boxes"] for target in targets]
        return {}

    forward = task.forward(spec)
    forward(network, batch, False)
    plain = dict(given)
    forward(network, batch, True)
    for image, boxes, mirrored, others in zip(*plain.values(), *given.values(), strict=True):
        assert torch.equal(mirrored, image.flip(2))
        for (left, top, right, bottom), other in zip(boxes.tolist(), others.tolist(), strict=True):
            assert other == [image.shape[2] - right, top, image.shape[2] - left, bottom]
            square = mirrored[:, int(top) : int(bottom), int(other[0]) : int(other[2])]
            assert torch.equal(square, image[:, int(top) : int(bottom), int(left) : int(right)].flip(2))


def test_masks_are_mirrored_as_well():
    mask = torch.zeros(1, 4, 6, dtype=torch.uint8)
    mask[0, 1, 0] = 1

    _, target = _mirrored(torch.zeros(3, 4, 6), {"boxes": torch.tensor([[0.0, 1.0, 1.0, 2.0]]), "masks": mask})

    assert target["boxes"].tolist() == [[5, 1, 6, 2]]
    assert target["masks"].nonzero().tolist() == [[0, 1, 5]]


def test_training_learns_squares(folder):
    task, spec, splits = read(folder, flip=0.0)
    torch.manual_seed(0)
    network, forward = spec.build(splits.num_classes), task.forward(spec)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    batch = splits.train.__getitems__(range(1, 5))
    losses = []
    for _ in range(12):
        outputs, targets = forward(network, batch, True)
        loss = task.loss(outputs, targets, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert np.mean(losses[-3:]) < 0.8 * losses[0]


def test_a_classifier_is_no_detector():
    task = Detect(name="detect", dataset="bccd", epochs=1, **SMALL)

    with pytest.raises(ConfigError, match="model=resnet does not detect"):
        task.accepts(get("resnet"))


def test_a_network_without_feature_maps_is_refused():
    task = Detect(name="detect", dataset="bccd", epochs=1, **SMALL)

    with pytest.raises(ConfigError, match="has feature maps at strides"):
        task.network(TimmModel("vit_tiny_patch16_224", pretrained=False))


def trained(place, data, workers=0, **settings):
    """A run of three epochs of two steps."""
    task, spec, splits = read(data)
    options = {"epochs": 3, "lr": 1e-2, "batch_size": 3, "num_workers": workers, "device": "cpu", **settings}
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
        if state.global_step == 3:  # within the second epoch
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flora.training.callbacks.StepMeter.on_step_end", kill, raising=False)
        with pytest.raises(Killed):
            trained(tmp_path / "2", folder, 2, checkpoint_every=1).train()
    resumed = trained(tmp_path / "2", folder, 2, checkpoint_every=1).train()
    assert resumed.trainer.resumed_at == [2]
    assert state(resumed) == state(calm)
    assert resumed.metrics == calm.metrics


def scored(data, size):
    """Test metrics of a random network in one of several processes."""
    task, spec, splits = read(data, unreadable="skip")
    torch.manual_seed(0)
    return evaluate(spec.build(3), spec, task, splits.test, size, "cpu")


@pytest.mark.dist
def test_two_processes_count_each_image_once(tmp_path, folder):
    alone = scored(folder, 2)  # five images: the last batch is of one process
    for metrics in together(tmp_path / "said", scored, folder, 2):
        assert {k: v for k, v in metrics.items() if k != "loss"} == {k: v for k, v in alone.items() if k != "loss"}


def steps(data, place):
    """An epoch in one of several processes: what of the pyramid it has learnt."""
    run = trained(place, data, epochs=1, batch_size=2, eval_batch_size=1)  # a test of several draws, after validation
    return run.train().adapted.model.base_model.model.fpn.modules_to_save["default"].inner_blocks[0][0].weight.tolist()


@pytest.mark.dist
def test_two_processes_train_on_uneven_parts_and_agree(tmp_path, folder):
    (tmp_path / "run").mkdir()  # five images: the last batch is of one process

    one, other = together(tmp_path / "said", steps, folder, tmp_path / "run")

    assert one == other
