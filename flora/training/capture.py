"""A training step as CUDA graphs, what it launches recorded once and replayed in a few launches; or compiled."""

import contextlib
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flora.errors import CaptureFailed, first_line

WARM_UP = 3  # eager calls before a capture: kernels are chosen, the optimizer's state is made
_SYNCHRONISING = "synchronizing CUDA operation"  # what torch's sync debug mode warns of

Batch = dict[str, Tensor]


def compiled(model: nn.Module, together: Any, dtype: str) -> Callable[..., Any]:
    """The network's forward pass through torch.compile.

    Args:
        model: the network, as accelerate wraps it.
        together: a block of ``flora.batched``, entered within what is compiled; a null context: none. Not around DDP,
            at which torch.compile breaks the graph.
        dtype: that of autocast, or ``fp32``. The block is entered under the autocast that the network enters later.
    """
    if isinstance(together, contextlib.nullcontext) or isinstance(model, nn.parallel.DistributedDataParallel):
        return torch.compile(model)
    run = together(model)
    if dtype == "fp32":
        return torch.compile(run)
    kind, cast = next(model.parameters()).device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(kind, cast):
            return run(*args, **kwargs)

    return torch.compile(forward)


class Recorder:
    """Captures functions on one stream, into one memory pool."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Record what ``function`` launches, without running it; returns what replays it and gives its result.

        The function may only use tensors that stay where they are. Its results are overwritten by every replay.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": another thread, such as one that pins memory, may go on calling CUDA.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = function()
        except RuntimeError as error:  # torch's generator is left in capture mode: the run cannot go on eagerly
            reason = first_line(error)
            raise CaptureFailed(f"the step cannot be captured ({reason}): set trainer.cuda_graph=false") from error

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def run_beside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run eagerly on the stream that captures, as a warm-up must; the current stream waits for the result."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function(*arguments)
        current.wait_stream(self.stream)
        return result


class CapturedStep:
    """Forward and backward of a micro-batch, captured after a few eager calls where that is possible.

    Equal to calling ``function``: random numbers are drawn anew by every replay, gradients add up over micro-batches.
    A batch of other shapes, such as an epoch's last, runs eagerly, and so does everything where the function waits for
    the GPU, draws random numbers on the CPU, or, from then on, where a batch trains other parameters than the captured
    one: ``refusal`` then says why.

    Args:
        function: ``(batch, parts) -> loss``, detached; adds the gradients of ``loss / parts``.
        parameters: what is trained.
    """

    def __init__(self, function: Callable[[Batch, int], Tensor], parameters: Sequence[nn.Parameter]) -> None:
        self.function = function
        self.parameters = list(parameters)
        self.recorder = Recorder()
        self.refusal: str | None = None
        self._calls = 0
        self._batch: Batch = {}
        self._parts = 0
        self._gradients: list[Tensor | None] = []
        self._replays: dict[bool, Callable[[], Tensor]] = {}

    @property
    def captured(self) -> bool:
        """Whether the gradients now stay where they are, so that what uses them may be captured as well."""
        return bool(self._gradients)

    def __call__(self, batch: Batch, parts: int = 1) -> Tensor:
        """The loss of a micro-batch, one of ``parts``; its gradients are in, or were added to, ``parameter.grad``."""
        if self.refusal is not None:
            return self.function(batch, parts)
        first = all(parameter.grad is None for parameter in self.parameters)
        if not self.captured:
            if self._calls < WARM_UP or not first:
                self._calls += 1
                return self._warm_up(batch, parts)
            self._batch = {name: tensor.clone() for name, tensor in batch.items()}
            self._parts = parts
        if not self._fits(batch, parts):
            return self._eager(batch, parts)
        for name, tensor in self._batch.items():
            tensor.copy_(batch[name])
        return self._replay(first)

    def _warm_up(self, batch: Batch, parts: int) -> Tensor:
        if self._calls != WARM_UP:
            return self.recorder.run_beside(self.function, batch, parts)
        loss, self.refusal = watched(lambda: self.recorder.run_beside(self.function, batch, parts))
        if self.refusal is not None:
            self._say()
        return loss

    def _say(self) -> None:
        say_once(f"trainer.cuda_graph: the step {self.refusal}, so it is not captured")

    def _fits(self, batch: Batch, parts: int) -> bool:
        return (
            parts == self._parts
            and batch.keys() == self._batch.keys()
            and all(batch[k].shape == t.shape and batch[k].dtype == t.dtype for k, t in self._batch.items())
        )

    def _replay(self, first: bool) -> Tensor:
        # Two graphs: the first micro-batch of a step makes the gradients, later ones add to them.
        if first not in self._replays:
            self._replays[first] = self.recorder.capture(lambda: self.function(self._batch, self._parts))
            self._gradients = self._gradients or [parameter.grad for parameter in self.parameters]
        loss = self._replays[first]()
        if first:
            for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
                parameter.grad = gradient
        return loss

    def _eager(self, batch: Batch, parts: int) -> Tensor:
        loss = self.function(batch, parts)
        # A captured optimizer would leave out what had no gradient then, and take an old one of what has none now.
        if any((g is None) != (p.grad is None) for p, g in zip(self.parameters, self._gradients, strict=True)):
            self.refusal = "does not train the same parameters with every batch"
            self._gradients, self._replays = [], {}
            self._say()
            return loss
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            if gradient is not None and parameter.grad is not None and parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
                parameter.grad = gradient
        return loss


class CapturedAdamW(torch.optim.AdamW):
    """AdamW whose step is captured once the gradients that it takes are; learning rates may change.

    Its groups keep plain numbers as learning rates, for the scheduler and the log; the graph reads copies on the GPU.
    """

    _gradients_of: CapturedStep | None = None
    _replay: Callable[[], None] | None = None
    _rates: list[Tensor]

    def follow(self, step: CapturedStep) -> None:
        """Take the gradients of ``step``."""
        self._gradients_of, self._replay = step, None

    def step(self, closure: Any = None) -> Any:
        """One optimizer step."""
        if self._gradients_of is None or not self._gradients_of.captured:
            return super().step(closure)
        if self._replay is None:
            device = self.param_groups[0]["params"][0].device
            self._rates = [torch.zeros((), device=device) for _ in self.param_groups]
            self._replay = self._gradients_of.recorder.capture(self._step_with_rates)
        for rate, group in zip(self._rates, self.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._replay()
        return None

    def _step_with_rates(self) -> None:
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, self._rates, strict=True):
            group.update(lr=rate, capturable=True)
        try:
            super().step()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group.update(lr=rate, capturable=False)


def watched(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """Run a function; returns its result and what it does that a CUDA graph would not repeat, None if nothing."""
    before = _cpu_generators()
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = function()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    if any(_SYNCHRONISING in str(warning.message) for warning in caught):
        return result, "waits for the GPU"
    return result, None if _cpu_generators() == before else "draws random numbers on the CPU"


def _cpu_generators() -> list[Any]:
    numpy = np.random.get_state(legacy=False)
    return [torch.get_rng_state().tolist(), random.getstate(), {k: str(v) for k, v in numpy["state"].items()}]


@cache
def say_once(text: str) -> None:
    """A plain warning on stderr, the first time only."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
