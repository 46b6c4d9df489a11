"""A network as a program that runs without its Python code: torch.export's, or ONNX for onnxruntime and others."""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from typing_extensions import override

from flora.errors import ConfigError

ENDS = {".onnx": "ONNX", ".pt2": "torch.export"}
_ONE_FILE = 1_500_000_000  # bytes of weights; an ONNX file holds at most 2 GiB, more lie in FILE.data beside it
PACKAGES = {"ONNX": ("onnx", "onnxscript", "onnxruntime")}


def program(model: nn.Module, inputs: Mapping[str, Tensor], longest: int | None = None) -> torch.export.ExportedProgram:
    """The forward pass of a network by torch.export, for batches of any size.

    An adapter may be merged or not; as it is active now, so it is part of the program.

    Args:
        model: a classifier or a language model in evaluation mode.
        inputs: example tensors by the names under which the program takes them: ``images``, or those of a network of
            transformers. At least two examples; a text has at least two tokens.
        longest: tokens that the program may be given; None: there are images, or texts of the example's length.

    Returns:
        The program; its one output are the logits.

    Raises:
        ConfigError: an adapter that is no part of the network's layers (prompts).
    """
    if isinstance(model, peft.PeftModel):
        if not isinstance(model.base_model, BaseTuner):
            raise ConfigError(f"{type(model).__name__}: prompts are no part of the network, and of no program of it")
        model = model.get_base_model()  # with its adapted layers, and a forward pass that names its inputs
    wrapped = _Images(model) if "images" in inputs else _Texts(model, list(inputs))
    batch = torch.export.Dim("batch")
    shapes = {name: {0: batch} for name in inputs}
    if longest is not None:
        tokens = torch.export.Dim("tokens", max=longest)
        shapes = {name: shape | ({1: tokens} if inputs[name].dim() == 2 else {}) for name, shape in shapes.items()}
    with torch.no_grad(), _quiet():
        return torch.export.export(wrapped, tuple(inputs.values()), dynamic_shapes=(tuple(shapes.values()),))


def save(made: torch.export.ExportedProgram, place: Path, names: list[str]) -> None:
    """Write a program: ``.pt2`` for ``torch.export.load``, ``.onnx`` for onnxruntime and others.

    Raises:
        ConfigError: another ending, or a package that ONNX needs and is not here.
    """
    kind = ENDS.get(place.suffix)
    if kind is None:
        raise ConfigError(f"{place}: a program ends in {' or '.join(ENDS)}")
    if missing := lacking(kind):
        raise ConfigError(f"{place}: ONNX needs {', '.join(missing)}; pip install -e '.[onnx]'")
    if kind == "ONNX":
        large = sum(tensor.nbytes for tensor in made.state_dict.values()) > _ONE_FILE
        named: Any = {"input_names": names, "output_names": ["logits"]}
        with _quiet():
            torch.onnx.export(made, (), place, dynamo=True, verbose=False, external_data=large, **named)
    else:
        torch.export.save(made, place)


def run(place: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits that a saved program gives on the CPU, an ONNX one in onnxruntime."""
    if ENDS[place.suffix] != "ONNX":
        return torch.export.load(place).module()(*inputs.values())
    import onnxruntime

    session = onnxruntime.InferenceSession(place, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


def lacking(kind: str) -> list[str]:
    """Packages that a kind of program needs and that are not installed."""
    return [name for name in PACKAGES.get(kind, ()) if importlib.util.find_spec(name) is None]


class _Images(nn.Module):
    """A network that takes images, under that name."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @override
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(inputs[0])


class _Texts(nn.Module):
    """A network of transformers that gives its logits alone."""

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    @override
    def forward(self, *inputs: Tensor) -> Tensor:
        given: Any = dict(zip(self.names, inputs, strict=True))
        return self.network(**given).logits


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of their own progress and of code that is to go."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
