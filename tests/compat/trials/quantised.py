"""Bases whose weights are quantised: the update runs beside the base's own forward, and is never put into it."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..frame import trial
from ..methods import Method
from ..reference import SINGLE, assert_close, by_hand_apart, compare_steps
from .language import causal_loss, tokens
from .trainers import SIZES, TARGETS, llama


def _quantised(
    method: Method, build: Callable[[], nn.Module], tolerance: float = SINGLE, targets: Any = TARGETS
) -> Any:
    """Three steps beside the reference; the update in the output is right by itself."""
    torch.manual_seed(6)
    model = method.wrap(build(), targets)
    reference = by_hand_apart(method, build(), model)
    compare_steps(method, model, reference, causal_loss, tolerance)
    with torch.no_grad():
        logits = model(tokens()).logits
        with model.disable_adapter():
            alone = model(tokens()).logits
        assert_close(logits - alone, reference(tokens()).logits - alone, 10 * tolerance, "the update's share")
        shares = (logits - alone).norm() / alone.norm()
    assert shares > 0.01, "the update does nothing"
    return model


def _merges_or_refuses(model: Any) -> None:
    """Merging keeps the update up to the rounding of the base's grid, or says in one line that it cannot."""
    before = model(tokens()).logits
    with torch.no_grad(), model.disable_adapter():
        alone = model(tokens()).logits
    try:
        model.merge_adapter()
    except (ValueError, NotImplementedError) as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert len(refusal.splitlines()) == 1, "the refusal takes several lines"
        assert_close(model(tokens()).logits, before, SINGLE, "logits after a refused merge")
        return
    kept = (model(tokens()).logits - alone).norm() / (before - alone).norm()
    assert 0.5 < kept < 2, f"merging keeps {kept:.2f} of the update"


@trial("bitsandbytes", "a 4-bit Llama (NF4), three steps; layer.weight is read", needs=("bitsandbytes",), slow=True)
def bits_and_bytes(method: Method) -> None:
    import bitsandbytes as bnb

    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 128}

    def build() -> nn.Module:
        torch.manual_seed(3)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.2))
        model.eval()
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and name != "lm_head":
                own = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
                )
                own.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                owner, _, child = name.rpartition(".")
                setattr(model.get_submodule(owner), child, own.to("cpu"))
        return model

    assert build().model.layers[0].mlp.up_proj.weight.dtype is torch.uint8
    model = _quantised(method, build)
    for layer in model.modules():
        if hasattr(layer, "base_layer"):
            assert layer.weight.dtype is not None
            assert layer.weight.device.type == "cpu"


@trial(
    "bitsandbytes",
    "a Llama in 4 bits loaded by transformers (BitsAndBytesConfig), prepare_model_for_kbit_training; merge",
    needs=("bitsandbytes",),
    slow=True,
)
def bits_and_bytes_loaded(method: Method) -> None:
    import peft

    llama().save_pretrained("base")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip

    def build() -> nn.Module:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            "base", quantization_config=config, device_map="cpu", dtype=torch.float32
        )
        return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True).train()

    _merges_or_refuses(_quantised(method, build))


@trial("bitsandbytes", "a Llama in 8 bits (LLM.int8), three steps", needs=("bitsandbytes",), slow=True)
def bits_and_bytes_int8(method: Method) -> None:
    llama().save_pretrained("base")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)

    def build() -> nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(
            "base", quantization_config=config, device_map="cpu", dtype=torch.float32
        )

    # Its products are of integers: a change of the last bit of an input may change their rounding.
    _quantised(method, build, tolerance=0.02)


@trial(
    "optimum-quanto",
    "quantize and freeze (int8, int4 weights), three steps; merge",
    needs=("optimum.quanto",),
    slow=True,
    expected={"LoRA": "wrong: merging keeps .*"},
)
def quanto(method: Method) -> None:
    from optimum.quanto import freeze, qint4, qint8, quantize

    for kind in (qint8, qint4):

        def build(kind: Any = kind) -> nn.Module:
            model = llama().eval()
            quantize(model, weights=kind, exclude="lm_head")
            freeze(model)
            return model

        _merges_or_refuses(_quantised(method, build))


def _torchao(method: Method, settings: Any) -> None:
    from torchao.quantization import quantize_

    def build() -> nn.Module:
        model = llama().eval()
        quantize_(model.model, settings)
        return model

    _merges_or_refuses(_quantised(method, build))


@trial("torchao", "Int8WeightOnlyConfig, three steps; merge", needs=("torchao",), slow=True)
def torchao_int8(method: Method) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    _torchao(method, Int8WeightOnlyConfig())


@trial("torchao", "IntxWeightOnlyConfig (4 bits), three steps; merge", needs=("torchao",), slow=True)
def torchao_int4(method: Method) -> None:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    _torchao(method, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)))


@trial("torchao", "Float8WeightOnlyConfig, three steps; merge", needs=("torchao",), slow=True)
def torchao_float8(method: Method) -> None:
    from torchao.quantization import Float8WeightOnlyConfig

    _torchao(method, Float8WeightOnlyConfig())


class Float8Linear(nn.Linear):
    """A plain weight in 8 bits, which its own forward turns to the input's dtype: how FP8 checkpoints are served."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


@trial("torch", "weights stored as float8_e4m3fn, with a forward of their own, three steps")
def plain_float8(method: Method) -> None:
    def build() -> nn.Module:
        model = llama().eval()
        for layer in model.model.layers.modules():
            if isinstance(layer, nn.Linear):
                layer.__class__ = Float8Linear
                layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
        return model

    _quantised(method, build)
