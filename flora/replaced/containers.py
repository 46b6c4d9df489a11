"""What holds the parameters of an adapter: read directly, or by calling it where something watches the call."""

from typing import Any

from torch import Tensor, nn


class AdapterParameters(nn.ParameterDict):
    """A ParameterDict with a forward pass, which accelerate's hooks and FSDP bring the parameters back for."""

    def __getattr__(self, name: str) -> Any:
        # What PEFT's policy for FSDP asks of modules to find those that train: all are wrapped, or frozen and trained
        # parameters would share one flat one.
        own = self.__dict__.get("_parameters")
        return next(iter(own.values())) if name == "weight" and own and name not in own else super().__getattr__(name)

    __call__ = nn.Module.__call__  # nn.ParameterDict refuses

    def forward(self) -> dict[str, Tensor]:
        """The parameters, as copies (with a gradient): what is watched takes its own away when the call ends."""
        return {name: parameter.clone() for name, parameter in self.items()}


def at_hand(container: nn.Module) -> Any:
    """The parameters of a container by name (a mapping), on the device where they are used."""
    own = vars(container)
    hooked = own["_forward_pre_hooks"] or "forward" in own  # "forward": accelerate puts its hook there
    return container() if hooked or not isinstance(container, AdapterParameters) else container
