"""accelerate: weights that lie elsewhere between passes, and its own training loop."""

import copy

import accelerate
import peft
import torch
import transformers
from torch import nn

from ..frame import trial
from ..methods import Method
from ..reference import TIGHT, assert_close, by_hand
from .language import causal_loss, tokens
from .trainers import TARGETS, llama


def offloaded(method: Method, how) -> None:
    """An adapted model whose weights then lie elsewhere between passes."""
    base = llama().double().eval()
    model = method.wrap(copy.deepcopy(base), TARGETS).eval()
    expected = by_hand(method, base, model)(tokens()).logits
    moved = how(model)
    for _ in range(2):
        with torch.no_grad():
            assert_close(moved(tokens()).logits, expected, TIGHT, "logits")
        assert moved(tokens()).logits.requires_grad


def adapted_later(method: Method, how) -> None:
    """A model whose weights lie elsewhere between passes, adapted then."""
    base = llama().double().eval()
    method.wrap(copy.deepcopy(base), TARGETS).save_pretrained("adapter")
    expected = peft.PeftModel.from_pretrained(copy.deepcopy(base), "adapter").eval()
    expected = by_hand(method, base, expected)(tokens()).logits
    model = peft.PeftModel.from_pretrained(how(copy.deepcopy(base)), "adapter").eval()
    for _ in range(2):
        with torch.no_grad():
            assert_close(model(tokens()).logits, expected, TIGHT, "logits")


def _cpu(model: nn.Module) -> nn.Module:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def _disk(model: nn.Module) -> nn.Module:
    accelerate.disk_offload(model, "offload", execution_device=torch.device("cpu"))
    return model


def _dispatched(model: nn.Module) -> nn.Module:
    prefix = "base_model.model." if hasattr(model, "peft_config") else ""
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    places = {prefix + part: "disk" if part.endswith(("0", "head")) else "cpu" for part in parts}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir="offload", force_hooks=True)


@trial("accelerate", "cpu_offload of an adapted model")
def cpu_offload(method: Method) -> None:
    offloaded(method, _cpu)


@trial("accelerate", "disk_offload of an adapted model")
def disk_offload(method: Method) -> None:
    offloaded(method, _disk)


@trial("accelerate", "dispatch_model of an adapted model, cpu and disk")
def dispatched(method: Method) -> None:
    offloaded(method, _dispatched)


@trial("accelerate", "an adapter loaded into a model under cpu_offload", expected={"LoRA": "wrong: .*"})
def into_cpu_offload(method: Method) -> None:
    adapted_later(method, _cpu)


@trial("accelerate", "an adapter loaded into a model under disk_offload", expected={"LoRA": "wrong: .*"})
def into_disk_offload(method: Method) -> None:
    adapted_later(method, _disk)


@trial("accelerate", "an adapter loaded into a model that dispatch_model has spread over cpu and disk")
def into_dispatched(method: Method) -> None:
    adapted_later(method, _dispatched)


@trial(
    "accelerate",
    "from_pretrained with a device_map that leaves all on disk, then an adapter with max_memory",
    expected=dict.fromkeys(("FLoRA", "LoRA"), "fails: .*meta device.*"),
)
def device_map(method: Method) -> None:
    base = llama().double().eval()
    base.save_pretrained("base", max_shard_size="20KB")
    model = method.wrap(copy.deepcopy(base), TARGETS).eval()
    expected = by_hand(method, base, model)(tokens()).logits
    model.save_pretrained("adapter")
    places = {"model": "disk", "lm_head": "disk"}
    settings = {"offload_folder": "offload"}
    inner = transformers.AutoModelForCausalLM.from_pretrained("base", device_map=places, dtype=torch.double, **settings)
    outer = peft.PeftModel.from_pretrained(inner, "adapter", max_memory={"cpu": "120KB"}, **settings).eval()
    with torch.no_grad():
        assert_close(outer(tokens()).logits, expected, TIGHT, "logits")


@trial("accelerate", "Accelerator.prepare, mixed precision bf16, save_state and load_state")
def accelerator(method: Method) -> None:
    base = llama().train()
    model = method.wrap(copy.deepcopy(base), TARGETS)
    reference = by_hand(method, base, model)
    losses = []
    for network in (model, reference):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # an earlier trial's dtype
        helper = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        optimiser = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.05)
        prepared, optimiser = helper.prepare(network, optimiser)
        for step in range(3):
            torch.manual_seed(step)
            loss = causal_loss(prepared)
            helper.backward(loss)
            optimiser.step()
            optimiser.zero_grad()
        if network is model:
            helper.save_state("state")
            kept = [p.detach().clone() for p in network.parameters()]
            with torch.no_grad():
                for p in network.parameters():
                    p.add_(1.0)
            helper.load_state("state")
            assert all(map(torch.equal, kept, network.parameters())), "load_state gave other parameters"
        losses.append(loss.detach())
    assert_close(*losses, 0.02, "loss in bf16")
