"""Frozen batch norms: the numbers of torch's, without what torch keeps for them."""

import copy
import io
import pickle

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from flora.methods import Full, LinearProbe
from flora.training import Trainer
from flora.training.frozen_norms import Scaling, of
from tests.training.processes import together
from tests.training.test_run import toy_run


def norm_of(kind, channels=5, **settings):
    norm = kind(channels, **settings).double().eval()
    for name, tensor in {**dict(norm.named_parameters()), **dict(norm.named_buffers())}.items():
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2.0) if name.endswith("var") else tensor.data.normal_()
    return norm.requires_grad_(False)


KINDS = [
    (nn.BatchNorm1d, (4, 5, 7)),
    (nn.BatchNorm1d, (4, 5)),
    (nn.BatchNorm2d, (2, 5, 4, 3)),
    (nn.BatchNorm3d, (2, 5, 3, 2, 2)),
    (BatchNormAct2d, (2, 5, 4, 3)),
]


@pytest.mark.parametrize(("kind", "shape"), KINDS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_frozen_norm_scales_and_shifts(kind, shape):
    """Against (x - mean) / sqrt(var + eps) * weight + bias, and a ReLU, written out."""
    norm, x = norm_of(kind), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias, mean, var = (
        tensor.view(1, 5, *[1] * (len(shape) - 2))
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    expected = (x - mean) / (var + norm.eps).sqrt() * weight + bias
    if kind is BatchNormAct2d:
        expected = expected.relu()
    given = torch.randn_like(expected)
    (grad,) = torch.autograd.grad(expected, x, given)
    with Scaling([norm]):
        output = norm(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output, x, given)[0], grad)


def test_gradients_of_gradients_are_right():
    norm, x = norm_of(nn.BatchNorm2d, 2), torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    with Scaling([norm]):
        assert torch.autograd.gradcheck(lambda x: norm(x).sin(), x)
        assert torch.autograd.gradgradcheck(lambda x: norm(x).sin(), x)


def test_a_norm_without_weights_scales_too():
    norm, x = norm_of(nn.BatchNorm2d, affine=False), torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(norm(x).sin().sum(), x)
    with Scaling([norm]):
        torch.testing.assert_close(torch.autograd.grad(norm(x).sin().sum(), x)[0], expected)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_are_those_of_torch(dtype, order):
    """Forward bit for bit; the gradient, which torch rounds otherwise, to one unit in the last place."""
    norm = norm_of(nn.BatchNorm2d, 8).float()
    x = torch.randn(4, 8, 6, 6, dtype=dtype).to(memory_format=order).requires_grad_()
    given = torch.randn(4, 8, 6, 6, dtype=dtype).to(memory_format=order)
    expected = norm(x)
    (grad,) = torch.autograd.grad(expected, x, given)
    with Scaling([norm]):
        output = norm(x)
    (found,) = torch.autograd.grad(output, x, given)
    assert torch.equal(output, expected)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=order)
    torch.testing.assert_close(found, grad, rtol=2 * torch.finfo(dtype).eps, atol=0)


def kept(model, x):
    """Elements of all tensors that a forward pass keeps, those of parameters and buffers apart."""
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    seen = {}

    def note(tensor):
        if tensor.data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(x)
    return sum(seen.values()), output


def test_a_network_keeps_far_less():
    model = timm.create_model("resnet18").train()
    norms = [module.eval().requires_grad_(False) for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    before, expected = kept(model, x)
    with Scaling(norms):
        after, output = kept(model, x)
    assert torch.equal(output, expected)
    assert after < 0.65 * before


@pytest.mark.parametrize("change", ["train", "weight", "bias", "no_statistics"])
def test_a_norm_that_does_not_stand_still_runs_as_torch_has_it(change):
    norm = norm_of(nn.BatchNorm2d).float()
    if change == "train":
        norm.train()
    elif change == "no_statistics":
        norm.running_mean = norm.running_var = None
    else:
        getattr(norm, change).requires_grad_()
    twin, x = copy.deepcopy(norm), torch.randn(3, 5, 4, 4, requires_grad=True)
    expected = twin(x)
    expected.sin().sum().backward()
    grad, x.grad = x.grad, None
    with Scaling([norm]):
        output = norm(x)
    output.sin().sum().backward()
    assert torch.equal(output, expected)
    assert torch.equal(x.grad, grad)
    for ours, theirs in zip(norm.parameters(), twin.parameters(), strict=True):
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(norm.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_new_numbers_of_a_norm_are_taken():
    norm, x = norm_of(nn.BatchNorm2d), torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    with Scaling([norm]):
        first = torch.autograd.grad(norm(x).sum(), x)[0]
        norm.weight.mul_(2)
        torch.testing.assert_close(torch.autograd.grad(norm(x).sum(), x)[0], 2 * first)
        norm.running_var.add_(norm.eps).mul_(4).sub_(norm.eps)
        torch.testing.assert_close(torch.autograd.grad(norm(x).sum(), x)[0], first)
        norm.weight = nn.Parameter(-norm.weight, requires_grad=False)
        torch.testing.assert_close(torch.autograd.grad(norm(x).sum(), x)[0], -first)


def scale_of(norm):
    """What a gradient is multiplied with, by channel, and what that should be: weight / sqrt(var + eps)."""
    x = torch.randn(2, norm.num_features, 1, 1, dtype=norm.running_var.dtype, requires_grad=True)
    grad = torch.autograd.grad(norm(x).sum(), x)[0][0].flatten()
    weight = 1 if norm.weight is None else norm.weight
    return grad, (weight / (norm.running_var + norm.eps).sqrt()).detach()


def pass_in_train_mode(norm):
    norm.train()
    norm(10 * torch.randn(64, norm.num_features, 4, 4, dtype=torch.float64))
    norm.eval()


@pytest.mark.parametrize(
    "write",
    [
        lambda norm: norm.running_var.mul_(4),
        lambda norm: norm.running_var.data.mul_(4),  # counts no version, as training mode does not
        lambda norm: setattr(norm, "eps", 3.0),
        lambda norm: setattr(norm.weight, "data", 3 * norm.weight.data),
        pass_in_train_mode,
    ],
    ids=["written", "data", "eps", "weight", "train"],
)
def test_what_was_written_to_a_norm_counts_between_steps_and_within(write):
    norm = norm_of(nn.BatchNorm2d, momentum=1.0)
    scaling = Scaling([norm])
    with scaling:
        first = scale_of(norm)[0]
    for within in (True, False):
        if not within:
            write(norm)
        with scaling:
            if within:
                write(norm)
            torch.testing.assert_close(*scale_of(norm))
    assert not torch.allclose(scale_of(norm)[0], first)


class Half(nn.Module):
    def forward(self, weight):
        return weight * torch.bernoulli(torch.full_like(weight, 0.5))


def test_a_weight_that_is_drawn_is_drawn_once():
    norm = norm_of(nn.BatchNorm2d, 64)
    norm.bias.zero_()
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", Half())
    norm.requires_grad_(False)
    x = torch.full((1, 64, 1, 1), 1e3, dtype=torch.float64, requires_grad=True)
    with Scaling([norm]):
        output = norm(x)
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0] != 0, output != 0)


def test_a_copy_made_within_a_step_is_a_norm_of_its_own():
    norm = norm_of(BatchNormAct2d, act_layer=nn.Identity)
    with Scaling([norm]):
        twin = copy.deepcopy(norm)
        pickle.dumps(norm)
    twin.running_var.mul_(9)
    twin.act = nn.Tanh()
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    normal = (x - twin.running_mean.view(5, 1, 1)) / (twin.running_var + twin.eps).sqrt().view(5, 1, 1)
    torch.testing.assert_close(twin(x), (normal * twin.weight.view(5, 1, 1) + twin.bias.view(5, 1, 1)).tanh())


def test_norms_of_another_kind_run_as_they_are_and_nothing_is_left_on_any():
    class Own(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input) + 1

    norms = [nn.BatchNorm2d(3), Own(3), nn.BatchNorm2d(3)]
    norms[2].forward = lambda input: input
    x = torch.zeros(2, 3, 1, 1, requires_grad=True)
    with Scaling(norms):
        assert norms[1].eval()(x).mean() == 1
        assert norms[2](7) == 7
    assert ["forward" in norm.__dict__ for norm in norms] == [False, False, True]


@pytest.mark.parametrize("trains", [True, False])
def test_a_norm_without_parameters_stands_still_where_anything_does(trains):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Linear(4, 2))
    model[0].requires_grad_(trains)
    assert of(model) == ([] if trains else [model[1]])


def ddp_gradients():
    """Of the first process's statistics, which DDP hands to the second before its forward pass."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5).requires_grad_(False)).double().eval()
    wrapped, scaling, x = DistributedDataParallel(model), Scaling(of(model)), torch.randn(2, 3, 4, 4).double()
    found = []
    for _ in range(2):
        with scaling:
            wrapped(x).sin().sum().backward()
        found.append(model[0].weight.grad.clone())
        model.zero_grad()
        if rank == 0:
            model[1].running_var.mul_(9)
    torch.distributed.destroy_process_group()
    return found


def test_statistics_that_ddp_hands_round_are_those_of_the_backward_pass(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).double().eval()
    x = torch.randn(2, 3, 4, 4).double()
    expected = []
    for _ in range(2):
        model.zero_grad()
        model(x).sin().sum().backward()
        expected.append(model[0].weight.grad.clone())
        model[1].running_var.mul_(9)
    for found in together(tmp_path, ddp_gradients):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_what_has_another_number_of_dimensions_is_refused_as_torch_refuses_it():
    norm = norm_of(nn.BatchNorm2d)
    with Scaling([norm]), pytest.raises(ValueError, match="expected 4D input"):
        norm(torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_scale_of_a_norm_in_half_precision_is_not_rounded_on_the_way(dtype):
    """Nothing but the gradient itself is rounded, once: by half a unit in the last place at most."""
    norm = norm_of(nn.BatchNorm2d, 64).to(dtype)
    x = torch.randn(1, 64, 1, 1, dtype=dtype, requires_grad=True)
    with Scaling([norm]):
        grad = torch.autograd.grad(norm(x).sum(), x)[0].flatten().double()
    expected = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    assert ((grad - expected).abs() <= 0.51 * torch.finfo(dtype).eps * expected.abs()).all()


def test_transforms_and_forward_mode_take_the_operations_of_torch():
    norm, x = norm_of(nn.BatchNorm2d, 2), torch.randn(1, 2, 2, 2, dtype=torch.float64)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(1, 2, 1, 1)
    with Scaling([norm]):
        grad = torch.func.grad(lambda x: norm(x).sum())(x)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(norm(forward_ad.make_dual(x.clone().requires_grad_(), x))).tangent
        traced = torch.jit.trace(norm, x.clone().requires_grad_())
    torch.testing.assert_close(grad, scale.expand_as(x))
    torch.testing.assert_close(tangent, scale * x)
    assert torch.equal(traced(x), norm(x))


class Look(TrainerCallback):
    """Counts the norms that run otherwise between two steps, and copies, saves and scripts the network there."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(count(model))
        torch.save(copy.deepcopy(model), io.BytesIO())
        torch.jit.script(model[1])


def count(model):
    return sum("forward" in module.__dict__ for module in model.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("method", "expected"), [(LinearProbe("linear_probe"), 1), (Full("full"), 0)], ids=["frozen", "full"]
)
def test_a_step_runs_the_norms_that_it_freezes_so_and_leaves_them_as_they_were(tmp_path, monkeypatch, method, expected):
    within, forward = [], Trainer.compute_loss

    def spied(trainer, model, inputs, **kwargs):
        within.append(count(model))
        return forward(trainer, model, inputs, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", spied)
    run, look = toy_run(tmp_path, method, max_steps=2), Look()
    run.watching = [look]
    run.train()
    assert (within[:2], look.seen) == ([expected] * 2, [0, 0])
