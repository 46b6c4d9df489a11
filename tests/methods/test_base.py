"""What a method must do: the protocol, and a method of ten lines that a run takes like any other."""

import warnings

import pytest
import torch
import transformers

from flora.methods import Adapted, Method, Peft
from flora.methods.base import load, save_trained
from tests.methods.families import ADAPTERS, adapter
from tests.training.test_run import ToyModel, toy_run


class FirstLayer:
    """Trains the first convolution and the head."""

    name = "first_layer"

    def apply(self, model, head):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(("0.", *(f"{h}." for h in head))))
        return Adapted(model)

    def save(self, model, folder):
        save_trained(model, folder)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_config_makes_a_method(name):
    assert isinstance(adapter(name), Method)


def test_what_lacks_a_part_is_no_method():
    assert isinstance(FirstLayer(), Method)
    assert not isinstance(object(), Method)


def test_a_method_of_ten_lines_trains_is_saved_and_evaluated(tmp_path):
    run = toy_run(tmp_path, FirstLayer(), max_steps=2)
    before = run._base().state_dict()
    outcome = run.train()
    assert outcome.trainer.state.global_step == 2
    after = outcome.adapted.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name, p in outcome.adapted.model.named_parameters() if p.requires_grad}
    assert moved == trained > {"7.fc.weight", "7.fc.bias"}
    run.method.save(outcome.adapted.model, tmp_path / "saved")
    assert run.evaluate(tmp_path / "saved").metrics == outcome.metrics


@pytest.mark.parametrize(
    "content", ["[]", "7", "null", "{", "[" * 9000, "{}", '{"peft_type": []}', '{"peft_type": "LORA", "r": []}', "\x00"]
)
def test_a_configuration_that_is_none_is_said_in_one_line(tmp_path, content):
    method = Peft("lora", "peft.LoraConfig", target_modules=["0"], r=2)
    method.save(method.apply(ToyModel().build(3), ToyModel.classifier).model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}") as refused:
        load(ToyModel().build(3), ToyModel.classifier, tmp_path)
    assert "\n" not in str(refused.value)


def test_only_what_trains_is_saved(tmp_path):
    adapted = FirstLayer().apply(ToyModel().build(3), ToyModel.classifier)
    save_trained(adapted.model, tmp_path / "new" / "folder")
    loaded = load(ToyModel().build(3), ToyModel.classifier, tmp_path / "new" / "folder").model
    trains = {name: p for name, p in adapted.model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trains.keys()
    assert all(torch.equal(loaded.get_parameter(name), p) for name, p in trains.items())


def test_an_adapter_of_texts_is_loaded_without_a_warning_of_peft(tmp_path):
    def bert():
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **size))

    method = Peft("flora", "flora.FloraConfig", target_modules=["query"], r=2)
    method.save(method.apply(bert(), ["classifier"]).model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        load(bert(), ["classifier"], tmp_path)
