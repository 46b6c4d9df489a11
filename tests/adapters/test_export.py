"""scripts/export.py from the outside: files in, files out, one line for what is wrong."""

import copy
import os
import pickle
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

import flora
from flora.errors import ConfigError

from .published import PublishedModel

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from export import export

LAYERS = ["bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, vocab_size=40)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def load(bert: Path) -> transformers.PreTrainedModel:
    return transformers.BertForSequenceClassification.from_pretrained(bert).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12).view(2, 6)).logits


def test_flora_to_lora(bert, tmp_path):
    model = peft.get_peft_model(load(bert), flora.FloraConfig(target_modules=LAYERS, init_weights=False)).eval()
    model.save_pretrained(tmp_path / "flora")
    export([str(tmp_path / "flora"), str(tmp_path / "lora"), "--to", "lora", "--model", f"transformers:{bert}"])
    lora = peft.PeftModel.from_pretrained(load(bert), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(lora), logits(model), rtol=1e-5, atol=1e-5)


def test_the_folder_of_a_run_to_lora_without_what_lora_cannot_hold(tmp_path, capsys):
    net = torch.nn.ModuleDict({"wide": torch.nn.Conv2d(8, 8, 3, groups=8), "point": torch.nn.Conv2d(8, 4, 1)})
    config = flora.FloraConfig(target_modules=["wide", "point"], init_weights=False)
    model = peft.get_peft_model(net, config)
    model.save_pretrained(tmp_path / "run" / "adapter")
    export([str(tmp_path / "run"), str(tmp_path / "lora"), "--to", "lora"])
    said = capsys.readouterr()
    assert said.out == f"lora: {tmp_path / 'lora'}\n"
    assert "left out: wide: one input channel looks like a depthwise convolution" in said.err
    assert "warning: 1 layers are left out" in said.err
    plain = torch.nn.ModuleDict({"wide": torch.nn.Conv2d(8, 8, 3, groups=8), "point": torch.nn.Conv2d(8, 4, 1)})
    lora = peft.PeftModel.from_pretrained(plain, tmp_path / "lora").base_model.model["point"]
    expected = model.base_model.model["point"].get_delta_weight("default")
    torch.testing.assert_close(lora.get_delta_weight("default"), expected)


def test_published_to_flora(bert, tmp_path):
    published = PublishedModel(load(bert), {name: [3, 2] for name in LAYERS}, scale=0.5)
    torch.save(published.checkpoint(), tmp_path / "published.pt")
    arguments = ["--from", "published", "--scale", "0.5", "--model", f"transformers:{bert}"]
    export([str(tmp_path / "published.pt"), str(tmp_path / "flora"), *arguments])
    converted = peft.PeftModel.from_pretrained(load(bert), tmp_path / "flora").eval()
    expected = copy.deepcopy(load(bert))
    for name in LAYERS:
        expected.get_submodule(name).weight.data += published.model.get_submodule(name).flora_layer.delta().detach()
    torch.testing.assert_close(logits(converted), logits(expected), rtol=1e-4, atol=1e-4)


def test_fine_tune_to_flora(bert, tmp_path):
    tuned = load(bert)
    tuned.get_submodule(LAYERS[0]).weight.data += torch.randn(24, 2) @ torch.randn(2, 16)
    save_file(tuned.state_dict(), tmp_path / "tuned.safetensors")
    arguments = ["--from", "checkpoint", "--r", "2", "--model", f"transformers:{bert}"]
    export([str(tmp_path / "tuned.safetensors"), str(tmp_path / "flora"), *arguments])
    converted = peft.PeftModel.from_pretrained(load(bert), tmp_path / "flora").eval()
    assert list(converted.base_model.effective_ranks()) == LAYERS[:1]
    torch.testing.assert_close(logits(converted), logits(tuned), rtol=1e-4, atol=1e-4)


class Unsafe:
    def __reduce__(self):
        return os.system, ("true",)


def test_bad_input_is_one_line(bert, tmp_path):
    (tmp_path / "unsafe.pt").write_bytes(pickle.dumps({"weight": Unsafe()}))
    torch.save({"a.flora_layer.param_G": Unsafe()}, tmp_path / "zipped.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    for name in ("text.pt", "text.safetensors"):
        (tmp_path / name).write_text("root:x:0:0:")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_model.safetensors").write_text("root:x:0:0:")
    (tmp_path / "broken" / "adapter_config.json").write_text('{"peft_type": "FLORA", "target_modules": ["query"]}')
    model = ["--model", f"transformers:{bert}"]
    cases = {
        "holds more than tensors": ["unsafe.pt", "--from", "published", "--scale", "1"],
        "holds more than": ["zipped.pt", "--from", "published", "--scale", "1"],
        r"text\.pt cannot be read": ["text.pt", "--from", "checkpoint"],
        r"text\.safetensors cannot be read": ["text.safetensors", "--from", "checkpoint"],
        "must hold tensors by name": ["list.pt", "--from", "nlp", "--alpha", "1"],
        "there is no folder /nowhere": ["text.pt", "--from", "nlp", "--alpha", "1", "--model", "transformers:/nowhere"],
        "rror while deserializing header": ["broken", "--from", "flora", "--to", "lora"],
        "--from, --to": ["x"],
        "no adapter_config.json": ["nowhere", "--from", "lora"],
        "No such file": ["nowhere.pt", "--from", "nlp", "--alpha", "1"],
    }
    for message, (source, *options) in cases.items():
        with pytest.raises(ConfigError, match=message) as caught:
            export([str(tmp_path / source), str(tmp_path / "out"), *model, *options])
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
