"""What a stretch of work took, where a machine has a GPU that the run leaves alone."""

import types

import pytest
import torch

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
