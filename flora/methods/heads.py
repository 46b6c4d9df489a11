"""What belongs to a model's head, and how many parameters a method trains in it and outside it."""

from collections.abc import Sequence

from torch import nn


def in_head(name: str, head: Sequence[str]) -> bool:
    """Whether a parameter or module name, possibly behind PEFT's prefix, belongs to the classifier."""
    name = name.removeprefix("base_model.model.")
    return any(name == h or name.startswith(f"{h}.") for h in head)


def trained(model: nn.Module, head: Sequence[str]) -> tuple[int, int]:
    """Numbers of parameters that a wrapped model trains outside its head and in it."""
    sizes = [(in_head(name, head), p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    return sum(size for inside, size in sizes if not inside), sum(size for inside, size in sizes if inside)


def start_at_zero(model: nn.Module, head: Sequence[str], classes: int) -> None:
    """Set the last linear layer of a fresh head to zero, so that all classes are equally likely before training.

    Some networks of timm give a fresh head weights of up to 1 / sqrt(classes), and logits far too large. The shortest
    way down is then to switch features off, which at large rates leaves bounded activations behind frozen batch norms
    constant, and the network dead.

    Raises:
        ValueError: the head does not end in a linear layer with an output for each class.
    """
    layers = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and in_head(name, head)]
    if not layers or layers[-1].out_features != classes:
        raise ValueError("the head does not end in a linear layer with an output for each class")
    nn.init.zeros_(layers[-1].weight)
    if layers[-1].bias is not None:
        nn.init.zeros_(layers[-1].bias)
