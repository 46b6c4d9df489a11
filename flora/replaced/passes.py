"""The forward pass whose work layers share, where ``flora.batched`` asked for that.

It is found through a context variable and kept nowhere else: other threads, later passes, copies of the model and the
backward pass do not see it.
"""

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Bound once, since every layer asks.
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_backward_pass = torch._C._current_graph_task_id
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack
_trace = torch._C._get_tracing_state

# flora.adapters.fast.batched.Pass
RUNNING: ContextVar[Any] = ContextVar("flora_pass", default=None)
# flora.adapters.fast.traced.TracedPass, while torch.compile traces the block; empty at all other times.
TRACED: list[Any] = []


def running() -> Any:
    """The pass that layers may share work in now; None without one, and where others watch what the layers compute."""
    # First, since torch.compile cannot trace what follows; `is_compiling` holds in all threads while one compiles.
    if torch.compiler.is_dynamo_compiling():
        return TRACED[-1] if TRACED else None
    shared = RUNNING.get()
    return None if shared is None or _watched() else shared


def converts(input: Tensor, dtype: torch.dtype) -> bool:
    """Whether an op in ``dtype`` takes this input: a plain one of that dtype, or one that autocast converts."""
    alike = input.dtype == dtype or torch.is_autocast_enabled(input.device.type)
    return alike and input.dim() >= 2 and not input.is_nested


def _watched() -> bool:
    """Whether operations are recorded, transformed or repeated by somebody who must see each layer's own.

    Gradient checkpointing repeats a part of the forward pass in the backward pass, when parameters, adapters and
    autocast may have changed, and compares what is saved; a functorch transform, forward-mode AD and tracing need
    operations that torch can differentiate or write down.
    """
    return (
        _saving_hooks(True) is not None  # checkpoints, save_on_cpu
        or _backward_pass() != -1
        or _dispatch_modes() > 0  # make_fx, counters of operations
        or _transform() is not None
        or _trace() is not None
        or forward_ad._current_level >= 0
    )
