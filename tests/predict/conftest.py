"""Tiny finished runs: of pictures, of texts and pairs of them, of numbers, of questions about pictures."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

import train
from flora.launch.entry import main
from tests.tasks.chats import architecture, chatml_tokenizer
from tests.tasks.conftest import png
from tests.tasks.imagefolder.folders import photographs
from tests.tasks.texts import WORDS, word_tokenizer, write_rows
from tests.tasks.vqa.questions import write_questions

SHORT = ("trainer.batch_size=4", "trainer.device=cpu", "logger=none")
TIMM = ("model=timm", "model.timm_name=resnet10t", "model.image_size=32", "model.pretrained=false")
BERT = {"model_type": "bert", "vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 12, "max_position_embeddings": 64, "type_vocab_size": 2}
TEXTS = (
    *("task=glue", "model=roberta_base", "model.weights=null", "model.pretrained=false", "model.tokenizer=words"),
    *(f"model.architecture.{key}={value}" for key, value in BERT.items()),
    *("adapter=full", "trainer.max_steps=8", "trainer.eval_batch_size=8", "protocol.lr_grid=null", "trainer.lr=3e-2"),
)
RUNS = {
    "pictures": ("task=imagefolder", "task.dataset=photos", *TIMM, "adapter=flora", "adapter.r=2", "trainer.lr=1e-2"),
    "texts": (*TEXTS, "task.dataset=sst2"),
    "pairs": (*TEXTS, "task.dataset=rte"),
    "numbers": (*TEXTS, "task.dataset=stsb"),
    "questions": (
        *("--config-dir", "conf", "model=tiny", "task=instruct", "task.dataset=pets", "task.validation_size=2"),
        *("task.suffix=yes", "adapter=linear_probe", "trainer.max_steps=2", "trainer.gradient_accumulation=1"),
    ),
}


def write_data():
    """What the runs need, in the working directory."""
    photographs(Path("data/photos"))
    word_tokenizer().save_pretrained("words")
    chatml_tokenizer().save_pretrained("chat")
    chance = np.random.RandomState(0)

    def sentences():
        return [" ".join(chance.choice(WORDS, chance.randint(2, 9))) for _ in range(30)]

    for split in ("train", "validation"):
        labels = {"label": chance.randint(0, 2, 30).tolist()}
        write_rows(Path(f"data/glue/sst2/{split}.parquet"), {"sentence": sentences()} | labels)
        write_rows(
            Path(f"data/glue/rte/{split}.parquet"), {n: sentences() for n in ("sentence1", "sentence2")} | labels
        )
        scores = {"label": (chance.rand(30) * 5).tolist()}
        write_rows(
            Path(f"data/glue/stsb/{split}.parquet"), {n: sentences() for n in ("sentence1", "sentence2")} | scores
        )
    for split in ("train", "test"):
        write_questions(Path("data/pets"), split)
    tiny = {"_target_": "flora.models.Llava", "name": "tiny", "architecture": architecture(), "chat": "chatml"}
    tiny |= {"pretrained": False, "tokenizer": "chat", "image_size": 64, "patch_size": 32, "adapter_targets": "all"}
    Path("conf/model").mkdir(parents=True)
    Path("conf/model/tiny.yaml").write_text(yaml.safe_dump(tiny))
    Path("ask/images").mkdir(parents=True)
    for number, place in enumerate(("ask/images/a.png", "ask/b.png")):
        Path(place).write_bytes(png(number))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder that holds data and each run of RUNS under its name; records by name."""
    place, records = tmp_path_factory.mktemp("finished"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("FLORA_CACHE", str(place / "cache"))
        write_data()
        for name, overrides in RUNS.items():
            patch.setattr(sys, "argv", ["train.py", *overrides, *SHORT, "trainer.epochs=3"])
            known = set(Path("outputs/records").glob("*.json"))
            main(train.job, trace=lambda: True)
            (path,) = set(Path("outputs/records").glob("*.json")) - known
            records[name] = json.loads(path.read_text())
            Path(records[name]["adapter_path"]).parent.rename(name)
    return place, records


@pytest.fixture
def runs(finished, tmp_path, monkeypatch):
    """Records of the runs, which lie with their data in the working directory, a copy."""
    place, records = finished
    shutil.copytree(place, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    return records


@pytest.fixture
def predict(runs, script):
    """Run mode=predict in this process: (exit code, stdout, stderr)."""

    def call(run, *overrides):
        asked = ("mode=predict", f"checkpoint={run}", "trainer.device=cpu", *overrides)
        return script(partial(main, train.job, trace=lambda: False), "train.py", *asked)

    return call
