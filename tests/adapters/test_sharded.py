"""FSDP of torch's first version, and tensor parallelism: two processes train as one does."""

import functools
import os
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import flora
from flora.adapters import FloraLayer
from flora.methods.rivals.lora_flat import LoraFlatConfig
from tests.training.processes import together

pytestmark = pytest.mark.dist

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
CASES: dict[str, Any] = {
    "auto": {},
    "factored": {"forward": "factored"},
    "merged": {"forward": "merged"},
    "magnitudes": {"use_dora": True},
    "rival": {"config": LoraFlatConfig},
}
WRAPS = [("whole", True), ("blocks", True), ("peft", True), ("peft", False)]


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, num_key_value_heads=2, attn_implementation="eager")
    return transformers.LlamaForCausalLM(config)


def adapt(net: nn.Module, config: Any = flora.FloraConfig, **settings: Any) -> Any:
    torch.manual_seed(1)
    model = peft.get_peft_model(net, config(target_modules="all-linear", r=4, scale=0.3, **settings))
    for name, parameter in model.named_parameters():
        if ".tucker_" in name and "magnitude" not in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model


def train(model: nn.Module) -> list[float]:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for step in range(3):
        ids = torch.randint(40, (2, 6), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def trained(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in state.items() if ".tucker_" in name}


def sharded(case: str) -> dict[Any, Any]:
    """Losses and trained weights under each way to wrap the model."""
    torch.distributed.init_process_group("gloo")
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "LlamaDecoderLayer"
    results: dict[Any, Any] = {}
    for wrap, own_parameters in WRAPS:
        model = adapt(llama(), **CASES[case])
        policy = {
            "whole": None,
            "blocks": functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}),
            "peft": peft.utils.other.fsdp_auto_wrap_policy(model),
        }[wrap]
        sharded = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=own_parameters, device_id=torch.device("cpu")
        )
        losses = train(sharded)
        with FullyShardedDataParallel.state_dict_type(
            sharded, StateDictType.FULL_STATE_DICT, FullStateDictConfig(offload_to_cpu=True)
        ):
            results[wrap, own_parameters] = losses, trained(sharded.state_dict())
    if case == "merged":
        model = FullyShardedDataParallel(
            adapt(llama(), **CASES[case]),
            auto_wrap_policy=functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={nn.Linear}),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
        with pytest.raises(ValueError, match=r"weight: .* is here; have FSDP wrap whole blocks \(peft"):
            train(model)
    torch.distributed.destroy_process_group()
    return results


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch crashes where FSDP gathers a state dict on a CPU, LoRA's too"
)
@pytest.mark.parametrize("case", CASES)
def test_fsdp_trains_as_one_process(case, tmp_path):
    alone = adapt(llama(), **CASES[case])
    losses = train(alone)
    assert losses[0] != losses[-1]
    for results in together(tmp_path, sharded, case):
        for wrap in WRAPS:
            assert results[wrap][0] == pytest.approx(losses, rel=1e-5), wrap
            assert results[wrap][1].keys() == trained(alone.state_dict()).keys()
            for name, value in trained(alone.state_dict()).items():
                torch.testing.assert_close(results[wrap][1][name], value, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- tensor parallelism


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.up, self.down, self.odd = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 5, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.odd(self.down(torch.tanh(self.up(self.embed(tokens)))))


PLAN = {
    "embed": functools.partial(RowwiseParallel, input_layouts=torch.distributed.tensor.Replicate()),
    "up": ColwiseParallel,
    "down": RowwiseParallel,
    "odd": functools.partial(ColwiseParallel, output_layouts=torch.distributed.tensor.Replicate()),
}
TOKENS = torch.randint(12, (3, 4), generator=torch.Generator().manual_seed(0))
TARGETS = list(PLAN)
FORMS: dict[str, dict[str, Any]] = {
    "auto": {},
    "factored": {"forward": "factored"},
    "merged": {"forward": "merged"},
    "hosvd": {"init": "hosvd", "init_weights": True},
    "zero output": {"init": "zero_output", "init_weights": True},
    "folded": {"fold_pattern": {"up": [2, 4, 6]}},
}


def small(parallel: str | None, seed: int = 1, **settings: Any) -> Any:
    torch.manual_seed(0)
    net = Net().double().requires_grad_(False)  # three steps of this net multiply what single precision rounds away
    mesh = None if parallel is None else init_device_mesh("cpu", (2,))
    if parallel == "before":
        parallelize_module(net, mesh, {name: style() for name, style in PLAN.items()})
    torch.manual_seed(seed)
    config = flora.FloraConfig(**({"target_modules": TARGETS, "r": 3, "init_weights": False} | settings))
    model = peft.get_peft_model(net, config)
    if parallel == "after":
        parallelize_module(net, mesh, {f"{name}.base_layer": style() for name, style in PLAN.items()})
    return model


def steps(model: Any) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Outputs and gradients of three steps."""
    outputs, gradients = [], []
    for _ in range(3):
        output = model(TOKENS)
        output.sin().sum().backward()
        outputs.append(output.detach())
        named = {name: p for name, p in model.named_parameters() if ".tucker_" in name}
        gradients.append({name: p.grad.clone() for name, p in named.items()})
        for parameter in named.values():
            parameter.data -= 0.1 * parameter.grad
            parameter.grad = None
    with torch.no_grad():
        outputs.append(model(TOKENS))
    return outputs, gradients


def parallel(form: str) -> dict[str, Any]:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    results: dict[str, Any] = {}
    for when in ("before", "after"):
        model = small(when, seed=1 if when == "after" else 1 + rank, **FORMS[form])  # drawn by the first process
        layers = [module for module in model.modules() if isinstance(module, FloraLayer)]
        assert all(isinstance(layer.base_layer.weight, DTensor) for layer in layers)
        for layer in layers:
            expected = layer.base_layer.weight.full_tensor() + layer.get_delta_weight("default")
            torch.testing.assert_close(layer.weight.full_tensor(), expected)
        results[when] = steps(model)
        with pytest.raises(
            ValueError, match=r"embed\.weight: a sharded weight \(DTensor\) cannot be merged into; gather"
        ):
            model.merge_and_unload()
    for settings, message in (
        ({"use_dora": True}, "use_dora: needs"),
        ({"flora_dropout": 0.1}, "flora_dropout: embed"),
    ):
        with pytest.raises(ValueError, match=message):
            small("before", **settings)
    torch.distributed.destroy_process_group()
    return results


@pytest.mark.parametrize("form", FORMS)
def test_tensor_parallel_layers_train_as_one_process(form, tmp_path):
    outputs, gradients = steps(small(None, **FORMS[form]))
    for results in together(tmp_path, parallel, form):
        for when in ("before", "after"):
            torch.testing.assert_close(results[when][0], outputs, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(results[when][1], gradients, rtol=1e-9, atol=1e-9)


def planned(folder: str) -> tuple[list[float], dict[str, Tensor]]:
    torch.distributed.init_process_group("gloo")
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", attn_implementation="eager")
    assert any(isinstance(parameter, DTensor) for parameter in net.parameters())
    model = adapt(net)
    losses = train(model)
    state = trained(model.state_dict())
    torch.distributed.destroy_process_group()
    return losses, state


def test_the_plan_of_transformers(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    alone = adapt(llama())
    losses = train(alone)
    for result, state in together(tmp_path / "run", planned, str(tmp_path / "base")):
        assert result == pytest.approx(losses, rel=1e-5)
        for name, value in trained(alone.state_dict()).items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
