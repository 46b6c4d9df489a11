"""Allocations: how layers share a budget, and the order in which their ranks are raised."""

import copy
import math

import pytest
import torch
from torch import nn

from flora.adapters import gradients
from flora.errors import ConfigError
from flora.methods import allocation
from flora.methods.allocation import climb, gradient_spectra
from flora.methods.ladders import Ladder, Rung
from tests.methods.small import Small, method


def test_an_unknown_allocation_is_refused_with_or_without_a_budget():
    for overrides in ((), ("adapter.budget=2%",)):
        with pytest.raises(ConfigError, match=r"adapter\.allocation must be one of uniform"):
            method("lora", "adapter.allocation=fair", *overrides)


def test_names_that_end_alike_keep_their_own_ranks():
    rows = [
        Ladder(name, f"{name}.weight", (96, 32), (0,), tuple(Rung(r, r, 128 * r) for r in range(1, 33)))
        for name in ("up", "block.up")
    ]
    chosen = climb(rows, lambda row, rung: rung * (2 - row), 128 * 6)  # the second is raised twice as often
    assert [rung.rank for rung in chosen] == [2, 4]
    adapted = method("lora", f"adapter.budget={24 * 32 + 2 * 56 + 128 * 5}").apply(Small(), ["head"])
    wrapped = dict(adapted.model.named_modules())
    for name, ranks in adapted.ranks.items():
        assert wrapped[f"base_model.model.{name}"].lora_A["default"].weight.shape[0] == ranks[0]


def test_proportional_gives_every_layer_the_same_share_of_its_size():
    model = nn.Sequential(*[nn.Linear(n, n) for n in (32, 64, 256, 512)])
    adapted = method("lora", "adapter.budget=10%", "adapter.allocation=proportional").apply(model, ["none"])
    # r (n + n) = 10 % of n n, to the next rank below, and one more where the remainder pays for it
    for n, (rank,) in zip((32, 64, 256, 512), adapted.ranks.values(), strict=True):
        assert math.floor(0.05 * n) <= max(rank, 2) <= math.floor(0.05 * n) + 2


def test_spectral_follows_the_energy_of_the_weights():
    """Two layers of known rank: the one whose energy is spread gets the ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    basis = [torch.linalg.qr(torch.randn(64, 64))[0] for _ in range(2)]
    spectra = [torch.tensor([10.0] * 3 + [1e-4] * 61), torch.tensor([1.0] * 40 + [1e-4] * 24)]
    for layer, q, spectrum in zip(model, basis, spectra, strict=True):
        layer.weight.data = q @ torch.diag(spectrum) @ q.T
    budget = 128 * 43
    adapted = method("lora", f"adapter.budget={budget}", "adapter.allocation=spectral").apply(model, ["none"])
    assert adapted.ranks == {"0": [3], "1": [40]}
    small = method("lora", f"adapter.budget={128 * 20}", "adapter.allocation=spectral")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for layer, q, spectrum in zip(model, basis, spectra, strict=True):
        layer.weight.data = q @ torch.diag(spectrum) @ q.T
    ranks = [rank for (rank,) in small.apply(model, ["none"]).ranks.values()]
    kept = [spectrum.square().cumsum(0) / spectrum.square().sum() for spectrum in spectra]
    shares = [float(energy[rank - 1]) for energy, rank in zip(kept, ranks, strict=True)]
    assert sum(ranks) == 20
    assert abs(shares[0] - shares[1]) < 1 / 3  # one rank of the first layer keeps a third


def test_spectral_reads_the_modes_of_a_convolution():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    kernel = torch.randn(3, 3)
    model[0].weight.data = torch.einsum("oi,hw->oihw", torch.ones(16, 16), kernel)  # rank 1 in every mode
    model[1].weight.data = torch.einsum("oi,hw->oihw", torch.eye(16), kernel)  # rank 16 in its channels
    adapted = method("flora", "adapter.budget=572", "adapter.allocation=spectral").apply(model, ["none"])
    assert adapted.ranks["0"][:2] == [1, 1]
    assert adapted.ranks["1"][0] > 5


def pulled(model, gradients):
    """Spectra of layers whose gradients in each of two batches are these matrices times 1 and 2."""
    layers = [layer.weight for layer in model]

    def loss(model, times):
        return times * sum((weight * matrix).sum() for weight, matrix in zip(layers, gradients, strict=True))

    return lambda model, ladders: gradient_spectra(ladders, model, [1.0, 2.0], loss)


def test_gradient_follows_the_energy_of_the_gradients_and_not_their_size():
    """Two layers whose gradients have known spectra: each keeps the same share of its own."""
    torch.manual_seed(0)
    spectra = [torch.tensor([10.0] * 3 + [1e-3] * 61), torch.tensor([1.0] * 40 + [1e-3] * 24)]
    turned = [(torch.linalg.qr(torch.randn(64, 64))[0] * spectrum).T for spectrum in spectra]
    for size in (1.0, 1e-4):
        gradients = [turned[0] * size, turned[1]]
        for budget, expected in ((128 * 43, [3, 40]), (128 * 22, [2, 20])):
            model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
            chosen = method("lora", f"adapter.budget={budget}", "adapter.allocation=gradient")
            adapted = chosen.apply(model, ["none"], pulled(model, gradients))
            assert [rank for (rank,) in adapted.ranks.values()] == pytest.approx(expected, abs=1)


def test_a_mode_too_large_for_a_whole_sum_is_known_in_part(monkeypatch):
    """What a sketch tells is right, and beyond it the share is a lower bound that ends at 1."""
    monkeypatch.setattr(gradients, "EXACT", 100)
    monkeypatch.setattr(allocation, "EXACT", 100)
    monkeypatch.setattr(allocation, "KNOWN", 8)
    torch.manual_seed(0)
    spectrum = torch.arange(1, 151, dtype=torch.float32) ** -1.0
    matrix = torch.linalg.qr(torch.randn(300, 150))[0] * spectrum
    model = nn.Sequential(nn.Linear(150, 300))
    ladder = Ladder("0", "0.weight", (300, 150), (0,), ())
    ((shares,),) = pulled(model, [matrix])(model, [ladder])
    exact = (spectrum.square().cumsum(0) / spectrum.square().sum()).double()
    assert len(shares) == 300
    torch.testing.assert_close(shares[:8], exact[:8], rtol=1e-2, atol=0)
    assert (shares[8:150] <= exact[8:] + 1e-2).all()
    assert (shares.diff() >= 0).all()
    assert shares[-1] == 1


def test_gradient_needs_data_and_weights_that_have_gradients():
    chosen = method("lora", "adapter.budget=2000", "adapter.allocation=gradient")
    with pytest.raises(ValueError, match=r"adapter\.allocation=gradient reads gradients of training data"):
        chosen.apply(Small(), ["head"])
    model = nn.Sequential(nn.Linear(8, 8))
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match=r"allocation=gradient: 0\.weight is quantised or computed from others"):
        gradient_spectra([Ladder("0", "0.weight", (8, 8), (0,), ())], model, [1.0], lambda model, batch: batch)


def test_spectral_needs_values():
    with pytest.raises(ValueError, match=r"adapter\.allocation=spectral reads the pretrained weights"):
        method("lora", "adapter.budget=2000", "adapter.allocation=spectral").apply(Small().to("meta"), ["head"])


def test_solving_changes_neither_the_weights_nor_the_generator():
    model = Small()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    chosen = method("flora", "adapter.budget=2000", "adapter.allocation=spectral")
    config = chosen.config_class(target_modules=["stem", "point"], modules_to_save=["head"], **chosen.options)
    chosen.budget.solve(config, model, ["head"], "all")
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
