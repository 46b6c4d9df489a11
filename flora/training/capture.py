"""A training step as CUDA graphs: what a step launches is recorded once and then replayed in a few launches."""

import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePath
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from flora.errors import CaptureFailed, first_line
from flora.training import internals
from flora.training.resume import rng_state, set_rng_state
from flora.training.settings import TrainerSettings

WARM_UP = 3  # eager calls with a shape before its capture: kernels are chosen, the optimizer's state is made
MAX_SHAPES = 32  # of batches that have graphs, which take memory of the host and the GPU's driver
LEAST_STEPS = 50  # of a fit that auto captures steps of
LEAST_REPLAYS = 40  # of a shape that auto captures: a capture takes as long as a few steps, and saves a part of each
_SYNCHRONISING = "synchronizing CUDA operation"  # what torch's sync debug mode warns of
_MASKS = ("transformers", "masking_utils.py")  # asks whether a mask hides anything, but not in a capture

Batch = dict[str, Tensor]
Result = TypeVar("Result")


def wanted(settings: TrainerSettings, steps: int) -> bool:
    """Whether a fit of so many steps is to replay them as graphs where it can."""
    if settings.cuda_graph == "auto":
        return settings.on_gpu and settings.may_capture and steps >= LEAST_STEPS
    if settings.cuda_graph and not settings.on_gpu:
        say_once("trainer.cuda_graph needs a GPU: this run is not captured")
    return bool(settings.cuda_graph) and settings.on_gpu


class Recorder:
    """Captures functions on one stream, into one memory pool."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], Result]) -> Callable[[], Result]:
        """Record what ``function`` launches, without running it; returns what replays it and gives its result.

        The function may only use tensors that stay where they are. Its results are overwritten by every replay.

        Raises:
            CaptureFailed: for this reason. The GPU's random numbers go on as if nothing had been tried; they are no
                longer those of the graphs that were captured before.
        """
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        fresh = generator.clone_state()
        try:
            # "thread_local": another thread, such as one that pins memory, may go on calling CUDA.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = function()
        except BaseException as error:
            # torch leaves its stream current, its generator and its allocator in capture mode.
            torch.cuda.set_stream(current)
            generator.graphsafe_set_state(fresh)
            internals.abandon(graph, self.pool)
            if not isinstance(error, Exception):
                raise
            # That the capture cannot be ended is the error of an error.
            raise CaptureFailed(first_line(error.__context__ or error)) from error

        def replay() -> Result:
            graph.replay()
            return result

        return replay

    def run_beside(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run eagerly on the stream that captures, as a warm-up must; the current stream waits for the result."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function(*arguments)
        current.wait_stream(self.stream)
        return result

    def room(self) -> bool:
        """Whether what steps have taken at most is free twice: graphs keep theirs, evaluations need some beside."""
        free, _ = torch.cuda.mem_get_info()
        held = torch.cuda.memory_allocated()
        return free + torch.cuda.memory_reserved() - held >= 2 * (torch.cuda.max_memory_allocated() - held)


@dataclass
class _Shape:
    """Batches of one shape: how many there were, the place of those that are replayed, graphs by ``first``."""

    calls: int = 0
    batch: Batch = field(default_factory=dict)
    replays: dict[bool, Callable[[], Tensor]] = field(default_factory=dict)


class CapturedStep:
    """Forward and backward of a micro-batch, captured after a few eager calls where that is possible.

    Equal to calling ``function``: random numbers are drawn anew by every replay, gradients add up over micro-batches.
    Each shape of batches has graphs of its own, once it has come ``WARM_UP`` times, for the first ``MAX_SHAPES``
    shapes; all leave their gradients in the same places. Other batches, such as an epoch's last, run eagerly. So does
    everything from then on where the function waits for the GPU, draws random numbers on the CPU, or trains other
    parameters with a batch than with another, and where a capture fails: ``refusal`` then says why.

    Attributes:
        replayed: whether steps are replayed, also after ``release``.

    Args:
        function: ``(batch, parts) -> loss``, detached; adds the gradients of ``loss / parts``.
        parameters: what is trained.
        insists: raise CaptureFailed where a capture fails, and capture whatever that takes. Else shapes are captured
            that leave memory for evaluations and seem to come ``LEAST_REPLAYS`` times more.
        calls: how many micro-batches there will be.
    """

    def __init__(
        self,
        function: Callable[[Batch, int], Tensor],
        parameters: Sequence[nn.Parameter],
        insists: bool = True,
        calls: float = math.inf,
    ) -> None:
        self.function = function
        self.parameters = list(parameters)
        self.insists = insists
        self.recorder = Recorder()
        self.refusal: str | None = None
        self.replayed = False
        self._calls, self._seen, self._eager_calls = calls, 0, 0
        self._asks_masks = False
        self._shapes: dict[Any, _Shape] = {}
        self._gradients: list[Tensor | None] = []
        self._after: dict[str, Callable[[], Any]] = {}

    @property
    def captured(self) -> bool:
        """Whether the gradients now stay where they are, so that what uses them may be captured as well."""
        return bool(self._gradients)

    def __call__(self, batch: Batch, parts: int = 1) -> Tensor:
        """The loss of a micro-batch, one of ``parts``; its gradients are in, or were added to, ``parameter.grad``."""
        if self.refusal is None and not all(isinstance(value, Tensor) for value in batch.values()):
            self._refuse("takes more than tensors")
        if self.refusal is not None:
            return self.function(batch, parts)
        first = all(parameter.grad is None for parameter in self.parameters)
        kinds = sorted((name, tensor.shape, tensor.dtype) for name, tensor in batch.items())
        shape = self._shapes.setdefault((parts, *kinds), _Shape())
        shape.calls, self._seen = shape.calls + 1, self._seen + 1
        if not (self._fits(shape, first) and self._shown(batch) and self._capture(shape, batch, parts, first)):
            return self._eager(batch, parts)
        for name, tensor in shape.batch.items():
            tensor.copy_(batch[name])
        loss = shape.replays[first]()
        if first:
            self._point_at_gradients()
        return loss

    def release(self) -> None:
        """Give back the memory of the graphs, when a fit has ended."""
        for parameter in self.parameters if self.captured else ():
            parameter.grad = None
        self._gradients, self._shapes, self._after = [], {}, {}

    def after(self, name: str, function: Callable[[], Result], eager: Callable[[], Result] | None = None) -> Result:
        """Run what takes the gradients, replayed too once they stay where they are; where not, ``eager`` if given."""
        if self.captured and name not in self._after:
            with self._tried():
                self._after[name] = self.recorder.capture(function)
        return self._after.get(name, eager or function)()

    def _fits(self, shape: _Shape, first: bool) -> bool:
        """Whether a batch of this shape may be replayed, perhaps after a capture."""
        if first in shape.replays:
            return True
        if shape.calls <= WARM_UP or self._eager_calls < WARM_UP:
            return False
        if not first:  # adds to gradients that are where the first batch of a step, of whatever shape, has left them
            return bool(shape.replays)
        if not self.insists and shape.calls / self._seen * (self._calls - self._seen) < LEAST_REPLAYS:
            return False
        return sum(bool(known.replays) for known in self._shapes.values()) < MAX_SHAPES

    def _shown(self, batch: Batch) -> bool:
        """Whether attention takes this batch's mask: where it hides nothing, transformers leaves it out when eager."""
        return not (self._asks_masks and "attention_mask" in batch and bool(batch["attention_mask"].all()))

    def _capture(self, shape: _Shape, batch: Batch, parts: int, first: bool) -> bool:
        """Capture what a batch of this shape needs, if that is not done; whether it can now be replayed."""
        if first in shape.replays:
            return True
        if not self.insists and not self.recorder.room():
            if not self.captured:
                self._refuse("leaves too little memory for graphs beside it")
            return False
        shape.batch = shape.batch or {name: tensor.clone() for name, tensor in batch.items()}
        before = [parameter.grad for parameter in self.parameters]
        same, drawn, state = True, _cpu_generators(), rng_state(cuda=False)

        def step() -> Tensor:
            nonlocal same
            loss = self.function(shape.batch, parts)
            if first and self._gradients:
                same = self._settle()
            return loss

        with self._tried():
            shape.replays[first] = self.recorder.capture(step)
        if self.refusal is None and first:
            self._gradients = self._gradients or [parameter.grad for parameter in self.parameters]
            self.replayed = True
        for parameter, gradient in zip(self.parameters, before, strict=True):
            parameter.grad = gradient
        if _cpu_generators() != drawn:
            set_rng_state(state, cuda=False)
            self._refuse("draws random numbers on the CPU")
        elif not same:
            self._refuse(_OTHERS)
        return self.refusal is None

    @contextmanager
    def _tried(self) -> Iterator[None]:
        """Around a capture: where it fails, everything goes on eagerly, or an error says so."""
        try:
            yield
        except CaptureFailed as error:
            if self.insists:
                raise CaptureFailed(f"the step cannot be captured ({error}): set trainer.cuda_graph=false") from error
            self._refuse(f"cannot be captured ({error})")

    def _refuse(self, why: str) -> None:
        if self.refusal is None:
            kind = "warning: " if self.insists else ""
            say_once(f"trainer.cuda_graph: the step {why}, so it is not captured", kind)
        self.refusal, self.replayed = self.refusal or why, False
        self._gradients, self._shapes, self._after = [], {}, {}

    def _eager(self, batch: Batch, parts: int) -> Tensor:
        self._eager_calls += 1
        if self.refusal is not None:
            return self.function(batch, parts)
        if not self.captured:
            return self._warm_up(batch, parts)
        loss = self.function(batch, parts)
        if not self._settle():
            self._refuse(_OTHERS)
        return loss

    def _warm_up(self, batch: Batch, parts: int) -> Tensor:
        if self._eager_calls != WARM_UP:
            return self.recorder.run_beside(self.function, batch, parts)
        loss, refusal, self._asks_masks = watched(lambda: self.recorder.run_beside(self.function, batch, parts))
        if refusal is not None:
            self._refuse(refusal)
        return loss

    def _settle(self) -> bool:
        """Move gradients that are elsewhere to where they stay; False where other parameters have some.

        A captured optimizer would leave out what had none before, and take an old one of what has none now.
        """
        pairs = [(there, p.grad) for p, there in zip(self.parameters, self._gradients, strict=True)]
        if any((there is None) != (now is None) for there, now in pairs):
            return False
        moved = [(there, now) for there, now in pairs if there is not None and now is not None and there is not now]
        if moved:
            internals.fill([there for there, _ in moved], [now for _, now in moved])
            self._point_at_gradients()
        return True

    def _point_at_gradients(self) -> None:
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient


_OTHERS = "does not train the same parameters with every batch"


class CapturedAdamW(torch.optim.AdamW):
    """AdamW whose step is captured once the gradients that it takes are; learning rates may change.

    Its groups keep plain numbers as learning rates, for the scheduler and the log; the graph reads copies on the GPU.
    Those are of single precision, and eager steps round to it too, so that both make the same weights bit for bit.
    """

    _step_before: CapturedStep | None = None
    _rates: Sequence[Tensor] = ()

    def follow(self, step: CapturedStep) -> None:
        """Take the gradients of ``step``."""
        self._step_before, self._rates = step, ()

    def step(self, closure: Any = None) -> Any:
        """One optimizer step."""
        if closure is not None or self._step_before is None or not self._step_before.captured:
            return self._eagerly(closure)
        if not self._rates:
            device = self.param_groups[0]["params"][0].device
            self._rates = [torch.zeros((), device=device) for _ in self.param_groups]
        for rate, group in zip(self._rates, self.param_groups, strict=True):
            rate.fill_(group["lr"])
        return self._step_before.after("optimizer", self._with_rates, self._eagerly)

    def _eagerly(self, closure: Any = None) -> Any:
        with self._given([float(np.float32(group["lr"])) for group in self.param_groups], capturable=False):
            return super().step(closure)

    def _with_rates(self) -> Any:
        with self._given(self._rates, capturable=True):
            return super().step()

    @contextmanager
    def _given(self, rates: Sequence[Any], capturable: bool) -> Iterator[None]:
        kept = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group.update(lr=rate, capturable=capturable)
        try:
            yield
        finally:
            for group, rate in zip(self.param_groups, kept, strict=True):
                group.update(lr=rate, capturable=False)


def watched(function: Callable[[], Result]) -> tuple[Result, str | None, bool]:
    """Run a function and look at what it does that a CUDA graph would not repeat.

    Returns:
        its result, what that is (None if nothing), and whether transformers asked what a mask hides.
    """
    before = _cpu_generators()
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = function()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    waits = [warning.filename for warning in caught if _SYNCHRONISING in str(warning.message)]
    masks = [name for name in waits if PurePath(name).parts[-2:] == _MASKS]
    if len(waits) > len(masks):
        return result, "waits for the GPU", bool(masks)
    return result, None if _cpu_generators() == before else "draws random numbers on the CPU", bool(masks)


def _cpu_generators() -> list[Any]:
    numpy = np.random.get_state(legacy=False)
    return [torch.get_rng_state().tolist(), random.getstate(), {k: str(v) for k, v in numpy["state"].items()}]


@cache
def say_once(text: str, kind: str = "warning: ") -> None:
    """A line on stderr, the first time only."""
    print(f"{kind}{text}", file=sys.stderr, flush=True)
