"""Networks with adapters as programs of torch.export and of ONNX, which onnxruntime runs, beside the eager model."""

import copy
from pathlib import Path

import peft
import pytest
import timm
import torch
import transformers
from torch import nn

import flora
from flora.errors import ConfigError
from flora.models import programs

IMAGES = {"images": (3, 32, 32)}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert():
    config = transformers.BertConfig(**SIZES, vocab_size=50, max_position_embeddings=20)
    return transformers.BertForSequenceClassification(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=50, use_cache=False))


def vision(name):
    model = timm.create_model(name, num_classes=5)
    for key, parameter in model.named_parameters():  # scales of residual branches that start near zero hide adapters
        if key.endswith("gamma") or (key.endswith("weight") and not parameter.any()):
            nn.init.ones_(parameter)
    return model


class Tiny(nn.Module):
    """A plain, a depthwise and a strided convolution, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)
        self.conv3, self.fc = nn.Conv2d(8, 6, 2, stride=2, bias=False), nn.Linear(6, 5)

    def forward(self, images):
        return self.fc(torch.tanh(self.conv3(torch.tanh(self.conv2(self.conv1(images))))).mean((2, 3)))


NETWORKS = {
    "tiny": Tiny,
    "convnext": lambda: vision("test_convnext"),
    "resnet": lambda: vision("test_resnet"),
    "bert": bert,
    "llama": llama,
}
TARGETS = {
    "tiny": r"conv\d|fc",
    "convnext": r"stages.*(conv|fc)\w*",
    "resnet": r"layer.*conv\d",
    "bert": ["query", "dense"],
}
LINEAR = {"tiny": r"conv[13]|fc", "convnext": r"stages.*fc\d"}  # what LoRA adapts too: not depthwise convolutions


def adapted(network, method):
    """A network with an adapter that changes it, as PEFT has it."""
    torch.manual_seed(0)
    base = NETWORKS[network]().eval()
    targets = TARGETS.get(network, ["q_proj", "down_proj"])
    if method == "lora":
        config = peft.LoraConfig(r=4, target_modules=LINEAR.get(network, targets), init_lora_weights=False)
    else:
        config = flora.FloraConfig(r=4, target_modules=targets, init_weights=False, forward=method)
    return peft.get_peft_model(base, config).eval()


def inputs(network, batch, tokens):
    torch.manual_seed(1)
    if network in ("tiny", "convnext", "resnet"):
        return {"images": torch.randn(batch, *IMAGES["images"])}
    ids = torch.randint(50, (batch, tokens))
    if network == "llama":
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model, given):
    with torch.no_grad():
        outputs = model(given["images"]) if "images" in given else model(**given)
    return getattr(outputs, "logits", outputs)


def check(network, method, merged, place):
    """The program gives the eager logits on batches of other sizes than the example's, and the adapter matters."""
    model = adapted(network, method)
    with model.disable_adapter():
        base = logits(model, inputs(network, 5, 7))
    expected = logits(model, inputs(network, 5, 7))
    if merged:
        model = model.merge_and_unload()
    example = inputs(network, 2, 4)
    made = programs.program(model, example, None if "images" in example else 20)
    programs.save(made, place, list(example))
    assert (expected - base).abs().max() > 1e-2 * expected.abs().max()
    for batch, tokens in ((5, 7), (1, 12)):
        given = inputs(network, batch, tokens)
        eager = logits(model, given)
        torch.testing.assert_close(programs.run(place, given), eager, rtol=0, atol=1e-5 * eager.abs().max().item())
    torch.testing.assert_close(logits(model, inputs(network, 5, 7)), expected, rtol=1e-3, atol=1e-4)


def needs_onnx():
    if missing := programs.lacking("ONNX"):
        pytest.skip(f"{', '.join(missing)} is not installed: pip install -e '.[onnx]'")


WAYS = pytest.mark.parametrize(
    ("method", "merged"), [("auto", True), ("merged", False), ("factored", False), ("lora", False)]
)


@pytest.mark.parametrize(("method", "merged"), [("merged", True), ("factored", False)])
def test_torch_export_gives_the_eager_logits(method, merged, tmp_path):
    check("tiny", method, merged, tmp_path / "model.pt2")


def test_onnxruntime_gives_the_eager_logits(tmp_path):
    needs_onnx()
    check("tiny", "factored", False, tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@WAYS
@pytest.mark.parametrize("ending", programs.ENDS)
def test_programs_of_every_kind_of_network_give_the_eager_logits(network, method, merged, ending, tmp_path):
    if programs.ENDS[ending] == "ONNX":
        needs_onnx()
    check(network, method, merged, tmp_path / f"model{ending}")


def test_what_cannot_be_written_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(programs.PACKAGES, "ONNX", ("onnx", "no_such_package"))
    made = programs.program(nn.Identity(), {"images": torch.randn(2, 3)})
    with pytest.raises(ConfigError, match=r"a program ends in \.onnx or \.pt2"):
        programs.save(made, Path("model.tflite"), ["images"])
    with pytest.raises(ConfigError, match=r"ONNX needs .*no_such_package; pip install"):
        programs.save(made, tmp_path / "model.onnx", ["images"])
    assert not list(tmp_path.iterdir())


def test_the_program_holds_the_adapter_that_was_active():
    model = adapted("tiny", "auto")
    twin = copy.deepcopy(model)
    model.add_adapter("second", flora.FloraConfig(r=2, target_modules=["fc"], init_weights=False))
    model.set_adapter("second")
    given = inputs("tiny", 2, 4)
    made = programs.program(model, given)
    torch.testing.assert_close(made.module()(*given.values()), logits(model, given), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model, given), logits(twin, given))


def test_prompts_are_refused():
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    with pytest.raises(ConfigError, match="prompts are no part of the network"):
        programs.program(peft.get_peft_model(bert(), config), inputs("bert", 2, 4))
