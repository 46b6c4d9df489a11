"""Steps replayed as CUDA graphs or compiled, data kept on the GPU: the numbers of the eager step, or a plain "no"."""

import dataclasses
import random

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F

from flora.adapters.fast import traced
from flora.errors import ConfigError
from flora.methods import Full
from flora.methods.peft import Peft
from flora.tasks.images.augment import Augment
from flora.tasks.images.dataset import ImageDataset
from flora.training import TrainerSettings, capture
from flora.training.meters import BusyShare
from tests.training.test_run import SPLITS, ToyModel, ToyTask, lora, toy_run

FULL = Full("full")


class Recorder:
    """A stand-in for ``capture.Recorder`` without a GPU: a replay overwrites what the capture made, as a graph does."""

    def __init__(self):
        self.captures = 0

    def run_beside(self, function, *arguments):
        return function(*arguments)

    def capture(self, function):
        self.captures += 1
        parameters = self.parameters
        adds = [p.grad is not None for p in parameters]
        kept = [None if p.grad is None else p.grad.clone() for p in parameters]
        result = function()
        made = [p.grad for p in parameters]
        for gradient, before in zip(made, kept, strict=True):
            if before is not None:
                gradient.copy_(before)  # a capture runs nothing

        def replay():
            for parameter, gradient, add in zip(parameters, made, adds, strict=True):
                assert not add or parameter.grad is gradient, "a graph adds to the gradients it was captured with"
                parameter.grad = None
            result.copy_(function())
            for parameter, gradient, add in zip(parameters, made, adds, strict=True):
                if gradient is not None:
                    gradient.copy_(gradient + parameter.grad if add else parameter.grad)
                parameter.grad = None if not add else gradient
            return result

        return replay


@pytest.fixture
def recorded(monkeypatch):
    """CapturedStep over the stand-in: ``make(function, parameters) -> step``."""

    def make(function, parameters):
        step = capture.CapturedStep(function, parameters)
        step.recorder.parameters = step.parameters
        return step

    monkeypatch.setattr(capture, "Recorder", Recorder)
    monkeypatch.setattr(capture, "watched", lambda function: (function(), None))
    return make


def quadratic(model):
    def function(batch, parts):
        loss = F.mse_loss(model(batch["x"]), batch["y"]) / parts
        loss.backward()
        return loss.detach()

    return function


def train(step, model, sizes, parts):
    """Losses of SGD over batches of these sizes, ``parts`` to a step."""
    torch.manual_seed(1)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for i, size in enumerate(sizes):
        losses.append(step({"x": torch.randn(size, 4), "y": torch.randn(size, 3)}, parts).clone())
        if (i + 1) % parts == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return losses


@pytest.mark.parametrize(
    ("sizes", "parts", "captures"),
    [
        ([8] * 7, 1, 1),
        ([8, 8, 8, 8, 5, 8, 8, 5], 1, 1),  # an incomplete batch at each epoch's end
        ([8] * 12, 2, 2),
        ([8, 8, 8, 8, 8, 5, 8, 8, 5, 8, 8, 8], 2, 2),  # as the later part of a step, and as the first
    ],
)
def test_a_captured_step_equals_the_eager_one(recorded, sizes, parts, captures):
    torch.manual_seed(0)
    eager, model = nn.Linear(4, 3), nn.Linear(4, 3)
    model.load_state_dict(eager.state_dict())
    expected = train(quadratic(eager), eager, sizes, parts)
    step = recorded(quadratic(model), model.parameters())
    assert train(step, model, sizes, parts) == expected
    assert torch.equal(model.weight, eager.weight)
    assert step.recorder.captures == captures, "otherwise this shows nothing"


def test_a_step_that_draws_on_the_cpu_is_refused_once_in_plain_words(recorded, monkeypatch, capsys):
    monkeypatch.setattr(capture, "watched", lambda function: (function(), "draws random numbers on the CPU"))
    capture.say_once.cache_clear()
    for _ in range(2):
        model = nn.Linear(4, 3)
        step = recorded(quadratic(model), model.parameters())
        train(step, model, [8] * 6, 1)
        assert (step.captured, step.recorder.captures) == (False, 0)
    expected = "warning: trainer.cuda_graph: the step draws random numbers on the CPU, so it is not captured\n"
    assert capsys.readouterr().err == expected


class Branches(nn.Module):
    """Two layers, of which a batch with images uses both."""

    def __init__(self):
        super().__init__()
        self.words, self.images = nn.Linear(4, 3), nn.Linear(2, 3)

    def loss(self, batch, parts):
        out = self.words(batch["x"])
        if "images" in batch:
            out = out + self.images(batch["images"])
        loss = out.square().mean() / parts
        loss.backward()
        return loss.detach()


def branches(images, device="cpu"):
    """Batches, some with images."""
    torch.manual_seed(1)
    batches = [{"x": torch.randn(8, 4), **({"images": torch.randn(8, 2)} if i else {})} for i in images]
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


WITH_AND_WITHOUT = [[0, 0, 0, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 0, 1, 0]]


@pytest.mark.parametrize("images", WITH_AND_WITHOUT)
def test_a_step_that_trains_other_parameters_goes_on_eagerly(recorded, capsys, images):
    capture.say_once.cache_clear()
    model = Branches()
    step = recorded(model.loss, model.parameters())
    for batch, shown in zip(branches(images), images, strict=True):
        model.zero_grad()
        step(batch)
        assert (model.images.weight.grad is not None) == bool(shown)
    assert (step.captured, step.recorder.captures) == (False, 1)
    assert capsys.readouterr().err.count("does not train the same parameters with every batch") == 1


def test_on_a_cpu_the_run_goes_on_eagerly_and_says_so(tmp_path, capsys):
    capture.say_once.cache_clear()
    plain = toy_run(tmp_path, FULL, max_steps=4, device="cpu").train()
    asked = toy_run(tmp_path, FULL, max_steps=4, device="cpu", cuda_graph=True, cache_on_device=True).train()
    assert asked.metrics == plain.metrics
    assert capsys.readouterr().err.count("warning: trainer.cuda_graph needs a GPU") == 1
    assert not any(asked.trainer.execution.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_compiled_run_of_flora_builds_its_weights_together(tmp_path, monkeypatch, dtype):
    used, compile = [], torch.compile

    def backend(graph, inputs):  # needs no C++ compiler
        weights = [node for node in graph.graph.nodes if any(of.target is traced.build for of in node.all_input_nodes)]
        used.append(sum(len(node.users) for node in weights))
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda run: compile(run, backend=backend))
    torch._dynamo.reset()
    settings = {"max_steps": 4, "device": "cpu", "log_every": 1, "dtype": dtype}
    flora = Peft("flora", "flora.FloraConfig", r=2, forward="merged")
    eager, compiled = (toy_run(tmp_path, flora, compile=how, **settings).train() for how in (False, True))
    assert used[0] >= 2
    if dtype == "fp32":
        assert_same_run(compiled, eager)
    assert compiled.trainer.execution["compile"]


@pytest.mark.slow
def test_a_compiled_run_equals_the_eager_one(tmp_path):
    both = [{"max_steps": 8, "device": "cpu", "log_every": 1, "compile": compiled} for compiled in (False, True)]
    eager, compiled = (toy_run(tmp_path, lora(), **settings).train() for settings in both)
    assert_same_run(compiled, eager)
    assert compiled.trainer.execution["compile"]


@pytest.mark.parametrize(
    "change",
    [{"cuda_graph": "yes"}, {"compile": 1}, {"cache_on_device": "never"}],
    ids=lambda change: next(iter(change)),
)
def test_wrong_switches_are_named(change):
    with pytest.raises(ConfigError, match=f"trainer.{next(iter(change))}"):
        TrainerSettings(epochs=1, lr=1, **change)


# ---------------------------------------------------------------------- on a GPU


def logged(run):
    return [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]


def assert_same_run(run, other, rtol=1e-4, atol=1e-5):
    """Equal logged losses and weights, up to rounding."""
    assert len(logged(run)) > 0
    assert logged(run) == pytest.approx(logged(other), rel=rtol)
    state = run.adapted.model.state_dict()
    for name, tensor in other.adapted.model.state_dict().items():
        if name != "0.bias":  # batch norm takes it out again: its gradient is noise, and Adam makes steps of that
            assert torch.allclose(state[name], tensor, rtol=rtol, atol=atol), name


def pair(tmp_path, method, **settings):
    """A captured run and an eager one, of equal seeds."""
    return [toy_run(tmp_path, method, cuda_graph=c, log_every=1, **settings).train() for c in (True, False)]


@pytest.fixture
def exact(monkeypatch):
    """fp32 without TF32, and deterministic kernels where torch has them."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"label_smoothing": 0.1, "weight_decay": 0.1},
        {"batch_size": 20},  # 96 examples: the last batch has 16
        {"batch_size": 40, "gradient_accumulation": 2},  # and the last step a smaller micro-batch
        {"max_grad_norm": 0.01},
        {"max_grad_norm": 0},
        {"dtype": "bf16"},
        {"cache_on_device": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", [lora(), FULL], ids=["lora", "full"])
def test_twenty_captured_steps_equal_eager_ones(tmp_path, exact, method, settings):
    captured, eager = pair(tmp_path, method, **({"max_steps": 20, "epochs": 10} | settings))
    assert captured.trainer.execution["cuda_graph"], captured.trainer.captured.refusal
    assert not eager.trainer.execution["cuda_graph"]
    bf16 = {"rtol": 2e-2, "atol": 5e-3}
    assert_same_run(captured, eager, **(bf16 if settings.get("dtype") == "bf16" else {}))


def add_layer(monkeypatch, layer):
    """Put a layer behind the toy model's first activation."""
    plain = ToyModel.build

    def build(self, num_classes, drop_path=0.0):
        model = plain(self, num_classes)
        model[2] = nn.Sequential(nn.ReLU(), layer())
        return model

    monkeypatch.setattr(ToyModel, "build", build)


@pytest.mark.gpu
def test_random_numbers_on_the_gpu_are_those_of_the_eager_run(tmp_path, exact, monkeypatch):
    add_layer(monkeypatch, lambda: nn.Dropout(0.3))
    monkeypatch.setattr(ToyTask, "augment", lambda self: Augment())
    captured, eager = pair(tmp_path, FULL, max_steps=20, epochs=10)
    assert captured.trainer.execution["cuda_graph"]
    assert_same_run(captured, eager)


@pytest.mark.gpu
def test_every_replay_draws_anew(tmp_path, exact, monkeypatch):
    add_layer(monkeypatch, lambda: nn.Dropout(0.3))
    run = toy_run(tmp_path, FULL, cuda_graph=True, log_every=1, max_steps=20, epochs=20, lr=1e-12, head_lr=1e-12)
    run.splits = dataclasses.replace(SPLITS, train=SPLITS.train.subset(16))  # one batch, always the same
    assert len(set(logged(run.train())[capture.WARM_UP :])) > 10


class Waiting(nn.Module):
    def forward(self, x):
        return x * (1.0 if x.sum().item() > 0 else 0.5)


class Drawing(nn.Module):
    def forward(self, x):
        return x * (1.0 if random.random() < 0.5 else 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("images", WITH_AND_WITHOUT)
def test_parameters_that_some_batches_do_not_train_move_as_eagerly(images):
    torch.manual_seed(0)
    eager = Branches().cuda()
    model = Branches().cuda()
    model.load_state_dict(eager.state_dict())
    plain = torch.optim.AdamW(eager.parameters(), lr=0.1)
    graphs = capture.CapturedAdamW(model.parameters(), lr=0.1)
    step = capture.CapturedStep(model.loss, list(model.parameters()))
    graphs.follow(step)
    for batch in branches(images, "cuda"):
        for optimizer, function in ((plain, lambda b: eager.loss(b, 1)), (graphs, step)):
            optimizer.zero_grad(set_to_none=True)
            function(batch)
            optimizer.step()
        for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("layer", "reason"), [(Waiting, "waits for the GPU"), (Drawing, "draws random numbers")])
def test_what_cannot_be_captured_runs_eagerly(tmp_path, exact, monkeypatch, capsys, layer, reason):
    capture.say_once.cache_clear()
    add_layer(monkeypatch, layer)
    captured, eager = pair(tmp_path, FULL, max_steps=8, epochs=10)
    assert reason in captured.trainer.captured.refusal
    assert capsys.readouterr().err.count(f"warning: trainer.cuda_graph: the step {reason}") == 1
    assert_same_run(captured, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("grey", [False, True])
def test_batches_gathered_on_the_gpu_are_those_of_the_host(tmp_path, grey):
    images = SPLITS.train.images[:, :1].expand(-1, 3, -1, -1) if grey else SPLITS.train.images
    data = ImageDataset(images, SPLITS.train.labels)
    there = data.to("cuda")
    assert there.nbytes == data.nbytes
    for chosen in ([3, 1, 90], list(range(96))):
        batch, expected = there.__getitems__(chosen), data.__getitems__(chosen)
        assert batch["pixel_values"].is_cuda
        assert all(torch.equal(batch[key].cpu(), expected[key]) for key in expected)
    cached, copied = (toy_run(tmp_path, lora(), cache_on_device=c, log_every=1).train() for c in (True, False))
    assert cached.trainer.execution["cached_on_device"]
    assert not copied.trainer.execution["cached_on_device"]
    assert_same_run(cached, copied, rtol=1e-6)


@pytest.mark.gpu
def test_the_gpu_is_busy_some_of_the_time():
    share, a = BusyShare(on_gpu=True), torch.randn(4096, 4096, device="cuda")
    share.start()
    for _ in range(60):
        for _ in range(20):
            a = (a @ a).clamp(-1, 1)
        torch.cuda.synchronize()
    share.stop()
    if share.read() is None:
        pytest.skip("NVML does not say how busy this GPU is")
    assert 0 < share.read() <= 1
