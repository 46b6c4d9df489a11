"""Makes a configuration and its tuner one of PEFT's methods: PEFT's own functions then create, save and load it."""

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING


def register(config_class: Any, tuner_class: Any) -> None:
    """Write the method that ``config_class.method`` names into PEFT's tables of methods.

    PEFT's ``register_peft_method`` accepts only names of its ``PeftType`` enum, so the tables are written directly.
    """
    tables: tuple[tuple[dict[Any, Any], Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, config_class),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner_class),
        (PEFT_TYPE_TO_PREFIX_MAPPING, tuner_class.prefix),
    )
    for table, entry in tables:
        table[config_class.method] = entry
