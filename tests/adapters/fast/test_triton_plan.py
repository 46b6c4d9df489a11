"""Weights of all layers built in common launches: the numbers of float64, layer by layer.

The tests run on a GPU, or in Triton's interpreter, which the last one starts.
"""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flora
from flora.adapters.fast.batched import INTERPRETED, TritonPlan
from tests.adapters.fast.nets import TARGETS, Net, built, layer_by_layer, plans_of, together

ready = pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def adapted(memory_format=torch.contiguous_format, **settings) -> peft.PeftModel:
    torch.manual_seed(1)
    base = Net().to(DEVICE, memory_format=memory_format)
    settings = {"target_modules": TARGETS, "r": 3, "init_weights": False, "forward": "merged", "scale": 0.7} | settings
    return together(peft.get_peft_model(base, flora.FloraConfig(**settings)))


def exact(model: peft.PeftModel) -> peft.PeftModel:
    """A twin in float64, every layer of which builds its own weight."""
    return layer_by_layer(model).double()


def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 3, 6, 6, device=DEVICE)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    F.cross_entropy(model(x), torch.arange(len(x), device=DEVICE) % 4).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.requires_grad}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(actual[name], value, rtol=0, atol=rtol * value.abs().max().item())


def kinds(model: peft.PeftModel) -> dict[str, int]:
    """How many layers each kind of plan built."""
    return {type(plan).__name__: sum(len(s.layers) for s in plan.stacks) for plan in plans_of(model)}


@ready
@pytest.mark.parametrize(
    ("ranks", "memory_format"),
    [
        ({}, torch.contiguous_format),
        ({}, torch.channels_last),
        ({"kernel_rank": 1}, torch.channels_last),
        ({"r": 16, "kernel_rank": 3}, torch.contiguous_format),
    ],
)
def test_outputs_and_gradients_are_those_of_float64(ranks, memory_format):
    model, x = adapted(memory_format, **ranks), images()
    twin = exact(model)
    torch.testing.assert_close(model(x).double(), twin(x.double()), rtol=0, atol=1e-6)
    assert kinds(model) == {"TritonPlan": 11}
    assert_near(gradients(model, x), gradients(twin, x.double()), 1e-4)


@ready
@FORMATS
def test_each_weight_is_the_base_plus_the_delta_rounded_once(memory_format):
    model = adapted(memory_format)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = built(model, images())
    assert len(found) == 11
    for layer, prepared in found.items():
        weight = prepared["weight"]
        expected = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
        assert weight.dtype == torch.bfloat16
        assert weight.dim() != 4 or weight.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(weight.double(), expected, rtol=2**-7, atol=1e-6)  # the interpreter cuts off


@ready
def test_gradients_add_up_and_new_parameters_and_base_weights_are_seen():
    model, x = adapted(), images()
    before = gradients(exact(model), x.double())
    gradients(model, x)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tucker" in name:
                parameter.mul_(1.1)
        for layer in model.block.layers:
            layer.base_layer.weight.data = layer.base_layer.weight.data * 0.9  # at another address
    after = gradients(exact(model), x.double())
    assert_near(gradients(model, x), {name: before[name] + after[name] for name in before}, 1e-4)


@ready
def test_another_memory_layout_and_dtype_of_adapters_are_seen():
    model, x = adapted(), images()
    model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x).double(), exact(model)(x.double()), rtol=0, atol=1e-5)
    assert kinds(model) == {"TritonPlan": 11}
    model.bfloat16()
    for name, parameter in model.named_parameters():
        if "tucker" in name:
            parameter.data = parameter.data.float()  # as PEFT keeps the adapters of a half-precision model
    model(x.bfloat16())
    assert kinds(model) == {"TritonPlan": 11}
    model.bfloat16()
    torch.testing.assert_close(model(x.bfloat16()).double(), exact(model)(x.double()), rtol=0.1, atol=0.05)
    assert kinds(model) == {"TorchPlan": 11}


@ready
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_factor_of_another_dtype_is_not_read_as_float32(dtype):
    model, x = adapted(), images()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert len(built(model, x)) == 11
        factor = model.block.layers[0].tucker_factors["default"].weight_0
        factor.data = factor.data.to(dtype)
        torch.testing.assert_close(model(x).double(), exact(model)(x.double()), rtol=0.1, atol=0.05)


@ready
def test_a_gradient_can_be_differentiated_again():
    model, x = adapted(), images()
    twin, gradients_of_both = exact(model), []
    for each, inputs in ((model, x), (twin, x.double())):
        parameters = [p for p in each.parameters() if p.requires_grad]
        once = torch.autograd.grad(each(inputs).square().mean(), parameters, create_graph=True)
        twice = torch.autograd.grad(sum(g.square().sum() for g in once), parameters)
        gradients_of_both.append({str(i): g.double() for i, g in enumerate(twice)})
    assert_near(*gradients_of_both, 1e-3)


@ready
def test_layers_that_it_cannot_take_are_built_stack_by_stack():
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)).to(DEVICE)
    base[2].weight = nn.Parameter(torch.randn(6, 1, device=DEVICE).T)
    config = flora.FloraConfig(target_modules=["0", "1", "2"], r=2, init_weights=False, forward="merged")
    model = together(peft.get_peft_model(base, config))
    x = torch.randn(4, 6, device=DEVICE)
    torch.testing.assert_close(model(x).double(), exact(model)(x.double()), rtol=1e-5, atol=1e-5)
    assert kinds(model) == {"TritonPlan": 2, "TorchPlan": 1}


@ready
def test_a_weight_of_more_elements_than_the_kernel_counts_is_not_taken():
    from flora.adapters.fast.triton_plan import takes

    model = adapted()
    model(images())
    stack = next(stack for stack in plans_of(model)[0].stacks if len(stack.described.shape) == 2)
    sizes = {elements: replace(stack.described, shape=(elements // 2**10, 2**10)) for elements in (2**31, 2**32)}
    assert [takes(replace(stack, described=described)) for described in sizes.values()] == [True, False]


SHAPES = [
    (nn.Conv2d(3, 8, 7), "TritonPlan"),  # a kernel wider than the input has channels
    (nn.Conv2d(4, 8, (3, 5), groups=4), "TritonPlan"),
    (nn.Conv1d(3, 6, 5), "TritonPlan"),
    (nn.Conv3d(2, 4, (3, 5, 7)), "TritonPlan"),
    (nn.ConvTranspose2d(6, 4, 3), "TritonPlan"),
    (nn.Conv2d(6, 1, (3, 1)), ("TritonPlan", "TorchPlan")),  # in channels-last order the rows come after the wide mode
]


@ready
@FORMATS
@pytest.mark.parametrize(("base", "kind"), SHAPES, ids=lambda value: str(value) if isinstance(value, nn.Module) else "")
def test_weights_of_any_shape(memory_format, base, kind):
    torch.manual_seed(0)
    base = nn.Sequential(copy.deepcopy(base).to(DEVICE))
    if base[0].weight.dim() == 4:
        base = base.to(memory_format=memory_format)
    config = flora.FloraConfig(
        target_modules=["0"], r=2, kernel_rank=2, init_weights=False, forward="merged", scale=0.5
    )
    model = together(peft.get_peft_model(base, config))
    twin = exact(model)
    x = torch.randn(2, base[0].in_channels, *[8] * (base[0].weight.dim() - 2), device=DEVICE)
    ours, theirs = model(x), twin(x.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)
    gradients_of_both = []
    for each, output in ((model, ours), (twin, theirs)):
        output.sin().sum().backward()
        gradients_of_both.append({name: p.grad.double() for name, p in each.named_parameters() if p.requires_grad})
    assert_near(*gradients_of_both, 1e-4)
    assert kinds(model) == {kind if isinstance(kind, str) else kind[memory_format == torch.channels_last]: 1}


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="the tests above have run")
@pytest.mark.skipif(torch.__version__ < "2.12", reason="the interpreter of its Triton fails with numpy 2.4")
def test_the_tests_above_in_tritons_interpreter():
    if TritonPlan is None:
        pytest.skip("Triton comes with torch for CUDA and ROCm only")
    # The interpreter is chosen when Triton is imported, so by a process of its own.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    files = [__file__, str(Path(__file__).with_name("test_triton_kernel.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "36 passed, 2 skipped" in done.stdout
