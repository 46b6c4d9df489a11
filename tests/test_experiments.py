"""Every file of configs/experiment runs two steps, without a network, on its own architecture made tiny and random."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import train
from flora.config import instantiate
from flora.launch.entry import main
from flora.methods import LinearProbe
from flora.tasks.commonsense.questions import EIGHT
from flora.tasks.oriented import rendered
from tests.tasks.chats import architecture, vicuna_and_clip, vicuna_tokenizer
from tests.tasks.conftest import png
from tests.tasks.detect.made import squares, write_coco, write_parquet
from tests.tasks.oriented.made import scenes, write_dota, write_photographs
from tests.tasks.segment.made import write_ade20k, write_camvid
from tests.tasks.texts import SPECIAL, WORDS, word_tokenizer, write_rows

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml"))
# One of each family, to save seconds.
EVALUATED = (
    "glue_minilm",
    "commonsense_llama_7b",
    "cifar10_convnext",
    "camvid_convnext",
    "bccd_convnext",
    "llava_1_5_7b",
)
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
STAND_INS = {"flora.models.minilm_l6": "bert_large", "flora.models.smollm2_135m": "llama_7b"}


def composed(name):
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        return compose("train", [f"experiment={name}"])


def tiny(model, folder):
    """Overrides that make a model small and random."""
    if "language_weights" in model and "architecture" in model:
        parts = vicuna_and_clip(folder / "parts")
        sizes = {key: value for key, value in parts.pop("architecture").items() if key.endswith("_config")}
        changed = [f"++model.architecture.{p}.{k}={v}" for p, inner in sizes.items() for k, v in inner.items()]
        return [*changed, *(f"model.{key}={place}" for key, place in parts.items())]
    if "llava" in model.get("name", model._target_):
        vicuna_tokenizer().save_pretrained(folder / "tokenizer")
        parts = {key: sizes for key, sizes in architecture(grid=False).items() if key.endswith("_config")}
        changed = [f"++model.architecture.{p}.{k}={v}" for p, sizes in parts.items() for k, v in sizes.items()]
        changed += ["++model.architecture.image_token_index=4", f"model.tokenizer={folder / 'tokenizer'}"]
        return ["model=llava_1_5_7b", "model.pretrained=false", *changed]
    if "hidden_size" not in model.get("architecture", {}) and model._target_ not in STAND_INS:
        return ["model=timm", "model.timm_name=test_convnext", "model.image_size=32", "model.pretrained=false"]
    sizes = SIZES | {"vocab_size": len(SPECIAL + WORDS)}
    if "num_key_value_heads" in model.get("architecture", {}) or model._target_ in STAND_INS:
        sizes |= {"num_key_value_heads": 1}
    if "pooler_hidden_size" in model.get("architecture", {}):
        sizes |= {"pooler_hidden_size": 8}
    name = STAND_INS.get(model._target_, model.get("name"))
    changed = [f"++model.architecture.{key}={value}" for key, value in sizes.items()]
    word_tokenizer().save_pretrained(folder / "tokenizer")
    return [f"model={name}", "model.pretrained=false", f"model.tokenizer={folder / 'tokenizer'}", *changed]


def write_data(task, folder):
    """A few rows where the task looks for them."""
    words = np.random.RandomState(0).choice(WORDS, (40, 3))
    sentences = [" ".join(row) for row in words]
    labels = [i % 2 for i in range(40)]
    if task.name == "glue":
        pair = {"sentence1": sentences, "sentence2": sentences[::-1], "label": labels}
        for split in ("train", "validation"):
            write_rows(folder / "glue" / task.dataset / f"{split}.parquet", pair)
    if task.name == "imagefolder":
        for split in ("train", "val"):
            for name in range(task.classes if task.classes < 20 else 20):
                for number in range(3):
                    path = folder / task.dataset / split / f"class {name:02d}" / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(png(name))
    if task.name == "segment":
        write_camvid(folder) if task.dataset == "camvid" else write_ade20k(folder)
    if task.name == "detect" and task.dataset == "coco":
        (folder / "coco").mkdir(parents=True)
        for number, split in enumerate(("train2017", "val2017")):
            write_coco(folder / "coco", split, squares(number, 12))
    elif task.name == "detect":
        for number, split in enumerate(("train", "validation", "test")):
            write_parquet(folder / task.dataset / f"{split}.parquet", squares(number, 6))
    if task.name == "oriented" and task.dataset == "rendered":
        write_photographs(folder / "rsscn7")
    elif task.name == "oriented":
        for number, split in enumerate(("train", "val")):
            write_dota(folder / task.dataset, split, scenes(number, 6))
    if task.name == "commonsense":
        for split in ("train", "validation"):
            write_rows(folder / "sst2" / f"{split}.parquet", {"sentence": sentences, "label": labels})
        instruction = "true or false?\n\nAnswer format: true/false"
        mix = [{"instruction": instruction, "answer": ("true", "false")[i % 2]} for i in range(140)]
        (folder / "commonsense_170k.json").write_text(json.dumps(mix))
        for name in EIGHT:
            (folder / name).mkdir()
            (folder / name / "test.json").write_text(json.dumps(mix[:1]))

    if task.name == "instruct" and task.dataset.startswith("llava"):
        write_conversations(folder / task.dataset)
    elif task.name == "instruct":
        for split, start in (("train", 0), ("test", 20)):
            cells = [{"bytes": png(start + i % 10), "path": None} for i in range(40)]
            asked = {"image": cells, "question": ["what color is it?"] * 40, "answer": ["red", "yes"] * 20}
            stated = {"image": cells, "sentence": ["it is red"] * 40, "label": labels}
            write_rows(folder / task.dataset / f"{split}.parquet", stated if task.dataset == "nlvr" else asked)


def write_conversations(folder):
    """LLaVA's JSON of 40 conversations about ten images, some about none."""
    (folder / "images").mkdir(parents=True)
    for number in range(10):
        (folder / "images" / f"{number}.png").write_bytes(png(number))
    rows = []
    for number in range(40):
        shown = {"image": f"{number % 10}.png"} if number % 5 or folder.name == "llava_pretrain" else {}
        question = ("<image>\n" if shown else "") + "what color is it?"
        said = [{"from": "human", "value": question}, {"from": "gpt", "value": ("red", "yes")[number % 2]}]
        rows.append({"id": str(number), "conversations": said} | shown)
    (folder / "train.json").write_text(json.dumps(rows))


def record_of(out):
    return json.loads(Path(out.strip().splitlines()[-1].removeprefix("record: ")).read_text())


def save_projector(overrides, folder):
    """What stage 1 leaves, untrained."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        spec = instantiate(compose("train", [*overrides, "model.projector=null"]).model)
    LinearProbe("linear_probe").save(LinearProbe("linear_probe").apply(spec.build(0), spec.classifier).model, folder)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_two_steps_and_leaves_its_record(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    cfg = composed(name)
    write_data(cfg.task, tmp_path / "data")
    small = ["trainer.max_steps=2", "trainer.batch_size=4", "trainer.max_eval_examples=8", "trainer.device=cpu"]
    if cfg.task.name == "commonsense":
        small += ["task.validation_size=4"]
    if cfg.task.name == "instruct":
        small += ["task.validation_size=4", "task.max_new_tokens=4", "trainer.gradient_accumulation=2"]
    if cfg.task.name == "segment":
        small += ["task.size=48", "task.crop=32", "task.hidden_size=8", "task.held_out=0.2", "trainer.num_workers=0"]
    if cfg.task.name == "detect":
        small += ["task.short_sides=[48,64]", "task.longest_side=96", "task.channels=8", "task.hidden=8"]
        small += ["task.held_out=0.2", "trainer.num_workers=0"]
    if cfg.task.name == "oriented":
        monkeypatch.setattr(rendered, "COUNTS", {"train": 4, "validation": 3, "test": 3})
        small += ["task.tile=64", "task.overlap=16", "task.seen=[64]", "task.channels=8", "task.hidden=8"]
        small += ["task.proposals=50", "task.regions=32", "task.at_once=20"]
        small += ["task.held_out=0.3", "trainer.num_workers=0"]
    if cfg.task.name == "imagefolder":
        small += ["task.classes=null", "trainer.gradient_accumulation=1", "task.held_out=0.2"]
    places = ["paths.data=data", "paths.output=outputs", "paths.results=results", "logger=none"]
    ranks = ["adapter.r=2"] if "r" in cfg.adapter else []
    overrides = [f"experiment={name}", *tiny(cfg.model, tmp_path), *ranks, *small, *places]
    if OmegaConf.is_missing(cfg.model, "projector"):
        save_projector(overrides, tmp_path / "stage_1")
        overrides.append(f"model.projector={tmp_path / 'stage_1'}")
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
    main(train.job, trace=lambda: True)
    record = record_of(capsys.readouterr().out)
    assert record["status"] == "finished"
    assert (record["task"], record["dataset"], record["adapter"]) == (cfg.task.name, cfg.task.dataset, cfg.adapter.name)
    assert record["protocol"] == cfg.protocol.name
    assert (record["trainable_params"] > 0) == (cfg.adapter.name != "linear_probe")
    if cfg.task.dataset == "all":
        assert record["metrics"].keys() >= {f"{name}_accuracy" for name in EIGHT}
    assert record["split"] == ("validation" if cfg.protocol.name == "glue_paper" else "test")
    assert record["config"]["trainer"]["lr"] == cfg.trainer.lr
    assert len(record["history"]) >= 1

    if name not in EVALUATED:
        return
    again = [*overrides, "mode=eval", f"checkpoint={record['adapter_path']}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *again])
    main(train.job, trace=lambda: True)
    evaluated = record_of(capsys.readouterr().out)
    assert evaluated["mode"] == "eval"
    assert evaluated["metrics"] == record["metrics"], "the base is random but seeded, so that it is the same again"
