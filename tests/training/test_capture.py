"""Steps replayed as CUDA graphs or compiled: the numbers of the eager step, or a plain "no"; without a GPU."""

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F

from flora.adapters.fast import traced
from flora.errors import CaptureFailed, ConfigError
from flora.methods import Full
from flora.methods.peft import Peft
from flora.training import TrainerSettings, capture
from tests.training.test_run import lora, toy_run

FULL = Full("full")


class Recorder:
    """A stand-in for ``capture.Recorder`` without a GPU: a replay overwrites what the capture made, as a graph does."""

    def __init__(self):
        self.captures, self.fails, self.full = 0, (), False

    def room(self):
        return not self.full

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
        if self.captures in self.fails:
            raise CaptureFailed("operation not permitted")

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
    """CapturedStep over the stand-in: ``make(function, parameters, insists, fails) -> step``.

    ``fails`` numbers the captures that fail.
    """

    def make(function, parameters, insists=True, fails=()):
        step = capture.CapturedStep(function, parameters, insists)
        step.recorder.parameters, step.recorder.fails = step.parameters, fails
        return step

    capture.say_once.cache_clear()
    monkeypatch.setattr(capture, "Recorder", Recorder)
    monkeypatch.setattr(capture, "watched", lambda function: (function(), None, False))
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
        ([8, 5, 3] * 6, 1, 3),  # texts of three lengths
        ([8, 8, 5, 5, 8, 5, 5, 8] * 4, 2, 4),  # a step of two parts each, of equal and of different lengths
    ],
)
def test_a_captured_step_equals_the_eager_one(recorded, sizes, parts, captures):
    eager, model = twins()
    expected = train(quadratic(eager), eager, sizes, parts)
    step = recorded(quadratic(model), model.parameters())
    assert train(step, model, sizes, parts) == expected
    assert torch.equal(model.weight, eager.weight)
    assert step.recorder.captures == captures, "otherwise this shows nothing"


def twins(make=lambda: nn.Linear(4, 3)):
    """Two networks of equal weights."""
    torch.manual_seed(0)
    eager, model = make(), make()
    model.load_state_dict(eager.state_dict())
    return eager, model


def test_what_graphs_hold_is_given_back_at_the_end(recorded):
    _, model = twins()
    step = recorded(quadratic(model), model.parameters())
    train(step, model, [8] * 5, 2)  # the last step is not whole
    assert (step.captured, model.weight.grad is None) == (True, False)
    step.release()
    assert (step.captured, step.replayed, model.weight.grad) == (False, True, None)


def test_no_more_shapes_have_graphs_than_are_allowed(recorded, monkeypatch):
    monkeypatch.setattr(capture, "MAX_SHAPES", 2)
    eager, model = twins()
    sizes = [8, 5, 3, 2] * 6
    step = recorded(quadratic(model), model.parameters())
    assert train(step, model, sizes, 1) == train(quadratic(eager), eager, sizes, 1)
    assert torch.equal(model.weight, eager.weight)
    assert step.recorder.captures == 2


@pytest.mark.parametrize(
    ("sizes", "parts", "fails"),
    [
        ([8] * 7, 1, 1),
        ([8] * 12, 2, 2),  # the second part of a step, whose first has left its gradients
        ([8, 5] * 6, 1, 2),  # the second length: what the first has must not be used any more
    ],
)
def test_where_a_capture_fails_the_run_goes_on_eagerly_or_says_so(recorded, capsys, sizes, parts, fails):
    eager, model = twins()
    step = recorded(quadratic(model), model.parameters(), insists=False, fails=[fails])
    assert train(step, model, sizes, parts) == train(quadratic(eager), eager, sizes, parts)
    assert torch.equal(model.weight, eager.weight)
    assert (step.captured, step.recorder.captures) == (False, fails)
    said = "trainer.cuda_graph: the step cannot be captured (operation not permitted), so it is not captured\n"
    assert capsys.readouterr().err == said
    insisting = recorded(quadratic(model), model.parameters(), fails=[fails])
    with pytest.raises(CaptureFailed, match=r"cannot be captured \(operation not permitted\): set trainer.cuda_graph="):
        train(insisting, model, sizes, parts)


def test_what_follows_a_step_runs_eagerly_where_its_capture_fails(recorded):
    _, model = twins()
    step = recorded(quadratic(model), model.parameters(), insists=False, fails=[2])
    batch, ran = {"x": torch.randn(8, 4), "y": torch.randn(8, 3)}, []
    for _ in range(6):
        model.zero_grad()
        step(batch)
        step.after("optimizer", lambda: None, lambda: ran.append("eager"))
    assert ran == ["eager"] * 6
    assert "cannot be captured" in step.refusal


def test_random_numbers_drawn_on_the_cpu_in_a_capture_are_not_lost(recorded):
    def noisy(model):
        calls = []

        def function(batch, parts):
            calls.append(0)
            noise = torch.rand(()) if len(calls) > 3 else 1.0  # not in the calls that are looked at
            loss = F.mse_loss(model(batch["x"]), batch["y"]) * noise
            loss.backward()
            return loss.detach()

        return function

    eager, model = twins()
    step = recorded(noisy(model), model.parameters(), insists=False)
    assert train(step, model, [8] * 7, 1) == train(noisy(eager), eager, [8] * 7, 1)
    assert step.refusal == "draws random numbers on the CPU"


@pytest.mark.parametrize(("calls", "captures"), [(70, 0), (160, 2)])
def test_auto_captures_a_shape_that_seems_to_come_often_enough(recorded, calls, captures):
    """Of two lengths in turn each comes half of the calls; LEAST_REPLAYS of them must be left after a few."""
    _, model = twins()
    step = recorded(quadratic(model), model.parameters(), insists=False)
    step._calls = calls
    train(step, model, [8, 5] * 10, 1)
    assert (step.recorder.captures, step.refusal) == (captures, None)


def test_auto_leaves_memory_for_evaluations(recorded):
    _, model = twins()
    step = recorded(quadratic(model), model.parameters(), insists=False)
    step.recorder.full = True
    train(step, model, [8] * 6, 1)
    assert "too little memory" in step.refusal
    assert step.recorder.captures == 0


def test_batches_that_hold_more_than_tensors_run_eagerly(recorded):
    step = recorded(lambda batch, parts: torch.tensor(float(len(batch["names"]))), [nn.Parameter(torch.zeros(1))])
    assert [step({"names": ["a", "b"]}).item() for _ in range(5)] == [2.0] * 5
    assert step.refusal == "takes more than tensors"


MASKED = {"x": torch.ones(2, 4), "attention_mask": torch.tensor([[1, 1], [1, 0]])}


@pytest.mark.parametrize(("hides", "captures"), [(True, 1), (False, 0)])
def test_a_batch_without_padding_runs_eagerly_where_its_mask_is_left_out(recorded, monkeypatch, hides, captures):
    monkeypatch.setattr(capture, "watched", lambda function: (function(), None, True))
    layer = nn.Linear(4, 1)

    def function(batch, parts):
        loss = layer(batch["x"]).mean()
        loss.backward()
        return loss.detach()

    step = recorded(function, layer.parameters())
    mask = MASKED["attention_mask"] if hides else torch.ones(2, 2)
    for _ in range(6):
        layer.zero_grad()
        step(MASKED | {"attention_mask": mask})
    assert (step.recorder.captures, step.refusal) == (captures, None)


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [
        ({}, 50, True),
        ({}, 49, False),
        ({"cuda_graph": True}, 1, True),
        ({"cuda_graph": False}, 50, False),
        ({"device": "cpu"}, 50, False),
        ({"dtype": "bf16"}, 50, True),
        ({"dtype": "fp16"}, 50, False),
        ({"compile": True}, 50, False),
        ({"gradient_checkpointing": True}, 50, False),
    ],
)
def test_auto_captures_where_that_is_right_and_pays(monkeypatch, settings, steps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert capture.wanted(TrainerSettings(epochs=1, lr=1, **settings), steps) == expected


def test_auto_captures_in_one_process(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not capture.wanted(TrainerSettings(epochs=1, lr=1), 1000)


def test_rates_are_of_single_precision_as_a_graph_reads_them():
    rate = torch.tensor(0.1).item()
    assert rate != 0.1
    weights = [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2)]
    optimizer = capture.CapturedAdamW(weights[:1], lr=0.1)
    for weight, stepped in zip(weights, (optimizer, torch.optim.AdamW(weights[1:], lr=rate)), strict=True):
        weight.grad = torch.ones_like(weight)
        stepped.step()
    assert torch.equal(*weights)
    assert optimizer.param_groups[0]["lr"] == 0.1, "the scheduler and the log keep theirs"


def test_a_step_that_draws_on_the_cpu_is_refused_once_in_plain_words(recorded, monkeypatch, capsys):
    monkeypatch.setattr(capture, "watched", lambda function: (function(), "draws random numbers on the CPU", False))
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
    model = Branches()
    step = recorded(model.loss, model.parameters())
    for batch, shown in zip(branches(images), images, strict=True):
        model.zero_grad()
        step(batch)
        assert (model.images.weight.grad is not None) == bool(shown)
    assert (step.captured, step.recorder.captures) == (False, 1)
    assert capsys.readouterr().err.count("does not train the same parameters with every batch") == 1


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


def test_on_a_cpu_the_run_goes_on_eagerly_and_says_so(tmp_path, capsys):
    capture.say_once.cache_clear()
    plain = toy_run(tmp_path, FULL, max_steps=4, device="cpu").train()
    asked = toy_run(tmp_path, FULL, max_steps=4, device="cpu", cuda_graph=True, cache_on_device=True).train()
    assert asked.metrics == plain.metrics
    assert capsys.readouterr().err.count("warning: trainer.cuda_graph needs a GPU") == 1
    assert not any(asked.trainer.execution.values())


def test_auto_says_nothing_on_a_cpu(tmp_path, capsys):
    capture.say_once.cache_clear()
    run = toy_run(tmp_path, FULL, max_steps=60, epochs=20, device="cpu", cuda_graph="auto")
    assert not run.train().trainer.execution["cuda_graph"]
    assert "cuda_graph" not in capsys.readouterr().err


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
