"""The start from gradients: its factors are the higher-order SVD of the gradients, and nothing else changes."""

import copy

import numpy as np
import peft
import pytest
import tensorly
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import flora
from flora.adapters import FloraLayer, gradients
from tests.training.processes import together

from .layer_cases import Holder, Mixture

torch.manual_seed(0)
IMAGES, ROWS = (2, 6, 7, 7), (5, 6)
LAYERS = {
    "linear": (nn.Linear(6, 8), ROWS),
    "convolution": (nn.Conv2d(6, 8, 3), IMAGES),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2), IMAGES),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), IMAGES),
    "one dimension": (nn.Conv1d(6, 8, 3), (2, 6, 9)),
    "three dimensions": (nn.Conv3d(6, 8, 3), (1, 6, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(6, 8, 3), IMAGES),
    "embedding": (nn.Embedding(9, 6), None),
    "attention": (nn.MultiheadAttention(6, 2, batch_first=True), (3, 4, 6)),
    "recurrent": (nn.LSTM(6, 4, num_layers=2), (4, 3, 6)),
    "bare": (Mixture([4, 5, 6]), ROWS),
    "folded": (nn.Linear(6, 12), ROWS),
}


def batches_of(kind, count=3):
    generator = torch.Generator().manual_seed(1)
    shape = LAYERS[kind][1]
    if shape is None:
        return [torch.randint(9, (7,), generator=generator) for _ in range(count)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def loss(model, batch):
    output = model(batch, batch, batch) if isinstance(base(model), nn.MultiheadAttention) else model(batch)
    return (output.sin() * torch.linspace(0.5, 1.5, output.shape[-1])).sum()


def base(model):
    layer = next(module for name, module in model.named_modules() if name.endswith("layer"))
    return layer.get_base_layer() if isinstance(layer, FloraLayer) else layer


def adapted(kind, **settings):
    layer = copy.deepcopy(LAYERS[kind][0])
    settings = {"r": 3, "kernel_rank": 2, "scale": 2.0, "init": "zero_output"} | settings
    target = {"target_parameters": ["layer.experts"]} if kind == "bare" else {"target_modules": ["layer"]}
    folds = {"fold_pattern": {"layer": [3, 4, 6]}} if kind == "folded" else {}
    config = flora.FloraConfig(**target, **folds, **settings)
    torch.manual_seed(3)
    return peft.get_peft_model(Holder(layer), config).double()


def stacked_gradients(kind):
    """Of the base network alone, by weight: batches x the weight's own shape."""
    network, found = Holder(copy.deepcopy(LAYERS[kind][0])).double(), []
    for batch in batches_of(kind):
        network.zero_grad()
        loss(network, batch).backward()
        found.append({name: p.grad.clone() for name, p in network.layer.named_parameters()})
    return {name: torch.stack([one[name] for one in found]).numpy() for name in found[0]}


def layer_of(model):
    (layer,) = (module for module in model.modules() if isinstance(module, FloraLayer))
    return layer


@pytest.mark.parametrize("start", ["zero_output", "orthogonal"])
@pytest.mark.parametrize("kind", LAYERS)
def test_factors_keep_what_the_hosvd_of_the_gradients_keeps(kind, start):
    model = adapted(kind, init=start)
    layer, batches = layer_of(model), batches_of(kind)
    drawn = {
        name: [None if f is None else f.detach().clone() for f in layer.factors("default", name)]
        for name in layer.weights["default"]
    }
    before = [loss(model, batch) for batch in batches]
    kept = flora.init_from_gradients(model, batches, loss)
    found = stacked_gradients(kind)
    assert kept
    for name, weight in layer.weights["default"].items():
        tensor = found[name].reshape(len(batches), *weight.shape)
        energy = np.square(tensor).sum()
        factors = layer.factors("default", name)
        (shares,) = (shares for full, shares in kept.items() if full.endswith(name))
        assert shares.keys() == {
            n for n, f in enumerate(factors) if f is not None and f.any() and f.shape[1] < f.shape[0]
        }
        for mode, share in shares.items():
            unfolded = tensorly.unfold(tensor, mode + 1)
            best = np.square(np.linalg.svd(unfolded, compute_uv=False))[: factors[mode].shape[1]].sum() / energy
            with torch.no_grad():
                own = np.square(factors[mode].numpy().T @ unfolded).sum() / energy
                random = np.square(drawn[name][mode].numpy().T @ unfolded).sum() / energy
            assert share == pytest.approx(best, abs=1e-6)
            assert own == pytest.approx(best, abs=1e-6)
            assert own >= random - 1e-9
            torch.testing.assert_close(factors[mode].T @ factors[mode], torch.eye(factors[mode].shape[1]).double())
        assert not layer.get_delta_weight("default", name).any()
    assert [loss(model, batch) for batch in batches] == before


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(36, 2)
    )
    config = flora.FloraConfig(target_modules=["0"], modules_to_save=["5"], init="zero_output", r=2)
    model = peft.get_peft_model(network, config).train()
    layer_of(model).get_base_layer().bias.requires_grad_(True)
    (next(p for p in model.parameters() if p.requires_grad)).grad = None
    layer_of(model).get_base_layer().weight.grad = torch.ones(4, 3, 3, 3)
    flags = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    values = {name: v.clone() for name, v in model.state_dict().items() if "tucker_factors" not in name}
    flora.init_from_gradients(model, [torch.randn(2, 3, 5, 5)], lambda model, batch: model(batch).square().sum())
    assert all(module.training for module in model.modules())
    assert {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()} == flags
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in values.items())


def test_layers_that_are_checkpointed_are_computed_twice_and_give_the_same_factors():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=19)).double()
    config = flora.FloraConfig(r=2, init="zero_output", target_modules=["q_proj", "down_proj"])
    tokens = torch.randint(19, (2, 7))
    batches = [{"input_ids": tokens, "labels": tokens}]  # and caches are on, as transformers has it
    factors, calls = [], []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = peft.get_peft_model(copy.deepcopy(network), config)
        if checkpointed:
            model.gradient_checkpointing_enable()
        projections = [module for name, module in model.named_modules() if name.endswith("mlp.gate_proj")]
        for projection in projections:
            projection.register_forward_hook(lambda *_, which=checkpointed: calls.append(which))
        flora.init_from_gradients(model, batches)
        assert not any("forward" in vars(module) for module in model.modules())
        factors.append({name: p for name, p in model.named_parameters() if p.requires_grad})
    assert (calls.count(False), calls.count(True)) == (2, 4)
    assert factors[0].keys() == factors[1].keys()
    for name, factor in factors[0].items():
        torch.testing.assert_close(factors[1][name], factor)


def test_the_seed_decides():
    def start(seed):
        torch.manual_seed(seed)
        model = peft.get_peft_model(
            Holder(copy.deepcopy(LAYERS["convolution"][0])),
            flora.FloraConfig(target_modules=["layer"], init="zero_output"),
        ).double()
        flora.init_from_gradients(model, batches_of("convolution"), loss)
        return {name: p.detach() for name, p in model.named_parameters() if "tucker" in name}

    first, again, other = start(0), start(0), start(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("directions", [5, 200])
def test_a_sketch_of_a_large_mode_keeps_nearly_what_the_whole_sum_keeps(directions, monkeypatch):
    torch.manual_seed(0)
    spectrum = torch.arange(1, directions + 1, dtype=torch.float64) ** -1.0
    gradient = (
        torch.linalg.qr(torch.randn(300, directions).double())[0] * spectrum @ torch.randn(directions, 400).double()
    )
    whole, rank = gradients.ModeSum(300, 8, gradient), 8
    monkeypatch.setattr(gradients, "EXACT", 100)
    sketch = gradients.ModeSum(300, 8, gradient)
    for part in gradient.split(100, dim=1):
        whole.add(part)
        sketch.add(part)
    assert sketch.sum.shape == (300, 72)
    _, best = whole.leading()
    values, basis = sketch.leading()
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank).double())

    def kept(basis):
        return float((basis.T @ gradient).square().sum() / gradient.square().sum())

    assert kept(basis) >= 0.999 * kept(best)
    assert float(values.sum() / sketch.energy) == pytest.approx(kept(basis), rel=1e-2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda model: layer_of(model).factors("default")[0].data.fill_(1),
            "the update of 'default' is merged or not zero",
        ),
        (lambda model: setattr(base(model), "weight", nn.Parameter(base(model).weight.to("meta"))), "offloaded"),
        (lambda model: nn.utils.parametrizations.weight_norm(base(model)), "computed by a parametrization"),
    ],
    ids=["trained", "offloaded", "parametrised"],
)
def test_what_has_no_gradient_of_its_own_is_refused(change, said):
    model = adapted("linear")
    change(model)
    with pytest.raises(ValueError, match=said):
        flora.init_from_gradients(model, batches_of("linear"), loss)


@pytest.mark.parametrize(
    ("batches", "objective", "said"),
    [
        ([], loss, "batches: there is none"),
        (batches_of("linear"), lambda model, batch: 0 * loss(model, batch), "the gradient of .*weight is zero"),
        (batches_of("linear"), lambda model, batch: loss(model, batch) / 0, "the gradient of .*weight is not finite"),
    ],
    ids=["no batch", "no gradient", "not finite"],
)
def test_without_gradients_the_adapter_stays_as_it_was(batches, objective, said):
    model = adapted("linear")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=said):
        flora.init_from_gradients(model, batches, objective)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="no FLoRA adapter 'other'"):
        flora.init_from_gradients(model, batches, objective, adapter_name="other")


def one_of_two():
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model, leading = adapted("convolution"), gradients.ModeSum.leading
    sign = 1 - 2 * rank
    gradients.ModeSum.leading = lambda mode_sum: (leading(mode_sum)[0], sign * leading(mode_sum)[1])
    flora.init_from_gradients(model, batches_of("convolution", 4)[rank::2], loss)
    torch.distributed.destroy_process_group()
    return [f.detach() for f in layer_of(model).factors("default")]


def test_a_sketch_is_the_same_whatever_was_drawn_before():
    """Processes add up their sketches, and their random numbers differ: each shuffles its own data."""
    like = torch.zeros((), dtype=torch.float64)
    torch.manual_seed(100)
    first = gradients.ModeSum(2 * gradients.EXACT, 4, like)
    torch.manual_seed(101)
    second = gradients.ModeSum(2 * gradients.EXACT, 4, like)
    assert torch.equal(first.probe, second.probe)


@pytest.mark.dist
def test_two_processes_find_what_one_finds(tmp_path):
    """Though one's eigenvectors have the other sign, as those of another device may."""
    model = adapted("convolution")
    flora.init_from_gradients(model, batches_of("convolution", 4), loss)
    whole = layer_of(model).factors("default")
    first, second = together(tmp_path, one_of_two)
    for factor, one, two in zip(whole, first, second, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one @ one.T, factor @ factor.T)
