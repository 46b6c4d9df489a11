"""Timing of a training step: rounds of random order, on a GPU each method alone on the device, with its peak memory."""

import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import flora
from flora.bench.methods import Methods, Prepared
from flora.bench.networks import Network
from flora.bench.report import Measuring
from flora.training import frozen_norms

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch.compile
STEADY = 5  # steps of a compiled model before it is timed: mode reduce-overhead records in the second and the third
SPREAD = "interquartile range over all steps"


@dataclass(frozen=True)
class TimingSettings:
    """How much is measured.

    Attributes:
        rounds: each runs every method once, in an order of its own.
        steps: timed per round.
        warmup: untimed steps before them.
        capture: replay forward and backward as one CUDA graph.
        compile: the mode of torch.compile through which the forward pass runs; None: eagerly.
        stay: on a GPU, all models stay there between their turns, as they always do on a CPU.
        seed: of the orders, the weights, the adapters and the inputs.
    """

    rounds: int = 3
    steps: int = 10
    warmup: int = 3
    capture: bool = False
    stay: bool = False
    seed: int = 0
    compile: str | None = None


@dataclass
class Measured:
    """What was measured of one method.

    Attributes:
        rounds: milliseconds of every timed step, by round.
        peak_bytes: the device allocator's peak with nothing else on the device, warm-up included; None on a CPU.
        layers, trainable_params: see ``Prepared``.
        compile_seconds: wall time of the first steps, up to the last that took more than twice a later one.
        graphs, graph_breaks: what torch.compile made of the forward pass.
        error: why the method could not run.
    """

    rounds: list[list[float]] = field(default_factory=list)
    peak_bytes: int | None = None
    layers: int | None = None
    trainable_params: int | None = None
    compile_seconds: float | None = None
    graphs: int | None = None
    graph_breaks: int | None = None
    error: str | None = None

    @property
    def milliseconds(self) -> list[float]:
        """Every timed step."""
        return [ms for steps in self.rounds for ms in steps]


def measure(
    methods: Methods,
    names: Sequence[str],
    settings: TimingSettings,
    device: torch.device,
    report: Callable[[str], None] = lambda line: None,
    measuring: Measuring | None = None,
) -> dict[str, Measured]:
    """Time a step of every method; one that fails keeps its error and is left out of later rounds.

    On a GPU a model is built for its turn and dropped after it, so that its peak is its own. On a CPU, and where
    ``settings`` says so, all models stay, so that turns can be short and many: other processes then disturb every
    method alike. The peak on a GPU is then that of the warm-up before the first round, alone.

    Args:
        methods: on which network, with which ranks.
        names: which methods.
        settings: how often.
        device: where.
        report: told of every pass.
        measuring: of the script, which may be stopped within.
    """
    network = methods.network
    torch.manual_seed(settings.seed)
    base = network.build(device)
    results = {name: Measured() for name in names}
    ready: dict[str, Callable[[], None]] = {}
    order = random.Random(settings.seed)
    on_gpu = device.type == "cuda"
    first = 0 if on_gpu and settings.stay else 1
    turns = ((n, name) for n in range(first, 1 + settings.rounds) for name in order.sample(list(names), len(names)))
    with measuring or Measuring() as measuring:
        for number, name in turns:
            measured = results[name]
            if measured.error is None:
                alone = on_gpu and not (settings.stay and number)
                try:
                    if name not in ready:
                        _free(device)
                        ready[name] = _ready(methods, name, base, settings, device, measured)
                    if number:
                        measured.rounds.append(timed(ready[name], settings.steps, device))
                    if alone:
                        measured.peak_bytes = max(measured.peak_bytes or 0, torch.cuda.max_memory_allocated(device))
                    done = f"{statistics.median(measured.rounds[-1]):.2f} ms" if number else "runs"
                except Exception as error:  # reported in the method's row; the others go on
                    measured.error = done = summary(error)
                if alone or measured.error:
                    ready.pop(name, None)
                report(f"round {number} of {settings.rounds}: {name} {done}")
    for measured in results.values():
        if measuring.stopped and measured.error is None and not measured.rounds:
            measured.error = Measuring.UNMEASURED
    return results


def _ready(
    methods: Methods, name: str, base: nn.Module, settings: TimingSettings, device: torch.device, measured: Measured
) -> Callable[[], None]:
    """The step of a method on a fresh copy of the network, warmed up."""
    torch.manual_seed(settings.seed)
    prepared = methods.prepare(name, methods.network.copied(base, device), settings.compile is not None)
    measured.layers, measured.trainable_params = prepared.layers, prepared.trainable_params
    inputs = methods.network.inputs(device)
    if device.type == "cuda":
        _free(device)
        torch.cuda.reset_peak_memory_stats(device)
    step = Step(methods.network, prepared, inputs, settings.compile)
    if settings.compile is not None:
        _compile(step, max(settings.warmup, STEADY), device, measured)
        return step
    run = Captured(step, settings.warmup) if settings.capture else step
    for _ in range(settings.warmup):
        run()
    return run


def _compile(step: "Step", steps: int, device: torch.device, measured: Measured) -> None:
    """Run a step until it is compiled; notes what the first time took, and how many graphs it made."""
    from torch._dynamo import config
    from torch._dynamo.utils import counters

    stats, breaks = counters["stats"], counters["graph_break"]
    before = stats["unique_graphs"], breaks.total()
    with config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):  # methods share a network's code
        spent = [1e-3 * timed(step, 1, device)[0] for _ in range(steps)]
    slow = [i for i, seconds in enumerate(spent) if seconds > 2 * spent[-1]]
    if measured.compile_seconds is None:
        measured.compile_seconds = sum(spent[: slow[-1] + 1]) if slow else 0.0
        measured.graphs, measured.graph_breaks = stats["unique_graphs"] - before[0], breaks.total() - before[1]


def summary(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class Step:
    """Forward and backward, gradients anew; without an optimiser.

    Args:
        network: whose loss.
        prepared: the model.
        inputs: a batch on the model's device.
        compile: see ``TimingSettings``.
    """

    def __init__(
        self, network: Network, prepared: Prepared, inputs: dict[str, Tensor], compile: str | None = None
    ) -> None:
        self.network = network
        self.model = prepared.model
        self.inputs = inputs
        together: Any = flora.batched(self.model) if prepared.batched else None
        self._call: Any = self.model if together is None else together(self.model)
        self._compiled = compile is not None
        if self._compiled:
            self._call = torch.compile(self._call, mode=compile)
        # As train.py runs them.
        self._scaling = frozen_norms.Scaling([] if self._compiled else frozen_norms.of(self.model))
        self._with_gradients: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        self._with_gradients += prepared.starts
        if prepared.input_requires_grad:
            self._with_gradients.append(inputs["images"].requires_grad_())

    def __call__(self) -> None:
        """Run once."""
        self.forget()
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()  # the memory of the last step's outputs may be used again
        with self._scaling:
            self.network.loss(self._call, self.inputs).backward()

    def forget(self) -> None:
        """Drop the gradients."""
        for tensor in self._with_gradients:
            tensor.grad = None


class Captured:
    """A step as one CUDA graph, replayed on the same inputs.

    Args:
        step: kept, since the graph reads and writes the memory of its model.
        warmup: eager steps before the capture, at least three.
    """

    def __init__(self, step: Step, warmup: int) -> None:
        self.step = step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(max(warmup, 3)):
                step()
            step.forget()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step()

    def __call__(self) -> None:
        """Run once."""
        self.graph.replay()


def timed(run: Callable[[], Any], steps: int, device: torch.device) -> list[float]:
    """Milliseconds of every call; on a GPU the calls are queued back to back, as training queues them."""
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        torch.cuda.synchronize(device)
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]
    spent = []
    for _ in range(steps):
        started = time.perf_counter()
        run()
        spent.append(1000 * (time.perf_counter() - started))
    return spent


def spread(values: Sequence[float]) -> float:
    """The interquartile range; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
