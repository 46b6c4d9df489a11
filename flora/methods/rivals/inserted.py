"""What rivals that add a module share: a PEFT tuner whose layers wrap a module of the model and cannot be merged."""

from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from typing_extensions import override


class Inserted(nn.Module, BaseTunerLayer):
    """Wraps a module; reading an attribute it does not have reads the module's."""

    cast_input_dtype_enabled = True  # read and set by PEFT's disable_input_dtype_casting
    base_layer: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []

    def get_base_layer(self) -> nn.Module:
        """The wrapped module."""
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class InsertedModel(BaseTuner):
    """A tuner of ``Inserted`` layers; subclasses make them."""

    target_module_mapping = {}  # type: ignore[misc]

    def make(self, config: Any, adapter_name: str, target: nn.Module, name: str) -> Inserted:
        """The layer that stands in for ``target``."""
        raise NotImplementedError

    def extend(self, config: Any, adapter_name: str, layer: Inserted) -> None:
        """Give a layer that carries an adapter another one."""
        raise NotImplementedError

    @override
    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> PeftConfig:
        if peft_config.target_modules is None:
            raise ValueError("target_modules: name the modules to adapt")
        return peft_config

    @override
    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, Inserted):
            self.extend(peft_config, adapter_name, target)
            return
        layer = self.make(peft_config, adapter_name, target, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @override
    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    @override
    def _check_merge_allowed(self) -> None:
        raise ValueError(f"{type(self).__name__} adds modules to the model, which no weight can absorb: do not merge")
