"""What nobody else may read: secrets of the environment and of the config stay out of records, logs and W&B."""

import os
import re
from typing import Any

_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")
_NAMED = r"(?:\w*_)?(?:api_?key|access_?key|secret|password|passwd|token|credentials?)"
_OVERRIDE = re.compile(rf"((?:^|[\s.+~]){_NAMED}=)(?!<)\S{{8,}}", re.IGNORECASE)


def without_secrets(node: Any) -> Any:
    """A config in which no text holds a secret.

    Secrets are the values of variables of the environment named ...KEY, ...TOKEN and the like, and what stands under
    such a name in the config or follows it in an override (``api_key=...``).
    """
    if isinstance(node, dict):
        return {without_secrets(key): _hidden(key, value) for key, value in node.items()}
    if isinstance(node, list):
        return [without_secrets(value) for value in node]
    if isinstance(node, str):
        for name, value in os.environ.items():
            if len(value) > 7 and any(word in name.upper() for word in _SECRET):
                node = node.replace(value, f"<{name}>")
        return _OVERRIDE.sub(r"\1<secret>", node)
    return node


def _hidden(key: Any, value: Any) -> Any:
    named = isinstance(key, str) and isinstance(value, str) and len(value) > 7
    return "<secret>" if named and re.fullmatch(_NAMED, key, re.IGNORECASE) else without_secrets(value)
