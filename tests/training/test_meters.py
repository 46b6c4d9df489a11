"""What a stretch of work took, where a machine has a GPU that the run leaves alone."""

import types

import pytest
import torch

from flora.training import callbacks
from flora.training.callbacks import StepMeter


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_is_measured_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("reset_peak_memory_stats", "max_memory_allocated", "synchronize", "utilization", "current_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: pytest.fail(f"asks the GPU: {name}"))
    meter, state = StepMeter(on_gpu=False), types.SimpleNamespace(global_step=3)
    meter.on_train_begin(None, state, None)
    meter.on_train_end(None, state, None)
    assert meter.peak_memory_bytes > 2**20, "the process's own"
    assert meter.gpu_busy_share is None


def test_the_rate_leaves_out_the_first_quarter_of_the_steps_and_what_is_done_between(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: clock[0])
    meter, state = StepMeter(on_gpu=False), types.SimpleNamespace(global_step=0, max_steps=8)
    meter.on_train_begin(None, state, None)
    for number in range(1, 9):
        clock[0] += 5.0 if number <= 2 else 0.5
        state.global_step = number
        meter.on_step_end(None, state, None)
        with meter.pause():
            clock[0] += 30.0  # an evaluation
    again = StepMeter(on_gpu=False)
    again.load_state_dict(meter.state_dict())
    meter.on_train_end(None, state, None)
    assert (meter.first_steps, meter.first_seconds, meter.train_seconds) == (2, 10.0, 13.0)
    assert meter.rate(batch=4) == 6 * 4 / 3.0
    assert (again.first_steps, again.first_seconds) == (2, 10.0)


def test_a_fit_of_one_step_has_no_rate_beyond_its_first_steps():
    meter, state = StepMeter(on_gpu=False), types.SimpleNamespace(global_step=1, max_steps=1)
    meter.on_train_begin(None, state, None)
    meter.on_step_end(None, state, None)
    meter.on_train_end(None, state, None)
    assert meter.rate(batch=4) is None
