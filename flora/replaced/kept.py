"""What a layer keeps under the names of its adapters: the factor of each update; and how an adapter is dropped."""

from peft.tuners.tuners_utils import BaseTunerLayer
from typing_extensions import override


class Kept(BaseTunerLayer):
    """A layer with a factor per adapter and weight, which PEFT and diffusers read and set."""

    weights: dict
    scaling: dict[str, float]
    _configured_scaling: dict[str, float]
    _relative_scaling: dict[str, dict[str, float]]

    def forget(self, adapter_name: str) -> None:
        """Drop what the layer holds of an adapter."""
        for name in self.adapter_layer_names + self.other_param_names:
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]

    @override
    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter; where it was the only active one, another becomes active.

        Raises:
            ValueError: if the adapter is merged.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(f"{adapter_name}: merged adapters cannot be deleted; unmerge first (unmerge_adapter)")
        super().delete_adapter(adapter_name)

    def scale_of(self, adapter_name: str, weight_name: str = "weight") -> float:
        """Factor of the update of one adapted weight."""
        return self.scaling[adapter_name] * self._relative_scaling.get(adapter_name, {}).get(weight_name, 1.0)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the factor of an adapter's update to ``scale`` times the configured one."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._configured_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the factor of the active adapters' updates."""
        for adapter in self._present(self.active_adapters):
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factor of the active adapters' updates, or restore the configured one (``None``)."""
        for adapter in self._present(self.active_adapters):
            self.scaling[adapter] = (
                self._configured_scaling[adapter] if scale is None else self.scaling[adapter] / scale
            )

    def _present(self, adapters: list[str]) -> list[str]:
        return [adapter for adapter in adapters if adapter in self.weights]
