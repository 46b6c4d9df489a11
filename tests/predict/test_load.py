"""``flora.load``: a run's network, with its preprocessing and class names, from its folder alone."""

import json
import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import flora
import flora.models
import train
from flora.errors import ConfigError, DataError, WeightsError
from flora.launch.entry import main
from flora.models import programs
from flora.models.weights import name_of
from flora.predict import program
from flora.training import saved
from scripts.export import export
from tests.tasks.conftest import png

PHOTOS = [f"data/photos/val/{name}/{number}.png" for name in ("ant", "bee") for number in range(6)]


def load(run, **options):
    return flora.load(run, device="cpu", **options)


def spoken(run, **changes):
    """Change what a run says of itself."""
    path = Path(run, "adapter", "run.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_three_lines_say_the_class_of_a_picture(runs):
    predictor = load("pictures")
    found = predictor.predict(PHOTOS[0])
    assert found.label in ("ant", "bee") == tuple(predictor.class_names)
    assert found.probability == max(found.probabilities.values())
    assert list(found.probabilities) == ["ant", "bee"]
    assert sum(found.probabilities.values()) == pytest.approx(1)
    many = predictor([PHOTOS[0], Path(PHOTOS[1]), Image.open(PHOTOS[0]), Path(PHOTOS[0]).read_bytes()])
    assert [many[0], many[2], many[3]] == [many[0]] * 3
    assert many[1] != many[0]
    assert predictor.predict([]) == []


def test_predictions_of_the_tests_own_pictures_are_those_of_the_run(runs):
    predictor = load("pictures")
    found = predictor.predict(PHOTOS)
    right = [prediction.label == path.split("/")[-2] for prediction, path in zip(found, PHOTOS, strict=True)]
    assert np.mean(right) == runs["pictures"]["value"]
    test = predictor.task.load_for(predictor.spec, Path("data")).test
    batch = test.__getitems__(range(len(test)))
    with torch.no_grad():
        expected, _ = predictor.task.forward(predictor.spec)(predictor.model, batch, False)
        own = predictor.model(predictor.preprocess(PHOTOS))
    assert torch.equal(own, expected)
    assert np.allclose(predictor.outputs(PHOTOS)[1], expected, atol=1e-6)
    shuffled = PHOTOS[::-2]
    assert [p.label for p in predictor.predict(shuffled)] == [p.label for p in found[::-2]]


@pytest.mark.parametrize(("name", "dataset"), [("texts", "sst2"), ("pairs", "rte"), ("numbers", "stsb")])
def test_predictions_of_the_tests_own_texts_give_its_metrics(runs, name, dataset):
    predictor = load(name)
    rows = pq.read_table(f"data/glue/{dataset}/validation.parquet").to_pydict()
    texts = list(zip(*(rows[column] for column in predictor.task.text_columns), strict=True))
    kept, outputs = predictor.outputs(texts)
    assert kept == list(range(30))
    metrics = predictor.task.metrics().compute(predictions=outputs, references=rows["label"])
    expected = runs[name]["metrics"]
    assert metrics == pytest.approx({key: expected[key] for key in metrics}, abs=1e-6)
    one = predictor.predict(texts[0] if len(texts[0]) > 1 else texts[0][0])
    if name == "numbers":
        assert one.value == pytest.approx(float(outputs[0, 0]), abs=1e-5)
        assert (one.label, one.probabilities) == (None, {})
    else:
        assert one.label == predictor.class_names[outputs[0].argmax()]
    with torch.no_grad():
        logits = predictor.model(**predictor.preprocess(texts)).logits
    assert np.allclose(logits.numpy(), outputs, atol=1e-5)
    assert not list(Path("../cache").rglob("*.safetensors")), "texts of users are not kept"


def test_the_accuracy_of_a_run_can_be_reckoned_from_its_list_of_drawn_examples(runs):
    rows = [line.split(",") for line in Path("pictures/splits.csv").read_text().splitlines()]
    assert rows[0] == ["split", "example"]
    assert {split for split, _ in rows[1:]} == {"train", "validation", "test"}
    assert len({name for _, name in rows[1:]}) == len(rows) - 1 == len(list(Path("data/photos").rglob("*.png")))
    test = [name for split, name in rows[1:] if split == "test"]
    found = load("pictures").predict([f"data/photos/{name}" for name in test])
    right = [prediction.label == Path(name).parent.name for prediction, name in zip(found, test, strict=True)]
    assert np.mean(right) == runs["pictures"]["value"]
    assert not Path("texts/splits.csv").exists(), "files make its splits"


def test_questions_about_pictures_are_answered_as_in_the_test(runs):
    predictor = load("questions")
    splits = predictor.task.load_for(predictor.spec, Path("data"))
    batch = splits.test.__getitems__(range(len(splits.test)))
    with torch.no_grad():
        tokens, _ = predictor.task.forward(predictor.spec)(predictor.model, batch, False)
    expected = [predictor.task.written(predictor.spec, row) for row in tokens.numpy()]
    pictures = [png(number % 4) for number in range(8)]
    asked = [(picture, "what color is it?") for picture in pictures]
    assert [answer.text for answer in predictor.predict(asked)] == expected
    ids = splits.test.rows.__getitems__([0])["input_ids"]
    assert torch.equal(predictor.preprocess(asked[:1])["input_ids"], ids), "with the words after every question"
    assert predictor.predict((Image.open("ask/b.png"), "is it red?")).text is not None


@pytest.mark.parametrize(
    ("run", "given", "message"),
    [
        ("pictures", 3, "input 0 is int: give a path or an image"),
        ("pictures", "nowhere.png", r"^nowhere\.png: no such file$"),
        ("pictures", "data/photos", r"^data/photos is a folder: give its files as a list; mode=predict takes folders$"),
        ("questions", ("nowhere.png", "what is it?"), "no such file"),
        ("texts", Path("a"), "input 0 is PosixPath"),
        ("texts", ("a", "b"), "task=glue takes a text"),
        ("pairs", "a", r"takes \(sentence1, sentence2\), a tuple of texts"),
        ("questions", "what is it?", r"takes \(image, question\)"),
        ("questions", ("ask/b.png", "<image> what?"), "stands for an image"),
    ],
)
def test_inputs_of_another_kind_are_refused(runs, run, given, message):
    with pytest.raises((ConfigError, DataError), match=message):
        load(run).predict([given])


def test_an_unreadable_picture_is_an_error_or_left_out(runs):
    Path("broken.png").write_bytes(Path(PHOTOS[0]).read_bytes()[:60])
    predictor = load("pictures")
    with pytest.raises(DataError, match=r"broken\.png: image cannot be decoded"):
        predictor.predict([PHOTOS[0], "broken.png"])
    predictor.task.unreadable = "skip"
    first, missing, last = predictor.predict([PHOTOS[0], "broken.png", PHOTOS[1]])
    assert missing is None
    for place, message in (("nowhere.png", "no such file"), ("data", "is a folder")):
        with pytest.raises(DataError, match=message):
            predictor.predict([PHOTOS[0], place])
    assert [first, last] == load("pictures").predict(PHOTOS[:2])


def test_random_numbers_of_the_program_stay_as_they_were(runs):
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    load("pictures").predict(PHOTOS[:2])
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_a_run_says_what_it_was_trained_on(runs):
    said = saved.facts(Path("pictures/adapter"))
    assert said["class_names"] == ["ant", "bee"]
    assert said["inputs"]["image_size"] == 32
    assert said["weights"]["pretrained"] is False
    assert said["config"]["seed"] == 0
    card = Path("pictures/adapter/README.md").read_text()
    for words in ("flora.load(", "random, from seed 0", "image size 32", "Classes (2): ant, bee", "mean"):
        assert words in card
    assert "predict(('sentence1', 'sentence2'))" in Path("pairs/adapter/README.md").read_text()
    assert "predict(('photo.jpg', 'what is it?'))" in Path("questions/adapter/README.md").read_text()


def test_other_base_weights_than_the_runs_are_refused(runs, predict, script):
    spec = load("pictures").spec
    save_file(spec.build(2).state_dict(), "w.safetensors")
    trained = ("task=imagefolder", "task.dataset=photos", "model=timm", "model.timm_name=resnet10t")
    trained += ("model.image_size=32", "model.weights=w.safetensors", "adapter=linear_probe", "trainer.max_steps=2")
    call = partial(script, partial(main, train.job, trace=lambda: False), "train.py")
    code, out, err = call(*trained, "trainer.device=cpu", "logger=none", "paths.output=made", "trainer.batch_size=4")
    assert code == 0, err
    (run,) = Path("made").iterdir()
    sha = saved.facts(run / "adapter")["weights"]["sha256"]
    assert sha in (run / "adapter" / "README.md").read_text()
    expected = load(run).predict(PHOTOS[0])
    shutil.move("w.safetensors", "moved.safetensors")
    with pytest.raises(WeightsError, match=r"there is no file w\.safetensors"):
        load(run)
    assert load(run, model={"weights": "moved.safetensors"}).predict(PHOTOS[0]) == expected
    save_file({n: t * 2 if t.ndim > 1 else t for n, t in load_file("moved.safetensors").items()}, "w.safetensors")
    with pytest.raises(WeightsError, match=rf"w\.safetensors has sha256 \w+, but .* with sha256 {sha}: name those"):
        load(run)
    code, out, err = predict(run, f"input={PHOTOS[0]}")
    assert (code, out) == (2, "")
    assert f"trained on weights with sha256 {sha}" in err.splitlines()[-1]


def test_an_adapter_of_peft_names_its_base_weights():
    assert name_of(flora.models.get("convnext").facts) == "convnextv2_atto_tiny_imagenet.safetensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": None}, "does not say how it was trained"),
        ({"class_names": None}, "names no classes"),
        ({"num_classes": 3}, "names no classes"),
        ({"config": 3}, "its config is not that of a run"),
        ({"model": "convnext"}, "was trained on model=convnext"),
    ],
)
def test_what_does_not_say_how_it_was_trained_is_refused(runs, changes, message):
    spoken("pictures", **changes)
    with pytest.raises(ConfigError, match=message):
        load("pictures")


def test_a_folder_without_a_run_is_refused(runs):
    with pytest.raises(ConfigError, match=r"no adapter_model\.safetensors"):
        load("data")


@pytest.fixture
def write(runs, script):
    """Run scripts/export.py --to program in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        entry = partial(main, partial(export, [*map(str, arguments), "--to", "program"]), trace=lambda: False)
        return script(entry, "scripts/export.py")

    return call


@pytest.mark.parametrize("live", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_of_pictures_becomes_a_program(live, write):
    code, out, err = write("pictures", "model.pt2", *["--live"] * live)
    assert code == 0, err
    assert out.startswith("program: model.pt2, logits equal to ")
    predictor = flora.load("pictures", device="cpu")
    images = predictor.preprocess(PHOTOS[:5])
    with torch.no_grad():
        expected = predictor.model(images)
    torch.testing.assert_close(programs.run(Path("model.pt2"), {"images": images}), expected, rtol=1e-4, atol=1e-5)
    assert any("tucker_core" in name for name in torch.export.load("model.pt2").state_dict) == live


@pytest.mark.skipif(torch.__version__ < "2.10", reason="torch loads no program whose sizes of texts vary")
@pytest.mark.parametrize("run", [*(pytest.param(run, marks=pytest.mark.slow) for run in ("texts", "numbers")), "pairs"])
def test_a_run_of_texts_becomes_a_program_for_texts_of_any_length(run, write):
    code, _, err = write(run, "model.pt2")
    assert code == 0, err
    predictor = flora.load(run, device="cpu")
    texts = ["good bad", "good " * 9, "bad"]
    given = predictor.preprocess(texts if run == "texts" else [(text, "bad good") for text in texts])
    with torch.no_grad():
        expected = predictor.model(**given).logits
    torch.testing.assert_close(programs.run(Path("model.pt2"), given), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_become_a_program_is_one_line_and_leaves_nothing(write, monkeypatch):
    Path("there.pt2").write_text("mine")
    for arguments, said in (
        (("pictures", "model.zip"), "a program ends in .onnx or .pt2"),
        (("pictures", "there.pt2"), "there.pt2 is there already"),
        (("pictures", "nowhere/model.pt2"), "there is no folder"),
        (("questions", "model.pt2"), "only classifiers become programs here"),
        (("nosuch", "model.pt2"), "nosuch"),
    ):
        code, out, err = write(*arguments)
        assert (code, out) == (2, ""), arguments
        assert said in err.splitlines()[-1]
    monkeypatch.setattr(program.programs, "run", lambda place, given: torch.zeros(3, 2))
    code, _, err = write("pictures", "model.pt2")
    assert code == 2
    assert "the program's logits differ from the network's by 1.0e+00; not kept" in err
    monkeypatch.setattr(program.programs, "run", lambda place, given: undefined)  # noqa: F821
    code, _, err = write("pictures", "model.pt2")
    assert code == 2
    assert f"what torch {torch.__version__} wrote does not run: name 'undefined' is not defined; not kept" in err
    assert not Path("model.pt2").exists()
    assert Path("there.pt2").read_text() == "mine"
