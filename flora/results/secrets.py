"""What nobody else may read: secrets of the environment stay out of records, logs and W&B."""

import os
from typing import Any

_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")


def without_secrets(node: Any) -> Any:
    """A config in which no text holds a secret of the environment (a variable named ...KEY, ...TOKEN and the like)."""
    if isinstance(node, dict):
        return {without_secrets(key): without_secrets(value) for key, value in node.items()}
    if isinstance(node, list):
        return [without_secrets(value) for value in node]
    if isinstance(node, str):
        for name, value in os.environ.items():
            if len(value) > 7 and any(word in name.upper() for word in _SECRET):
                node = node.replace(value, f"<{name}>")
    return node
