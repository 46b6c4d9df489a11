"""Every block of the README and of docs/ is run here: as it stands, or with the changes that the tables below list.

A ``sh`` block is a list of commands. ``python train.py`` runs in this process with SHORT appended, in a folder that
holds small stand-ins for the data, and RUN_ID is a run that was made there. Scripts run with what APPENDED says. What
needs more than a test machine has (GPUs, a hub, minutes) is only composed or parsed; ELSEWHERE lists it with the
reason. A command that is in no table runs as it stands, and an entry that no page needs fails. ``python`` blocks run as
they stand. ``yaml`` blocks and ``python`` blocks that begin with a path are files that the commands after them use.
"""

import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN = ROOT / "docs" / "extending.md"  # its files go to a copy of the house

# What every `python train.py` gets: two steps, twenty examples, no GPU.
SHORT = ("trainer.max_steps=2", "trainer.max_eval_examples=20", "trainer.batch_size=8", "trainer.device=cpu")

# Further words for single commands, which come last and win; the rest of the command stays as it stands.
APPENDED = {
    "python train.py model=timm model.timm_name=resnet18 model.pretrained=false": ["model.image_size=32"],
    "python scripts/prepare_data.py eurosat glue/rte": ["--from", "datasets"],  # instead of a download
    "python scripts/prepare_data.py eurosat --from /mnt/datasets --data data": ["--from", "datasets"],
    "python scripts/prepare_data.py easy_vqa": ["--from", "datasets"],
    "python scripts/reproduce.py vtab --jobs 2": ["--dry-run"],  # 650 runs
    "python scripts/reproduce.py table3_glue --only adapter=lora,flora --only seed=0": ["--dry-run"],
    "python scripts/make_tables.py vtab --results results/measured --results outputs/records": [
        *("--results", str(ROOT / "results" / "measured"))  # records of the repository
    ],
    "python scripts/bench_step.py --model resnet50 --batch 64 --methods floor,full,lora,flora": [
        *["--device", "cpu", "--size", "32", "--batch", "2", "--rounds", "1", "--steps", "1", "--warmup", "0"]
    ],
    "python scripts/bench_step.py --model llama_7b --gradient-checkpointing --quantize nf4 --methods floor,lora,flora"
    " --stay": ["--help"],  # 7B parameters
    "python scripts/bench_start.py --model convnext --batches 8": ["--batches", "1", "--batch", "2", "--device", "cpu"],
    "python train.py task=digits adapter=flora_gradient": [
        *("adapter.gradient.batches=2", "adapter.gradient.head_steps=2")
    ],
    "python scripts/bench_infer.py --model convnext --batch 64": [
        *["--device", "cpu", "--batch", "2", "--rounds", "1", "--steps", "1", "--no-export"]
    ],
    "python scripts/bench_train.py --model convnext --batch 256 --size 64": [
        *["--device", "cpu", "--batch", "8", "--rounds", "1", "--steps", "1", "--warmup", "1"]
    ],
    "python scripts/bench_dense.py --task segment --model convnext --batch 16 --trainer num_workers=12": [
        *["--device", "cpu", "--batch", "2", "--size", "64", "--width", "8", "--images", "100"],
        *["--rounds", "1", "--steps", "1", "--warmup", "1", "--trainer", "num_workers=0"],
    ],
    "python scripts/export.py outputs/RUN_ID model.onnx --to program": ["--help"],  # see tests/models/test_programs.py
    "python scripts/bench_end_to_end.py --workload convnext_64 --data data": [
        *["--device", "cpu", "--batch", "4", "--steps", "4", "--rounds", "1", "--test", "4", "--workers", "0"],
        *["--size", "32", "--contenders", "flora,timm"],
    ],
    "wandb sync outputs/RUN_ID/wandb": ["--dry-run"],
}

# Words of commands whose RUN_ID is a run with adapter=full.
OF_FULL = ("analyze_delta.py", "--from checkpoint")

# Commands that take more than a few seconds even so: run in slow tests.
SLOW = {
    "python scripts/analyze_delta.py outputs/RUN_ID",
    "python scripts/export.py outputs/RUN_ID model.pt2 --to program --live",
    "python scripts/make_tables.py",
    "python scripts/make_tables.py --check",
    "python scripts/runs.py --page",
    "python scripts/make_tables.py step_cost",
    "python scripts/make_tables.py vtab --results results/measured --results outputs/records",
    "python scripts/bench_train.py --model convnext --batch 256 --size 64",
    "python scripts/bench_end_to_end.py --workload convnext_64 --data data",
    "python scripts/bench_dense.py --task segment --model convnext --batch 16 --trainer num_workers=12",
    "python scripts/bench_step.py --model resnet50 --batch 64 --methods floor,full,lora,flora",
    "python train.py task=digits adapter.budget=100k adapter.allocation=proportional",
    "python train.py task=digits protocol.lr_grid=[3e-4,1e-3,3e-3]",
    "python train.py -m task=digits adapter=flora,lora seed=0,1",
    "python train.py -m seed=0,1 hydra/launcher=joblib hydra.launcher.n_jobs=2",
    "python train.py -m seed=0,1 launcher=gpu_pool",
    "torchrun --nproc-per-node 2 train.py task=digits trainer.device=cpu",
}

# Commands that cannot run here, with the reason; what of them is tested says their first word (see `elsewhere`).
ELSEWHERE = {
    "python -m venv .venv && . .venv/bin/activate": "a shell's line; run by bash",
    "pip install -e .[suite]": "needs the package index; the tests run in what it made",
    "make demo": "minutes; printed by make -n",
    "python train.py task=glue task.dataset=rte": "weights of a package",
    "python train.py task=commonsense task.dataset=boolq": "weights of a package",
    "python train.py task=instruct task.dataset=easy_vqa adapter=linear_probe trainer.max_steps=80"
    " trainer.max_eval_examples=400": "weights of packages",
    "python train.py task=instruct task.dataset=easy_vqa adapter=flora trainer.lr=1e-3 model.projector=outputs/RUN_ID"
    " trainer.max_steps=300 trainer.max_eval_examples=400": "weights of packages",
    "python train.py experiment=llava_1_5_7b_stage1": "LLaVA's data and 7B weights",
    "python train.py experiment=llava_1_5_7b_lora model.projector=outputs/STAGE_1": "LLaVA's data and 7B weights",
    "python train.py experiment=llava_1_5_7b_lora adapter=dora model.projector=outputs/STAGE_1": (
        "LLaVA's data and 7B weights"
    ),
    "python train.py experiment=llava_1_5_7b model.projector=outputs/STAGE_1": "LLaVA's data and 7B weights",
    "python train.py mode=eval checkpoint=outputs/RUN_ID task.dataset=pope": "a run of a model that sees",
    "python train.py task=text task.dataset=reviews.csv": "weights of a package",
    "python train.py task=text task.dataset=reviews.csv task.text=comment task.label=stars task.kind=regression": (
        "weights of a package"
    ),
    "python train.py task=text task.dataset=pairs task.text=first task.text_pair=second task.metric=macro_f1": (
        "weights of a package"
    ),
    "python train.py task=text task.dataset=reviews.csv model=smollm2_135m": "weights of a package",
    "python train.py task=instruct task.dataset=scans": "weights of packages",
    "python train.py task=instruct task.dataset=scans task.images=images task.metric=any_match": "weights of packages",
    "python train.py task=instruct task.dataset=scans task.question=question task.answer=answer task.unreadable=skip": (
        "weights of packages"
    ),
    "python train.py task=digits logger.mode=online": "a W&B server",
    "python train.py -m hydra/sweeper=search task=digits": "optuna",
    "python train.py trainer.compile=true": "a compiler, and minutes",
    "python train.py -m seed=0,1 hydra/launcher=submitit_slurm": "Slurm",
    "python train.py -m hydra/launcher=submitit_slurm hydra.launcher.tasks_per_node=2 hydra.launcher.gpus_per_node=2": (
        "Slurm"
    ),
    "torchrun --nproc-per-node 2 train.py task=vtab trainer=ddp": "two GPUs",
    "torchrun --nproc-per-node 2 train.py task=vtab trainer=fsdp": "two GPUs",
    "accelerate launch --num_processes 2 train.py task=vtab": "two GPUs",
    "python scripts/make_tables.py": "would write to the repository; checked instead",
    "python scripts/make_tables.py --check": "of the repository, not of the stand-ins",
    "python scripts/make_tables.py step_cost": "would write to the repository; checked instead",
    "python scripts/make_tables.py claims": "minutes; its options are parsed",
}


@dataclass(frozen=True)
class Block:
    """Of a page, with the line where it starts."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self):
        """The path that it is the content of, if its first line is one."""
        first = re.match(r"# ([\w/]+\.(?:py|yaml))\n", self.text)
        return first[1] if first else None

    @property
    def commands(self):
        """Of a shell block, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.join(shlex.split(line, comments=True)).replace("'", ""))]


def blocks():
    fenced = []
    for page in PAGES:
        for fence in re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S):
            line = page.read_text()[: fence.start()].count("\n") + 1
            fenced.append(Block(page, line, fence[1], fence[2]))
    return fenced


BLOCKS = blocks()
COMMANDS = {c: b for b in BLOCKS if b.language == "sh" and b.page != OWN for c in b.commands}
PYTHON = [b for b in BLOCKS if b.language == "python" and not b.file]


def test_every_block_is_of_a_language_that_is_tested_and_every_entry_is_needed():
    assert {b.language for b in BLOCKS} <= {"sh", "python", "yaml", "text"}
    assert all(b.file and b.page == OWN for b in BLOCKS if b.language == "yaml")
    assert set(APPENDED) | SLOW | set(ELSEWHERE) <= set(COMMANDS)


def png(number):
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (number % 256, 7, 7)).save(stream, "PNG")
    return stream.getvalue()


def write_data(folder):
    """Small stand-ins: EuroSAT, RTE and easy-VQA as prepare_data.py reads them, and a folder of pictures."""
    cells = [{"bytes": png(i), "path": None} for i in range(40)]
    schema = Features(image=ImageFeature(), label=ClassLabel(names=[f"class {c}" for c in range(10)])).arrow_schema
    pictures = pa.table({"image": cells, "label": [i % 10 for i in range(40)]}, schema=schema)
    sentences = [f"sentence {i}" for i in range(40)]
    pairs = pa.table({"sentence1": sentences, "sentence2": sentences, "label": [i % 2 for i in range(40)]})
    asked = pa.table({"image": cells, "question": ["what colour is it?"] * 40, "answer": ["red", "blue"] * 20})
    splits = ("train", "validation", "test")
    for name, table in {"eurosat": pictures, "glue/rte": pairs, "easy_vqa": asked}.items():
        (folder / "datasets" / name).mkdir(parents=True)
        for split in splits:
            if (name, split) not in (("easy_vqa", "validation"), ("glue/rte", "test")):
                pq.write_table(table, folder / "datasets" / name / f"{split}.parquet")
    shutil.copytree(folder / "datasets" / "eurosat", folder / "data" / "eurosat")
    for number in range(40):
        path = folder / "data/animals" / ("train", "val")[number % 2] / ("cat", "dog")[number // 20] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
        path = folder / "data/flowers" / ("rose", "tulip")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    (folder / "photo.jpg").write_bytes(png(0))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and two finished runs, of adapter=flora (logged by W&B) and of adapter=full."""
    folder = tmp_path_factory.mktemp("docs")
    write_data(folder)
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for method, logger in {"flora": "wandb", "full": "none"}.items():
            words = ("python", "train.py", f"adapter={method}", f"logger={logger}", *SHORT)
            before = set(Path("outputs/records").glob("*.json"))
            assert run(patch, words) == 0
            (record,) = set(Path("outputs/records").glob("*.json")) - before
            made[method] = json.loads(record.read_text())["run_id"]
    return folder, made


def each(commands):
    """A test for each command, under its own words."""
    marked = [pytest.param(c, id=c, marks=[pytest.mark.slow] if c in SLOW else []) for c in commands]
    return pytest.mark.parametrize("command", marked)


def run(patch, words, appended=()):
    """The exit code of `python FILE WORDS` in this process."""
    patch.setattr("flora.launch.sweep._folder", None)
    patch.setattr(sys, "argv", [*words[1:], *appended])
    try:
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def shortened(command, runs):
    """The words of a command and what is appended, as the tables say."""
    chosen = runs["full" if any(word in command for word in OF_FULL) else "flora"]
    words = command.replace("RUN_ID", chosen).split()
    appended = list(APPENDED.get(command, ()))
    if " train.py" in command and not {"--help", "--cfg"} & set(words):
        appended = [*SHORT, *([] if "logger=" in command else ["logger=none"]), *appended]
    return words, appended


@each([c for c in COMMANDS if c not in ELSEWHERE])
def test_a_command_runs(command, place, monkeypatch, capsys):
    folder, runs = place
    monkeypatch.chdir(folder)
    words, appended = shortened(command, runs)
    if words[0] != "python" or "launcher=" in command:
        program = [str(Path(sys.executable).parent / words[0]), *words[1:], *appended]
        program = [str(ROOT / w) if (ROOT / w).is_file() and w.endswith(".py") else w for w in program]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        ended = subprocess.run(program, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
        assert ended.returncode == 0, ended.stderr
        return
    code = run(monkeypatch, words, appended)
    out, err = capsys.readouterr()
    assert code == 0, err
    if words[1] == "train.py" and appended and "-m" not in words:
        assert out.splitlines()[-1].startswith("predictions: " if "mode=predict" in words else "record: ")


@each(ELSEWHERE)
def test_a_command_that_cannot_run_here_is_well_formed(command, place, monkeypatch, capsys):
    folder, _ = place
    words = command.split()
    if words[1] == "-m":
        monkeypatch.chdir(folder)
        line = f"{command.replace('venv .venv', 'venv --without-pip .venv')} && which python"
        made = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
        assert made.stdout.strip() == str(folder / ".venv/bin/python")
    elif words[0] == "pip":
        assert (ROOT / "pyproject.toml").is_file()
    elif words[0] == "make":
        if shutil.which("make") is None:
            pytest.skip("no make")
        printed = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
        assert "scripts/reproduce.py demo" in printed.stdout
    elif "make_tables.py" in command:
        monkeypatch.chdir(ROOT)
        code = run(monkeypatch, words, ["--help"] if words[-1] == "claims" else ["--check"])
        assert code == 0, capsys.readouterr().err
    else:
        monkeypatch.chdir(folder)
        if "submitit" in command:
            pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
        overrides = [w.split(",")[0] for w in composable(words)]
        code = run(monkeypatch, ["python", "train.py", *overrides, "--cfg", "job"])
        assert code == 0, capsys.readouterr().err


def composable(words):
    """The overrides of a launched `train.py`, whose launcher's own options are parsed on the way."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words[1:])
        assert parsed.nproc_per_node == "2"
        return parsed.training_script_args
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        parsed = launch_command_parser().parse_args(words[2:])
        assert parsed.num_processes == 2
        return parsed.training_script_args
    return [w for w in words[2:] if w != "-m"]


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_a_python_block_runs(block, place, monkeypatch):
    folder, runs = place
    monkeypatch.chdir(folder)
    text = block.text.replace("RUN_ID", runs["flora"])
    exec(compile(text, str(block), "exec"), {"__name__": "pasted"})


# Each word for word a command of docs/extending.md; they run in one process, to import once.
DRIVER = """
import runpy, sys
for words in {commands!r}:
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"{{' '.join(words)}}: exit code {{end.code}}")
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of the house with the files of docs/extending.md in it."""
    folder = tmp_path_factory.mktemp("house")
    for name in ("flora", "configs", "scripts", "experiments", "results/reported", "train.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    for block in BLOCKS:
        if block.file:
            assert not (folder / block.file).exists()
            (folder / block.file).parent.mkdir(exist_ok=True)
            (folder / block.file).write_text(block.text)
    return folder


def drive(house, commands):
    program = DRIVER.format(commands=[command.split()[1:] for command in commands])
    environment = os.environ | {"PYTHONPATH": str(house)}
    ended = subprocess.run([sys.executable, "-c", program], cwd=house, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended


def own(word):
    """The commands of docs/extending.md about one file, shortened."""
    commands = [c for b in BLOCKS if b.page == OWN and b.language == "sh" for c in b.commands]
    chosen = [c for c in commands if word in c]
    return [" ".join([c, *SHORT, "logger=none"]) if "train.py" in c else c for c in chosen]


def test_the_task_model_and_methods_of_the_examples_run(house):
    commands = [
        c for c in own("python") if "scripts/make_tables" not in c and "reproduce.py stripes --results" not in c
    ]
    ended = drive(house, commands)
    assert ended.stdout.count("record: ") == sum("train.py" in c for c in commands) >= 6
    assert "stripes: 0 of 6 cells finished, 6 missing" in ended.stderr
    records = [json.loads(path.read_text()) for path in (house / "outputs/records").glob("*.json")]
    assert {"stripes", "digits"} == {record["task"] for record in records}
    assert {"flora", "hra", "partial"} == {record["adapter"] for record in records}
    assert {"convnext", "resnet10t", "patches", "Grid"} == {record["model"] for record in records}


@pytest.mark.slow
def test_the_table_of_the_examples_is_filled_and_rendered(house):
    ended = drive(house, [c for c in own("stripes") if "scripts" in c])
    assert "stripes" in ended.stdout
    lines = (house / "outputs/stripes/tables/stripes.md").read_text().splitlines()
    assert sum("(n = 2)" in line for line in lines) == 3
