"""What a fine-tuning method is: what it must do, what it gives a run, and how what it trained is saved and loaded."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import peft
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from flora.files import read_object, unlike
from flora.methods.heads import in_head

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *CONVS, nn.Embedding)
# PEFT asks transformers 5 by a name that is old there; a user can do nothing about it.
OLD_NAME_IN_PEFT = "`is_gradient_checkpointing` is deprecated"


@dataclass
class Adapted:
    """A model ready to train: what a method gives a run.

    Attributes:
        model: what the trainer trains and calls as the base model is called; exactly what the method trains, and the
            head, requires gradients.
        skipped: names of targeted layers that the method cannot adapt and leaves frozen; the record lists them.
        ranks: effective ranks per adapted layer, in the layer's mode order; the record holds them. Empty for a method
            without ranks.
        callbacks: what the method wants to do while it trains; one with ``state_dict`` and ``load_state_dict`` is
            saved and resumed with the run.
        penalty: ``model -> scalar`` added to the training loss.
        lr_scales: factors of the learning rate by parameter's name; 1 where a name is missing.
    """

    model: nn.Module
    skipped: list[str] = field(default_factory=list)
    ranks: dict[str, list[int]] = field(default_factory=dict)
    callbacks: list[TrainerCallback] = field(default_factory=list)
    penalty: Callable[[nn.Module], Tensor] | None = None
    lr_scales: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Method(Protocol):
    """A way to fine-tune a pretrained model: all that the suite asks of one.

    A new method is a class with these three members and a file configs/adapter/NAME.yaml: its ``_target_`` names the
    class, ``lr`` and ``head_lr`` are the rates that the trainer takes by default, and everything else goes to the
    constructor, whose ValueErrors reach the user as one line. The class gets its public name in ``flora.methods``.
    A method whose ranks a budget can set says so by ``has_ranks`` and takes it by ``set_budget``, as ``Peft`` does; one
    that looks at gradients before it trains says so by ``gradient``, as ``Peft`` does.

    Attributes:
        name: in records and tables.
    """

    name: str

    def apply(self, model: nn.Module, head: Sequence[str]) -> Adapted:
        """Make a model ready to train, in place or wrapped; random numbers are torch's, which the run has seeded.

        Args:
            model: the base model with its weights, or on the meta device, where parameters are only counted.
            head: names of the modules of its classifier, which a method trains along; empty for a language model.

        Raises:
            ValueError: a setting does not fit this model; one line that names it.
        """
        ...

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what was trained into a folder, such that ``load`` puts it onto a fresh base model.

        Args:
            model: the ``model`` of ``apply``'s result, trained.
            folder: created if need be. PEFT's two files, or the trained tensors as ``save_trained`` writes them.
        """
        ...


def adaptable(model: nn.Module, head: Sequence[str]) -> list[str]:
    """Sorted names of the convolutions, linear layers and embeddings outside the classifier."""
    return sorted(n for n, m in model.named_modules() if isinstance(m, LAYERS) and not in_head(n, head))


def normalisations(model: nn.Module, head: Sequence[str]) -> list[str]:
    """Sorted names of the modules called ...Norm... by class that hold parameters of their own, outside the head."""
    return sorted(
        name
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__ and _holds_parameters(module) and not in_head(name, head)
    )


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write the parameters that train, under the model's names for them, to ``model.safetensors``.

    Buffers of modules with such parameters are written too: statistics of a batch norm move while it trains.
    """
    state = model.state_dict()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    owners = {name.rpartition(".")[0] for name in trained}
    own = {*trained} | {n for n, _ in model.named_buffers() if n in state and n.rpartition(".")[0] in owners}
    tensors = {n: t.detach().contiguous().cpu() for n, t in state.items() if n in own}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(model: nn.Module, head: Sequence[str], folder: Path) -> Adapted:
    """Put what ``save`` wrote onto a fresh base model, whichever method wrote it.

    Raises:
        ValueError: nothing saved in ``folder``, or saved from another model or number of classes, or not whole.
    """
    try:
        return _load_peft(model, folder) if (folder / "adapter_config.json").exists() else _load(model, head, folder)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} does not fit this model: {first_lines(error)}") from error


def _load_peft(model: nn.Module, folder: Path) -> Adapted:
    if not (folder / "adapter_model.safetensors").exists():
        raise ValueError(f"{folder} has no adapter_model.safetensors (other formats are not loaded)")
    try:
        read_object(folder / "adapter_config.json")
    except ValueError as error:
        raise ValueError(f"{folder}/adapter_config.json is no configuration of an adapter ({error})") from error
    saved = load_file(folder / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below
        warnings.filterwarnings("ignore", message=OLD_NAME_IN_PEFT)
        try:
            wrapped = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)
        except KeyError as error:  # of a module that is saved beside the adapter
            raise ValueError(f"{folder} lacks the tensor {error.args[0]}") from error
        except Exception as error:  # PEFT raises almost any type on a configuration that is not what it says
            raise ValueError(f"{folder} does not fit this model: {first_lines(error)}") from error
    with warnings.catch_warnings():
        # PEFT says what it assumes of embeddings, which may be there or not.
        warnings.simplefilter("ignore")
        least, most = (
            peft.get_peft_model_state_dict(wrapped, save_embedding_layers=embeddings) for embeddings in (False, True)
        )
    expected = {*least, *(name for name in most if name in saved)}
    _check_tensors(folder, saved, {name: most[name] for name in expected})
    return Adapted(wrapped, [], effective_ranks(wrapped))


def _load(model: nn.Module, head: Sequence[str], folder: Path) -> Adapted:
    if not (folder / "model.safetensors").exists():
        raise ValueError(f"{folder} holds neither adapter_config.json nor model.safetensors")
    saved, own = load_file(folder / "model.safetensors"), model.state_dict()
    if not {*saved} <= {*own}:
        raise ValueError(f"{folder} does not fit this model: it was trained with another one")
    _check_tensors(folder, saved, {name: own[name] for name in own if name in saved or in_head(name, head)})
    model.load_state_dict(saved, strict=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in saved)
    return Adapted(model)


def _check_tensors(folder: Path, saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are missing, unexpected, or no floats where floats belong: torch would convert them."""
    if wrong := unlike(saved, expected):
        raise ValueError(f"{folder} {wrong}: it is not what a run saved for this model")
    for name, tensor in saved.items():
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(f"{folder}: {name} is {tensor.dtype}, it must be {expected[name].dtype}")


def effective_ranks(model: peft.PeftModel) -> dict[str, list[int]]:
    """Ranks per layer: FLoRA knows its own, other rank-based methods carry ``r``; AdaLoRA's are those it has kept."""
    tuner: Any = model.base_model
    if hasattr(tuner, "effective_ranks"):
        return tuner.effective_ranks()
    ranks, kept = {}, {}
    for name, module in tuner.model.named_modules():
        r = getattr(module, "r", None)
        if isinstance(r, dict) and "default" in r:
            ranks[name] = [int(r["default"])]
        if hasattr(module, "lora_E") and not module.lora_E["default"].is_meta:
            kept[name] = [int(module.lora_E["default"].count_nonzero())]
    return kept if any(rank for (rank,) in kept.values()) else ranks  # all are zero before the first step


def first_lines(error: Exception) -> str:
    """The first two lines of an error's message in one: where torch says what and where."""
    return " ".join(line.strip() for line in str(error).splitlines()[:2])
