"""Training in fp16: the loss is scaled, gradients are clipped as they are, overflow leaves a step out, not the run."""

from types import SimpleNamespace

import pytest
import torch

from flora.errors import ConfigError, TrainingDiverged
from flora.methods import Full
from flora.training import TrainerSettings
from tests.training.test_resume import checkpointed_run, interrupted
from tests.training.test_run import SPLITS, lora, toy_run


@pytest.mark.parametrize(
    ("option", "said"),
    [({"cuda_graph": True}, r"trainer\.cuda_graph=true"), ({"distributed": "fsdp"}, r"trainer\.distributed=fsdp")],
)
def test_what_does_not_go_with_fp16_is_refused(option, said, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"trainer.dtype=fp16 does not go with {said}: take trainer.dtype=bf16"):
        TrainerSettings(epochs=1, lr=1, dtype="fp16", **option)


def test_without_a_gpu_fp16_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"trainer\.dtype=fp16 needs a GPU: take trainer\.dtype=bf16 or fp32 on a CPU"
    ):
        toy_run(tmp_path, dtype="fp16", device="cpu").train()


@pytest.fixture
def scaled(tmp_path):
    """A trainer whose one parameter has the gradient (3, 4), scaled."""
    run = toy_run(tmp_path, device="cpu")
    trainer = run._trainer(run._adapt(), run.settings, SPLITS.train, None, "fit")
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer, scaler = torch.optim.AdamW([weight]), torch.amp.GradScaler("cpu")
    trainer.trained = [weight]
    trainer.accelerator = SimpleNamespace(scaler=scaler, unscale_gradients=lambda: scaler.unscale_(optimizer))
    scaler.scale((weight * torch.tensor([3.0, 4.0])).sum()).backward()
    assert weight.grad.norm() == 5 * 65536
    return trainer


def test_gradients_are_clipped_as_they_are_and_not_as_they_are_scaled(scaled):
    assert scaled.clipped(10.0) == 5
    assert scaled.trained[0].grad.tolist() == [3, 4]


def test_an_overflow_leaves_a_step_out_and_many_end_the_run(scaled):
    scaled.trained[0].grad[0] = float("inf")
    assert scaled.clipped(1.0) == 0
    scaler = scaled.accelerator.scaler
    scaled.accelerator.unscale_gradients = lambda: None
    scaler.update(0.5)
    with pytest.raises(
        TrainingDiverged, match=r"not finite in fp16 at step 0, .*: lower trainer\.lr, or set trainer\.dtype="
    ):
        scaled.clipped(1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("method", [Full("full"), lora()], ids=["full", "lora"])
def test_a_run_in_fp16_learns_what_one_in_fp32_learns(tmp_path, method):
    outcomes = {d: toy_run(tmp_path / d, method, dtype=d, epochs=4, log_every=1).train() for d in ("fp32", "fp16")}
    logs = {d: [row for row in o.trainer.state.log_history if "grad_norm" in row] for d, o in outcomes.items()}
    first = {d: next(row["grad_norm"] for row in rows if row["grad_norm"]) for d, rows in logs.items()}
    assert first["fp16"] == pytest.approx(first["fp32"], rel=0.2)
    assert outcomes["fp16"].metrics["accuracy"] == pytest.approx(outcomes["fp32"].metrics["accuracy"], abs=0.1)
    assert outcomes["fp16"].trainer.scaler_state["scale"] > 1
    assert all(p.dtype == torch.float32 for p in outcomes["fp16"].adapted.model.parameters())


@pytest.mark.gpu
def test_a_run_in_fp16_goes_on_as_it_would_have_gone(tmp_path, monkeypatch):
    whole = checkpointed_run(tmp_path / "whole", dtype="fp16").train()
    cut = checkpointed_run(tmp_path / "cut", dtype="fp16")
    interrupted(cut, monkeypatch, 5)
    resumed = checkpointed_run(tmp_path / "cut", dtype="fp16").train()
    assert resumed.trainer.resumed_at == [5]
    assert resumed.trainer.scaler_state == whole.trainer.scaler_state
    for name, weight in whole.adapted.model.state_dict().items():
        torch.testing.assert_close(resumed.adapted.model.state_dict()[name], weight, rtol=1e-2, atol=1e-3)
