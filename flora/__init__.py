"""FLoRA: parameter-efficient fine-tuning of weights of any dimension by a Tucker form, as a PEFT method.

``import flora`` registers FLoRA, and the methods compared with it, with PEFT: at once where PEFT is imported already,
else when it is, so that a script that needs no network does not wait for PEFT's five seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

from flora import names, registration

if TYPE_CHECKING:
    from flora.adapters import FloraConfig, FloraLayer, FloraModel, batched, init_from_gradients, parameter_groups
    from flora.predict import load

__version__ = "0.2.0"
__all__ = [
    "FloraConfig",
    "FloraLayer",
    "FloraModel",
    "__version__",
    "batched",
    "init_from_gradients",
    "load",
    "parameter_groups",
]
_HOMES = dict.fromkeys(__all__, "adapters") | {"load": "predict"}


def __getattr__(name: str) -> Any:
    if name in _HOMES or name == "adapters":
        importlib.import_module("peft")  # before ours, as every thread must: see flora.registration
    if name == "adapters":
        return importlib.import_module("flora.adapters")
    return names.public(__name__, _HOMES, name)


registration.when_peft_is_imported()
