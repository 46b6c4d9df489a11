"""torch.compile: the outputs and gradients of the eager model in one graph, layer by layer and built together.

The back end is aot_eager, which traces forward and backward as the default one does and needs no C++ compiler; eager,
which runs dynamo's graph as it is, where that tracing is tested beside.
"""

import copy
from typing import Any

import peft
import pytest
import timm.models
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers.pytorch_utils import Conv1D

import flora

from .layer_cases import Holder, Mixture


@pytest.fixture(autouse=True)
def _fresh_and_in_double_precision():
    torch._dynamo.reset()
    counters.clear()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def adapt(model: nn.Module, **settings: Any) -> peft.PeftModel:
    torch.manual_seed(1)
    settings = {"target_modules": ["layer"], "r": 3, "init_weights": False, "scale": 0.7} | settings
    return peft.get_peft_model(copy.deepcopy(model), flora.FloraConfig(**settings))


def compiled(run: Any, fullgraph: bool = True, backend: str = "aot_eager") -> Any:
    return torch.compile(run, fullgraph=fullgraph, backend=backend)


def gradients(run: Any, model: nn.Module, *args: Any) -> dict[str, Tensor | None]:
    model.zero_grad()
    run(*args).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


def case(layer: nn.Module, *shape: int, **settings: Any) -> tuple[nn.Module, tuple[int, ...], dict[str, Any]]:
    return layer, shape, settings


LAYERS = {
    "Linear merged": case(nn.Linear(6, 5), 3, 6, forward="merged"),
    "Linear factored": case(nn.Linear(6, 5), 3, 6, forward="factored"),
    "Linear with magnitude": case(nn.Linear(6, 5), 3, 6, use_dora=True),
    "Linear with dropout": case(nn.Linear(6, 5), 3, 6, flora_dropout=0.1),
    "Linear folded": case(nn.Linear(6, 18), 3, 6, fold_pattern={"layer": [3, 6, 6]}),
    "Linear folded, factored": case(nn.Linear(6, 18), 3, 6, fold_pattern={"layer": [3, 6, 6]}, forward="factored"),
    "Linear with its own forward": case(OwnForward(6, 5), 3, 6),
    "Conv1D (transformers) merged": case(Conv1D(5, 6), 3, 6, forward="merged"),
    "Conv1D (transformers) factored": case(Conv1D(5, 6), 3, 6, forward="factored"),
    "Embedding": case(nn.Embedding(9, 5)),
    "Embedding with padding, merged": case(nn.Embedding(9, 5, padding_idx=0), forward="merged"),
    "Conv1d": case(nn.Conv1d(4, 6, 3), 2, 4, 9),
    "Conv1d circular": case(nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), 2, 4, 9),
    "Conv2d merged": case(nn.Conv2d(4, 6, 3), 2, 4, 6, 6),
    "Conv2d factored": case(nn.Conv2d(4, 6, 3, padding=1), 2, 4, 6, 6, forward="factored"),
    "Conv2d pointwise": case(nn.Conv2d(4, 6, 1), 2, 4, 6, 6),
    "Conv2d with magnitude": case(nn.Conv2d(4, 6, 3), 2, 4, 6, 6, use_dora=True),
    "Conv2d depthwise": case(nn.Conv2d(4, 4, 3, groups=4), 2, 4, 6, 6),
    "Conv2d grouped": case(nn.Conv2d(4, 6, (3, 2), groups=2), 2, 4, 6, 6),
    "Conv2d grouped, dense": case(nn.Conv2d(4, 6, 3, groups=2), 2, 4, 6, 6, forward="factored"),
    "Conv3d": case(nn.Conv3d(2, 3, (2, 3, 2)), 2, 2, 4, 4, 4),
    "ConvTranspose1d": case(nn.ConvTranspose1d(4, 6, 3, stride=2), 2, 4, 5),
    "ConvTranspose2d": case(nn.ConvTranspose2d(4, 6, 3, stride=2), 2, 4, 5, 5),
    "ConvTranspose2d grouped": case(nn.ConvTranspose2d(4, 6, 3, groups=2), 2, 4, 5, 5),
    "ConvTranspose3d": case(nn.ConvTranspose3d(2, 3, 2), 2, 2, 3, 3, 3),
    "MultiheadAttention": case(nn.MultiheadAttention(4, 2), 3, 3, 4),
    "LSTMCell": case(nn.LSTMCell(6, 5), 3, 6),
    "bare parameter": case(Mixture([3, 4, 5]), 2, 5, target_modules=None, target_parameters=["experts"]),
}


class Zoo(nn.Module):
    """A layer of every kind, each with an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        made = [adapt(Holder(layer.double()), **settings) for layer, _, settings in LAYERS.values()]
        self.models = nn.ModuleList(made)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        pairs = zip(self.models, inputs, strict=True)
        return [m(x, x, x) if x.shape == (3, 3, 4) else m(x) for m, x in pairs]  # attention: query, key, value


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_every_kind_of_layer_compiles_without_a_graph_break(together):
    torch.manual_seed(0)
    zoo = Zoo().eval()
    inputs = [torch.randn(shape) if shape else torch.arange(9) for _, shape, _ in LAYERS.values()]
    # aot_eager traces what is built together in fast/test_traced.py
    run = compiled(flora.batched(zoo)(zoo), backend="eager") if together else compiled(zoo)
    steps = []
    for each in (zoo, run):
        zoo.zero_grad()
        outputs = each(*inputs)
        torch.stack([output.square().sum() for output in outputs]).sum().backward()
        steps.append([(y, [p.grad for p in m.parameters()]) for y, m in zip(outputs, zoo.models, strict=True)])
    for name, (expected, gradients), (actual, theirs) in zip(LAYERS, *steps, strict=True):
        assert any(gradient is not None and gradient.any() for gradient in gradients), name
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(theirs, gradients, msg=lambda text, name=name: f"{name}: {text}")


def test_a_recurrent_layer_which_torch_does_not_compile_runs_as_it_is():
    model, x = adapt(Holder(nn.GRU(6, 5))), torch.randn(4, 2, 6)
    run = compiled(flora.batched(model)(model), fullgraph=False)
    torch.testing.assert_close(run(x), model(x))
    torch.testing.assert_close(gradients(run, model, x), gradients(model, model, x))


class Two(nn.Module):
    """Two layers that are built together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))


TWO = {"target_modules": ["first", "second"]}
CHANGES = {
    "none": lambda model: None,
    "another adapter": lambda model: model.set_adapter("other"),
    "several adapters": lambda model: model.base_model.set_adapter(["default", "other"]),
    "scale": lambda model: model.base_model.model.first.scale_layer(3.0),
    "frozen": lambda model: model.base_model.model.first.core("default").requires_grad_(False),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "enabled": lambda model: model.base_model.enable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "unmerged": lambda model: model.unmerge_adapter(),
    "deleted": lambda model: model.delete_adapter("other"),
}


@pytest.mark.parametrize(
    ("form", "together"), [("merged", False), ("merged", True), ("factored", True)], ids=["alone", "merged", "factored"]
)
@torch._dynamo.config.patch(recompile_limit=30, fail_on_recompile_limit_hit=True)
def test_a_compiled_model_follows_every_change_of_its_adapters(form, together):
    model = adapt(Two(), forward=form, **TWO)
    model.add_adapter("other", flora.FloraConfig(r=2, init_weights=False, forward=form, **TWO))
    backend = "aot_eager" if together and form == "merged" else "eager"  # what dynamo guards by is the same
    run, x = compiled(flora.batched(model)(model) if together else model, backend=backend), torch.randn(3, 4)
    outputs = []
    for name, change in CHANGES.items():
        change(model)
        outputs.append(run(x))
        torch.testing.assert_close(outputs[-1], model(x), msg=lambda text, name=name: f"{name}: {text}")
        if outputs[-1].requires_grad:
            expected, actual = gradients(model, model, x), gradients(run, model, x)
            torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[2], outputs[3])


def networks() -> dict[str, Any]:
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    positions = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
    ids = torch.randint(20, (2, 6))
    images = (torch.randn(2, 3, 32, 32),)
    classifier = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1])}
    convnext = timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 4, 8, 8), num_classes=3, use_grn=True)
    resnet = timm.models.ResNet(timm.models.resnet.Bottleneck, (1, 1, 1, 1), num_classes=3, channels=(4, 4, 8, 8))
    deberta = transformers.DebertaV2Config(**sizes, **positions, share_att_key=True, pooler_hidden_size=8)
    llama = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
    bert = transformers.BertConfig(**sizes)
    return {
        "ConvNeXt-V2": (convnext, images, {}, r".*(conv_dw|fc\d|stem\.0|downsample\.1)"),
        "ResNet": (resnet, images, {}, r"(.*\.)?(conv\d|downsample\.0)"),
        "BERT": (transformers.BertForSequenceClassification(bert), (), classifier, r".*(query|key|value|dense|word.*)"),
        "DeBERTaV3": (transformers.DebertaV2ForSequenceClassification(deberta), (), classifier, r".*(_proj|dense)"),
        "Llama": (transformers.LlamaForCausalLM(llama), (), {"input_ids": ids, "labels": ids}, r".*_proj"),
    }


# Their layers are those of ConvNeXt-V2 and BERT, which stay; it is dynamo that takes longer over the rest of them.
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("ResNet", "DeBERTaV3")]


@pytest.mark.parametrize("name", ["ConvNeXt-V2", "BERT", "Llama", *SLOW])
def test_an_adapted_network_has_no_graph_break_of_its_own(name):
    """DeBERTa's loss looks for labels that count, whose number no graph knows: a break of the base model."""
    net, args, kwargs, targets = networks()[name]
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = adapt(net.double(), target_modules=targets, r=2, kernel_rank=2)
    breaks = []
    breaking = name == "DeBERTaV3"
    for each, run in [(net, net)] * breaking + [(model, flora.batched(model)(model))]:
        torch._dynamo.reset()
        counters.clear()
        step = torch.compile(run, backend="eager")(*args, **kwargs)
        expected = each(*args, **kwargs)
        breaks.append(sorted(counters["graph_break"]))
        for ours, eager in zip(*(getattr(y, "to_tuple", lambda y=y: (y,))() for y in (step, expected)), strict=True):
            if isinstance(eager, Tensor):
                torch.testing.assert_close(ours, eager)
    assert [len(found) for found in breaks] == [breaking] * (1 + breaking)
