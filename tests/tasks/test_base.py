"""The contract of a task: which models it accepts, asked before anything is read."""

import pytest

import flora.models
from flora.errors import ConfigError
from flora.models.spec import ImageSpec, ImageTextSpec, TextSpec
from flora.tasks import Commonsense, Digits, Glue, ImageFolder, Instruct, Vtab

# A model of each kind, what it is, and the tasks that accept it.
MODELS = {
    "convnext": (ImageSpec, {"digits", "imagefolder", "vtab"}),
    "minilm_l6": (TextSpec, {"glue"}),
    "smollm2_135m": (TextSpec, {"commonsense"}),
    "llava_mini": (ImageTextSpec, {"instruct"}),
}
TASKS = {
    "commonsense": Commonsense(name="commonsense", dataset="boolq", epochs=1),
    "digits": Digits(name="digits", dataset="digits", epochs=1),
    "glue": Glue(name="glue", dataset="rte", epochs=1, max_length=None, held_out=0),
    "imagefolder": ImageFolder(name="imagefolder", dataset=".", epochs=1),
    "instruct": Instruct(name="instruct", dataset="easy_vqa", epochs=1),
    "vtab": Vtab(name="vtab", dataset="eurosat", epochs=1),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_what_its_kind_promises(name):
    assert isinstance(flora.models.get(name), MODELS[name][0])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("family", TASKS)
def test_a_task_accepts_the_models_that_can_do_it_and_reads_nothing_for_others(family, name, monkeypatch):
    task, model = TASKS[family], flora.models.get(name)
    monkeypatch.setattr(type(task), "read", lambda self, model, data_dir: "splits")
    if family in MODELS[name][1]:
        assert task.load_for(model, None) == "splits"
    else:
        with pytest.raises(ConfigError, match=rf"^model={model.name} .*choose.*$"):
            task.load_for(model, None)
