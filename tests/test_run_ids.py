"""Run ids of measured records and of every method: what was measured stays found, wherever code moves."""

import pytest

from flora.config import cell_id, composed, identity, semantic_config

OWN_HEAD = ["model=efficientnet_lite0", "model.head_init=null"]  # measured with the head that timm draws
VTAB = ["task=vtab", "task.augment=auto"]  # measured with crop and flip; VTAB-1K has neither
GRID = [*VTAB, "protocol.lr_grid=[3e-4,1e-3,3e-3,1e-2]"]  # of tables that are gone
MATCHED = [*GRID, "adapter.budget=match:lora:8"]
ALPHA_16 = [*MATCHED, "adapter.lora_alpha=16"]
FLORA = ["adapter=flora", "adapter.init=orthogonal", "adapter.scale=1.0"]  # the defaults when these ran
GLUE = ["task=glue", "model=minilm_l6", "task.stratify=false"]  # as they were before it was a setting
GLUE_RATES = [*GLUE, "adapter.r=8", "protocol.lr_grid=[2e-4,5e-4,1e-3]"]
BOOLQ = [
    *("task=commonsense", "model=smollm2_135m", "task.passage=true", "trainer.max_steps=500", "task.dataset=boolq"),
    *("protocol=holdout", "trainer.eval_steps=null", "~task.loss_on", "~task.beams"),  # before LLM-Adapters' recipe
]
VQA = ["task=instruct", "model=llava_mini"]
LLAVA = [*VQA, "trainer.max_eval_examples=400"]  # table4_llava
STARTED = [*LLAVA, "model.projector=outputs/d60ac3e0cc8d", "trainer.max_steps=300", "trainer.dtype=bf16"]
INSTRUCT = [
    *(*VQA, "trainer.max_eval_examples=1000", "trainer.dtype=bf16", "model.projector=outputs/67f0c6b33b11"),
    *("trainer.max_steps=300", "protocol.lr_grid=[5e-4,1e-3,2e-3]"),
]

MEASURED = {
    "04254c231c72": [*VTAB, "task.dataset=cifar10", *OWN_HEAD, *FLORA, "seed=0"],
    "0ed77ea1ad5f": [*VTAB, "task.dataset=caltech101", "model=convnext", "adapter=full", "seed=0"],
    "195050655ee6": [*GRID, "task.dataset=eurosat", "adapter=lora", *OWN_HEAD, "seed=2"],
    "26a26d25a9c8": [*GRID, "task.dataset=eurosat", *FLORA, "model=convnext", "seed=1"],
    "5565bea3a100": [*GRID, "task.dataset=eurosat", "adapter=linear_probe", "model=convnext", "seed=1"],
    # one alpha for layers of ranks 7 to 9, which is no longer the default
    "14fd4897e270": [*ALPHA_16, "task.dataset=dsprites_location", "model=convnext", "adapter=dora", "seed=2"],
    "1d12f83d5730": [*MATCHED, "task.dataset=dsprites_location", "model=convnext", *FLORA, "seed=2"],
    "242a650324d5": [*GLUE, "task.dataset=cola", *FLORA, "adapter.r=8", "seed=0"],
    "37df4b079a48": [*GLUE, "trainer.lr=2e-5", "task.dataset=mrpc", "adapter=full", "seed=0"],
    "055a4711ae9c": [*GLUE, "trainer.max_steps=4000", "task.dataset=sst2", "adapter=linear_probe", "seed=1"],
    "37e8bdbf3f16": [*GLUE_RATES, "task.dataset=stsb", *FLORA, "seed=1"],
    "293cca69d488": [*BOOLQ, *FLORA, "seed=2"],
    "cc637c55e377": [*BOOLQ, "adapter=dora", "seed=0"],
    "d60ac3e0cc8d": [*LLAVA, "trainer.max_steps=80", "task.dataset=easy_vqa", "adapter=linear_probe", "seed=0"],
    "1c424ee305f2": [*STARTED, "task.dataset=easy_vqa", "adapter=lora", "trainer.lr=1e-3", "seed=0"],
}
# Measured when NLVR's test still had images of train and validation.
LEAKED = {
    "50b873c6774b": [*STARTED, "task.dataset=nlvr", *FLORA, "trainer.lr=1e-3", "seed=0"],
    "022dc8efdb9a": [*INSTRUCT, "task.dataset=nlvr", "adapter=lora", "seed=2"],
}


@pytest.mark.parametrize("identifier", MEASURED)
def test_a_measured_record_keeps_its_id(identifier):
    assert cell_id(composed(MEASURED[identifier])) == identifier


@pytest.mark.parametrize("identifier", LEAKED)
def test_a_record_of_other_splits_is_of_another_run(identifier):
    semantic = semantic_config(composed(LEAKED[identifier]))
    assert semantic.pop("data_version") == 2
    assert identity(semantic) == identifier
    assert cell_id(composed(LEAKED[identifier])) != identifier


def test_another_start_of_the_head_is_another_run():
    starts = ("null", "zero", "linear")
    made = [cell_id(composed(["model=efficientnet_lite0", f"model.head_init={start}"])) for start in starts]
    assert len(set(made)) == 3
    assert cell_id(composed(["model=efficientnet_lite0"])) in made[1:]
    assert cell_id(composed(["model=resnet"])) == cell_id(composed(["model=resnet", "~model.head_init"]))


# `python train.py adapter=NAME`, as of the first release
METHODS = {
    "adalora": "3e3c3aec307c",
    "bitfit": "8c8140d93846",
    "dora": "8d906d2b8342",
    "dora_flat": "ea08e4e501be",
    "flora": "904771d66faf",  # revised: starts with a zero output factor
    "flora_flat": "3acf625b2769",  # revised: starts with a zero output factor
    "flora_kernelfree": "9c0d8847d67b",  # revised: starts with a zero output factor
    "flora_nocore": "2dbf3b6b9733",
    "flora_shuffled": "0810da553fa0",  # revised: as flora; and before, whole models ran unshuffled
    "full": "b692591c1ff0",
    "houlsby": "2241eac94156",
    "ia3": "88c88be1e332",
    "linear_probe": "c995265583cc",
    "locon_tucker": "009697c2573e",
    "loha": "84625cbb5197",
    "lokr": "67928a49fb6a",
    "lora": "0db422088178",
    "lora_flat": "354ccae22de5",
    "lora_plus": "0b08966f367a",
    "lotr": "2ba2f854ab37",
    "moslora": "15f31405ede0",
    "norm_tuning": "9cd5893eb8b2",
    "oft": "f9386221ba34",  # revised: PEFT's block size, 32; it was 8
    "parallel_adapter": "771d2f23475a",
    "pfeiffer": "bfe2f41c9a49",
    "pissa": "4ba2ac1049c9",
    "rslora": "e8942ff4e726",  # revised: a rate of its own
    "trilora": "b514e58c425f",
    "vpt": "1400d5550e09",
}


def test_every_method_keeps_its_id():
    assert {name: cell_id(composed([f"adapter={name}"])) for name in METHODS} == METHODS


# With the start that was theirs before: the ids of runs from then.
ZERO_CORE = {
    "flora": "b0cd355a89a3",
    "flora_flat": "0c38e7efbec1",
    "flora_kernelfree": "f3a64d4efb97",
    "flora_shuffled": "63085f8abdb0",
}


def test_a_run_from_a_zero_core_keeps_its_id():
    assert {n: cell_id(composed([f"adapter={n}", "adapter.init=orthogonal"])) for n in ZERO_CORE} == ZERO_CORE


def test_a_new_class_counts_by_its_public_name():
    semantic = {"adapter": {"_target_": "flora.methods.Peft", "config_class": "flora.methods.NewConfig", "r": 8}}
    assert identity(semantic) == "636436b315b2"
    former = {"adapter": {**semantic["adapter"], "_target_": "flora.adapters.methods.Peft"}}
    assert identity(former) == identity(semantic)
