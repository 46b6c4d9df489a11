"""task=segment from training to a saved run that is tested again."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import flora
import train
from flora.config import matched_method
from flora.errors import ConfigError
from flora.launch.entry import main
from flora.methods import LinearProbe, heads
from flora.methods.base import load
from flora.models import TimmModel, get
from flora.models.segmentation import Segmenter, UperNet
from flora.tasks.pictures import palette
from flora.training import Protocol, Run, TrainerSettings, evaluate
from tests.tasks.segment.made import encoded, network, scene, task, write_camvid, write_table
from tests.training.processes import together


@pytest.fixture
def run(tmp_path, monkeypatch, script):
    """Run train.py on made scenes in this process, over a tiny random network: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    write_camvid(tmp_path / "data")
    fixed = [
        *("task=segment", "model=timm", "model.pretrained=false", "+model.architecture={channels: [8, 8, 16, 16]}"),
        *("task.size=48", "task.crop=32", "task.hidden_size=8", "trainer.max_steps=2", "trainer.batch_size=4"),
        *("logger=none", "trainer.device=cpu", "paths.data=data", "paths.output=outputs", "paths.results=results"),
    ]

    def call(*overrides):
        return script(partial(main, train.job, trace=lambda: False), "train.py", *fixed, *overrides)

    return call


def record_of(out):
    return json.loads(Path(out.strip().splitlines()[-1].removeprefix("record: ")).read_text())


def test_a_saved_run_is_loaded_as_its_card_says(run):
    code, out, err = run("adapter=lora")
    assert code == 0, err
    record = record_of(out)
    card = Path(record["adapter_path"], "README.md").read_text()
    assert "predictor.model  # floats [B, 3, H, W], normalised as above, to logits [B, 11, ~H / 4, ~W / 4]" in card
    predictor = flora.load(record["adapter_path"])
    with torch.no_grad():
        assert predictor.model(torch.zeros(1, 3, 64, 96)).shape == (1, 11, 16, 24)
    assert "predictor.predict('photo.jpg').classes" in card


@pytest.mark.parametrize(("rank", "count"), [(8, 12_946_080), (16, 25_892_160), (32, 51_784_320)])
def test_lora_flat_over_convnextv2_large_has_the_sizes_of_table_1(rank, count):
    spec = task(dataset="ade20k", hidden_size=None).network(TimmModel("convnextv2_large"))
    method = matched_method("lora_flat", rank, "all")
    with torch.device("meta"):
        adapted = method.apply(spec.skeleton(150), spec.classifier)
    assert heads.trained(adapted.model, spec.classifier)[0] == count


@pytest.mark.parametrize("adapter", ["flora", "linear_probe"])
def test_two_steps_leave_a_record_and_a_saved_run_that_tests_as_it_did(run, adapter):
    code, out, err = run(f"adapter={adapter}")
    assert code == 0, err
    record = record_of(out)
    assert (record["task"], record["dataset"], record["metric"]) == ("segment", "camvid", "mIoU")
    assert record["value"] == record["metrics"]["mIoU"]
    assert {"mean_accuracy", "pixel_accuracy", "IoU_sky"} <= record["metrics"].keys()
    assert record["data"]["counts"] == {"train": 6, "validation": 2, "test": 3}
    layers = set(record["ranks"])
    assert all(name.startswith("backbone.network.") for name in layers)
    assert bool(layers) == (adapter == "flora")
    assert (record["trainable_params"] > 0) == (adapter == "flora")
    assert record["head_params"] == sum(
        p.numel() for name, p in network().skeleton(11).named_parameters() if not name.startswith("backbone.")
    )
    folder = Path(record["adapter_path"]).parent
    assert (folder / "predictions.png").stat().st_size > 1000
    code, out, err = run(f"adapter={adapter}", "mode=eval", f"checkpoint={folder}")
    assert code == 0, err
    assert record_of(out)["metrics"] == record["metrics"]


def test_a_mask_of_another_size_ends_a_run_with_one_line(run, tmp_path):
    image, mask = scene(0)
    write_table(tmp_path / "data" / "camvid", "train", [(encoded(image), encoded(mask[:40]))] * 4)
    code, _, err = run()
    assert code == 2
    assert "its mask is 64 x 40, the image 64 x 48 pixels" in err.strip().splitlines()[-1]


def test_the_shipped_weights_lie_under_the_decoder():
    spec = task().network(get("convnext"))
    assert isinstance(spec, UperNet)
    built, classifier = spec.build(11), get("convnext").build(3)
    assert isinstance(built, Segmenter)
    own = dict(classifier.named_parameters())
    for name, parameter in built.backbone.network.named_parameters():
        assert torch.equal(parameter, own[name])
    assert spec.classifier == ["backbone.norms", "decode_head", "auxiliary_head"]
    logits, auxiliary = built(torch.randn(2, 3, 64, 96))
    assert (logits.shape, auxiliary.shape) == ((2, 11, 16, 24), (2, 11, 4, 6))
    with pytest.raises(ConfigError, match="model=minilm_l6 has no feature maps"):
        task().network(get("minilm_l6"))


def test_images_of_several_sizes_are_each_seen_as_if_alone(tmp_path):
    write_camvid(tmp_path)
    pairs = [scene(0, 48, 64), scene(1, 96, 64), scene(2, 60, 90)]
    write_table(tmp_path / "camvid", "test", [(encoded(image), encoded(mask)) for image, mask in pairs])
    segment, spec = task(), network()
    splits = segment.load_for(spec, tmp_path)
    module, forward = spec.build(11).eval(), segment.forward(spec)
    with torch.no_grad():
        together, labels = forward(module, splits.test.__getitems__([0, 1, 2]), False)
        for row, (_, mask) in enumerate(pairs):
            alone = splits.test.__getitems__([row])
            whole = module(spec.normalize(alone["pixel_values"]))
            expected = F.interpolate(whole, size=mask.shape, mode="bilinear")[0]
            height, width = mask.shape
            torch.testing.assert_close(together[row, :, :height, :width], expected)
            assert (labels[row, height:] == -100).all()
            assert (labels[row, :, width:] == -100).all()
    scores = [evaluate(module, spec, segment, splits.test, size, "cpu") for size in (1, 3)]
    assert scores[0]["mIoU"] == scores[1]["mIoU"]


def test_eight_images_are_shown_that_are_no_neighbours(tmp_path):
    write_camvid(tmp_path, {"train": 2, "validation": 2, "test": 40})
    segment, spec = task(), network()
    splits = segment.load_for(spec, tmp_path)
    module, forward = spec.build(11).eval(), segment.forward(spec)
    shown = []
    for order in (range(40), range(39, -1, -1)):
        segment._called.clear()
        forward(module, splits.validation.__getitems__([0, 1]), False)
        for start in range(0, 40, 8):
            forward(module, splits.test.__getitems__([*order][start : start + 8]), False)
        shown.append(sorted(segment._called))
    assert shown[0] == shown[1], "in whatever order they are tested"
    assert len(shown[0]) == 8
    assert shown[0][-1] - shown[0][0] > 20
    assert all(called.shape == (48, 64) for called in segment._called.values())


def test_the_loss_is_over_the_pixels_that_count(tmp_path):
    targets = torch.tensor([[[0, 1, -100, -100]]])
    logits = torch.tensor([[[[2.0, 0.0, 9.0, 9.0]], [[0.0, 0.0, -9.0, -9.0]]]])
    expected = (np.log(1 + np.exp(-2.0)) + np.log(2.0)) / 2
    assert task().loss(logits, targets, 0.0).item() == pytest.approx(expected)
    assert task().loss((logits, logits), targets, 0.0).item() == pytest.approx(1.4 * expected)
    assert task().loss(logits, torch.full_like(targets, -100), 0.0).item() == 0


def test_statistics_of_the_decoder_are_saved_with_it(tmp_path):
    spec, method = network(), LinearProbe("linear_probe")
    trained = method.apply(spec.build(3), spec.classifier).model
    trained(torch.randn(2, 3, 64, 64))  # moves them
    method.save(trained, tmp_path)
    again = load(spec.build(3), spec.classifier, tmp_path).model
    for name, buffer in trained.named_buffers():
        if not name.startswith("backbone."):
            assert torch.equal(again.get_buffer(name), buffer), name


def test_classes_have_colours_of_their_own():
    assert len(np.unique(palette(150), axis=0)) == 150


def trained(folder, data, workers=0, **settings):
    """A run of three epochs of three steps with the decoder alone."""
    segment, spec = task(), network()
    options = {"epochs": 3, "lr": 1e-2, "batch_size": 2, "num_workers": workers, "device": "cpu", **settings}
    splits = segment.load_for(spec, data)
    method = LinearProbe("linear_probe")
    return Run(
        segment, spec, method, TrainerSettings(**options), Protocol("holdout", "best", "train"), splits, 0, folder
    )


def state(outcome):
    return {name: tensor.numpy().tobytes() for name, tensor in outcome.adapted.model.state_dict().items()}


def test_runs_are_bit_equal_whoever_reads_the_images_and_wherever_they_were_resumed(tmp_path):
    write_camvid(tmp_path / "data")
    for name in "0123":
        (tmp_path / name).mkdir()
    calm = trained(tmp_path / "0", tmp_path / "data").train()
    assert state(trained(tmp_path / "1", tmp_path / "data", 2).train()) == state(calm)

    class Killed(BaseException):
        pass

    def kill(callback, args, state, control, **kwargs):
        if state.global_step == 5:  # within the second epoch
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flora.training.callbacks.StepMeter.on_step_end", kill, raising=False)
        with pytest.raises(Killed):
            trained(tmp_path / "2", tmp_path / "data", 2, checkpoint_every=1).train()
    resumed = trained(tmp_path / "2", tmp_path / "data", 2, checkpoint_every=1).train()
    assert resumed.trainer.resumed_at == [4]
    assert state(resumed) == state(calm)
    assert resumed.metrics == calm.metrics


def scored(data, size):
    """Test metrics of a random network in one of several processes."""
    segment, spec = task(unreadable="skip"), network()
    torch.manual_seed(0)
    module = spec.build(11)
    return evaluate(module, spec, segment, segment.load_for(spec, data).test, size, "cpu")


@pytest.mark.dist
def test_two_processes_count_each_image_once(tmp_path):
    write_camvid(tmp_path / "data", {"train": 2, "validation": 2, "test": 5})  # the last batch is of one process
    alone = scored(tmp_path / "data", 2)
    for metrics in together(tmp_path / "said", scored, tmp_path / "data", 2):
        assert {k: v for k, v in metrics.items() if k != "loss"} == {k: v for k, v in alone.items() if k != "loss"}
        assert metrics["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def steps(data, place):
    """An epoch in one of several processes: what of the decoder it has learnt, and how it is scored."""
    outcome = trained(place, data, epochs=1, batch_size=10).train()
    decoder = outcome.adapted.model.decode_head
    return decoder.classifier.weight.tolist(), outcome.metrics


@pytest.mark.dist
def test_two_processes_train_on_uneven_parts_and_agree(tmp_path):
    write_camvid(tmp_path / "data", {"train": 15, "validation": 3, "test": 5})  # the last batch is of two and three
    (tmp_path / "run").mkdir()

    one, other = together(tmp_path / "said", steps, tmp_path / "data", tmp_path / "run")

    assert one == other
