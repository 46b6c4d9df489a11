"""Tables at the published scale: every one is planned, and a cell of each family runs on stand-ins in local folders.

The stand-ins are random networks of the cell's architecture, tiny, with a tokenizer, saved as a user would have them.
"""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import save_file

import train
from flora.config import composed, instantiate, recorded_cell
from flora.launch.entry import main
from flora.results.cells import OUTPUTS, Cell, load, names, scales
from scripts import reproduce
from tests.tasks.conftest import png
from tests.tasks.texts import write_rows
from tests.tasks.vqa.test_benchmarks import pope
from tests.test_experiments import tiny, write_conversations, write_data

PAPER = [name for name in names() if "paper" in scales(name)]
SMALL = [
    "trainer.max_steps=2",
    "trainer.batch_size=4",
    "trainer.gradient_accumulation=1",
    "trainer.max_eval_examples=8",
]
SMALL += ["trainer.device=cpu", "adapter.r=2", "logger=none"]
DETECTOR = ["task.short_sides=[48,64]", "task.longest_side=96", "task.channels=8", "task.hidden=8"]
DETECTOR += ["task.held_out=0.2", "trainer.num_workers=0"]
SEGMENTER = ["task.size=48", "task.crop=32", "task.hidden_size=8", "task.held_out=0.2", "trainer.num_workers=0"]
PLACES = ["paths.data=data", "paths.output=outputs", "paths.results=results"]


@pytest.mark.parametrize("name", PAPER)
def test_every_table_is_planned_at_paper_scale(name, script, tmp_path):
    entry = partial(main, reproduce.reproduce, trace=lambda: False)
    cells = [cell for cell in load(name, "paper").cells if (cell.seed, cell.method) == (0, "flora")]
    assert cells
    only = [f"--only={key}" for key in ("seed=0", "adapter=flora") if key.partition("=")[0] in cells[0].settings]
    code, out, err = script(entry, "reproduce.py", name, "--scale=paper", "--dry-run", *only, "--results", tmp_path)
    assert code == 0, err
    lines = [line for line in out.splitlines() if "adapter=linear_probe" not in line]  # a stage before
    assert len(lines) == len([cell for cell in cells if not cell.not_runnable_yet])
    assert all(line.startswith("python train.py ") and f"paths.results={tmp_path}" in line for line in lines)


@pytest.fixture
def ran(tmp_path, monkeypatch, capsys):
    """``python train.py OVERRIDES`` in an empty folder, in this process: its record."""
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(*overrides):
        monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
        main(train.job, trace=lambda: True)
        return json.loads(Path(capsys.readouterr().out.split()[-1]).read_text())

    return run


def cell_of(table, **settings):
    """The first runnable cell of FLoRA with these settings."""
    wanted = {"adapter": "flora", "seed": "0"} | {key.replace("__", "."): value for key, value in settings.items()}
    cells = [cell for cell in load(table, "paper").cells if not cell.not_runnable_yet]
    return next(cell for cell in cells if wanted.items() <= cell.settings.items())


def stand_in(overrides, folder):
    """Overrides that make a cell's network tiny, with random weights in a folder, and its tokenizer beside them."""
    small = tiny(composed(overrides).model, folder)
    spec = instantiate(composed([*overrides, *small]).model)
    state = {name: tensor.clone().contiguous() for name, tensor in spec.build(7).state_dict().items()}
    place = folder / "tokenizer" if (folder / "tokenizer").exists() else folder
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    weights = place / "model.safetensors" if spec.kind == "image" else place
    return [*(o for o in small if o != "model.pretrained=false"), "model.pretrained=true", f"model.weights={weights}"]


def write_pictures(folder):
    for split, rows in (("train", 30), ("validation", 10), ("test", 10)):
        cells = [{"bytes": png(i), "path": None} for i in range(rows)]
        write_rows(folder / f"{split}.parquet", {"image": cells, "label": [i % 10 for i in range(rows)]})


@pytest.mark.parametrize(
    ("table", "settings", "further"),
    [
        ("table3_glue", {"task__dataset": "rte"}, []),
        ("vtab", {"task__dataset": "eurosat"}, ["protocol.lr_grid=null"]),
        ("classification", {}, ["task.classes=null", "task.held_out=0.2"]),
        ("commonsense", {}, ["task.validation_size=4"]),
        ("table1_convnext", {"task__dataset": "coco", "adapter": "lora_flat"}, DETECTOR),
        ("table1_convnext", {"task__dataset": "ade20k", "adapter": "lora_flat"}, SEGMENTER),
        (
            "table1_convnext",
            {"task__dataset": "ade20k", "adapter": "full"},
            [*SEGMENTER, "trainer.layer_decay_type=single"],
        ),
    ],
)
def test_a_cell_of_each_family_runs_two_steps_on_weights_in_a_local_folder(table, settings, further, tmp_path, ran):
    cell = cell_of(table, **settings)
    cfg = composed(cell.overrides)
    if table == "vtab":
        write_pictures(tmp_path / "data" / cfg.task.dataset)
    else:
        write_data(cfg.task, tmp_path / "data")
    small = [word for word in SMALL if "r" in cfg.adapter or word != "adapter.r=2"]
    overrides = [*cell.overrides, *stand_in(cell.overrides, tmp_path), *small, *further]
    record = ran(*overrides, *PLACES)
    assert (record["status"], record["task"], record["dataset"]) == ("finished", cfg.task.name, cfg.task.dataset)
    assert (record["weights"]["pretrained"], record["weights"]["path"].startswith(str(tmp_path))) == (True, True)
    assert record["protocol"] == cfg.protocol.name
    assert record["trainable_params"] > 0
    assert Cell(tuple(overrides)).cell_id == recorded_cell(record["config"]), "so that a table finds it"


@pytest.mark.parametrize(("dataset", "further"), [("bccd", DETECTOR), ("camvid", SEGMENTER)])
def test_a_cell_of_table_1_on_small_sets_runs_two_steps_at_each_rate(dataset, further, tmp_path, ran):
    """Of scale mini: at a budget, validation chooses a rate, and the grid goes on where the best lies at an edge."""
    cells = [cell for cell in load("table1_convnext").cells if (cell.task, cell.method) == (dataset, "flora")]
    cfg = composed(cells[0].overrides)
    write_data(cfg.task, tmp_path / "data")
    small = [word for word in SMALL if word != "adapter.r=2"]
    overrides = [*cells[0].overrides, *stand_in(cells[0].overrides, tmp_path), *small, *further]
    record = ran(*overrides, *PLACES)
    assert (record["status"], record["dataset"], record["protocol"]) == ("finished", dataset, "holdout")
    assert len(record["selection"]["values"]) >= 2
    assert record["selection"]["chosen"] == record["lr"]
    assert Cell(tuple(overrides)).cell_id == recorded_cell(record["config"])
    assert {cell.settings["adapter.budget"] for cell in cells} == {"match:lora:4", "match:lora:16"}


def test_llava_goes_from_stage_1_to_a_number_of_pope_as_the_cells_of_its_table_say(tmp_path, ran):
    """Stage 1 on captions, stage 2 with LoRA on the mix, then POPE, each cell on what the one before has left."""
    pope_cell = cell_of("table4_llava", task__dataset="pope", adapter="lora")
    started = dict(pope_cell.starts_from)
    stage_1, stage_2 = started["model.projector"], started["checkpoint"]
    assert dict(stage_2.starts_from) == {"model.projector": stage_1}
    for cell in (stage_1, stage_2):
        write_conversations(tmp_path / "data" / cell.settings["task.dataset"])
    pope(tmp_path / "data" / "pope")
    small = [*tiny(composed(stage_1.overrides).model, tmp_path), *SMALL, "task.max_new_tokens=4"]
    small.remove("adapter.r=2")

    def run(cell, **folders):
        """Its record, whose id is that of the cell, with ``outputs/CELL_ID`` for the folders that it starts from."""
        by_id = {f"{OUTPUTS}/{first.cell_id}": folders[key.rpartition(".")[2]] for key, first in cell.starts_from}
        placed, named = list(cell.overrides), list(cell.overrides)
        for number, word in enumerate(cell.overrides):
            key, _, value = word.partition("=")
            if value in by_id:
                placed[number], named[number] = (f"{key}={place}" for place in by_id[value])
        ranks = [] if cell is stage_1 else ["adapter.r=2"]
        record = ran(*placed, *small, *ranks, *PLACES)
        made = Cell((*named, *small, *ranks)).cell_id
        assert made == recorded_cell(record["config"])
        return record, (str(Path(record["adapter_path"]).parent), f"{OUTPUTS}/{made}")

    first, projector = run(stage_1)
    assert (first["adapter"], first["trainable_params"]) == ("linear_probe", 0)
    assert first["config"]["model"]["chat"] == "plain"
    second, checkpoint = run(stage_2, projector=projector)
    assert second["config"]["adapter"]["lora_alpha"] == 256
    assert second["config"]["model"]["projector"] == projector[1]
    tested, _ = run(pope_cell, projector=projector, checkpoint=checkpoint)
    assert (tested["mode"], tested["adapter"], tested["metric"]) == ("eval", "lora", "f1")
    assert {"f1", "accuracy", "random_f1", "popular_f1", "adversarial_f1"} <= tested["metrics"].keys()
    assert tested["execution"]["set_anew"]["task.dataset"] == {"now": "pope", "trained": "llava_instruct"}
    assert tested["data"]["majority"]["questions"] == 7
    with pytest.raises(SystemExit) as ended:
        ran(*stage_1.overrides, *small, *PLACES, "task.dataset=pope")
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("asked", "rate", "projector", "batch", "adapter"),
    [
        (["experiment=llava_1_5_7b_stage1"], 1e-3, 1e-3, 256, {"name": "linear_probe"}),
        (["experiment=llava_1_5_7b_lora"], 2e-4, 2e-5, 128, {"r": 128, "lora_alpha": 256, "lora_dropout": 0.05}),
        (["experiment=llava_1_5_7b_lora", "adapter=dora"], 2e-4, 2e-5, 128, {"lora_alpha": 256, "use_dora": True}),
        (["experiment=llava_1_5_7b"], 2e-4, 2e-5, 128, {"r": 128, "flora_dropout": 0.05}),
    ],
)
def test_llavas_recipes_are_those_of_its_scripts(asked, rate, projector, batch, adapter):
    """scripts/v1_5/pretrain.sh and finetune_lora.sh of haotian-liu/LLaVA @c121f04, and its defaults in train.py."""
    cfg = composed(asked)
    trainer = {"lr": rate, "head_lr": projector, "batch_size": batch, "epochs": 1, "dtype": "bf16"}
    trainer |= {"schedule": "cosine", "warmup_ratio": 0.03, "weight_decay": 0.0, "gradient_checkpointing": True}
    assert {key: cfg.trainer[key] for key in trainer} == trainer
    assert {key: cfg.adapter[key] for key in adapter} == adapter
    stage_1 = "stage1" in asked[0]
    assert cfg.trainer.group_by_modality == (not stage_1)
    assert (cfg.model.chat, cfg.model.aspect) == (("plain", "middle") if stage_1 else ("vicuna", "pad"))
    assert cfg.model.architecture.vision_feature_layer == -2
    assert cfg.model.language_weights.hub == "lmsys/vicuna-7b-v1.5"
    assert cfg.model.vision_weights.hub == "openai/clip-vit-large-patch14-336"
    assert (cfg.task.max_length, cfg.protocol.select) == (2048, "last")
