"""Makes FLoRA one of PEFT's methods: after ``import flora``, PEFT's own functions create, save and load it."""

from typing import Any

import peft
from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from flora.adapters.config import FLORA, FloraConfig
from flora.adapters.model import FloraModel

SUPPORTED = ("0.21", "0.22")


def register() -> None:
    """Write FLoRA into PEFT's tables of methods.

    PEFT's ``register_peft_method`` accepts only names of its ``PeftType`` enum, so the tables are written directly.

    Raises:
        ImportError: if the installed PEFT is not of the series this is tested with.
    """
    first, end = SUPPORTED
    if not Version(first) <= Version(Version(peft.__version__).base_version) < Version(end):
        raise ImportError(
            f"flora needs peft>={first},<{end}, found {peft.__version__}; install a version in that range"
        )
    tables: tuple[tuple[dict[Any, Any], Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, FloraConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, FloraModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, FloraModel.prefix),
    )
    for table, entry in tables:
        table[FLORA] = entry
