"""Adapted layers with several weights: multi-head attention, recurrent layers, and modules that own bare parameters."""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from flora.adapters.config import FloraConfig
from flora.adapters.layer import FloraLayer
from flora.adapters.weights import stacked_kinds
from flora.replaced.stand_in import offloading
from flora.replaced.weights import AdaptedWeight, ModeKind, plain


def _stacked(name: str, weight: Tensor, parts: int) -> AdaptedWeight:
    """A matrix of ``parts`` equal blocks of rows, seen as [parts, rows, columns]."""
    rows, columns = weight.shape
    kinds: tuple[ModeKind, ...] = ("stack", "channel", "channel")
    if parts == 1:
        return plain(name, (rows, columns), kinds[1:])
    return AdaptedWeight(name, (rows, columns), (parts, rows // parts, columns), kinds)


class MultiheadAttention(FloraLayer):
    """nn.MultiheadAttention: the fused projection of query, key and value as [3, d, d], and the output projection.

    Where query, key and value have sizes of their own, torch keeps three matrices, and each is adapted for itself.
    """

    @override
    def describe_weights(self, config: FloraConfig, name: str) -> list[AdaptedWeight]:
        base = self.get_base_layer()
        matrix: tuple[ModeKind, ...] = ("channel", "channel")
        if base.in_proj_weight is not None:
            inputs = [_stacked("in_proj_weight", base.in_proj_weight, 3)]
        else:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            inputs = [plain(name, getattr(base, name).shape, matrix) for name in names]
        return [*inputs, plain("out_proj.weight", base.out_proj.weight.shape, matrix)]

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # nn.TransformerEncoderLayer asks this before it takes the weights for its fused kernel, past this layer.
        return False


class Recurrent(FloraLayer):
    """nn.LSTM, nn.GRU, nn.RNN and their cells: every weight as [gates, hidden, in]; projections as [out, in]."""

    @override
    def describe_weights(self, config: FloraConfig, name: str) -> list[AdaptedWeight]:
        base = self.get_base_layer()
        names = [key for key, _ in base.named_parameters(recurse=False)]
        if parametrize.is_parametrized(base):
            names += base.parametrizations
        weights = [(key, getattr(base, key)) for key in names if key.startswith("weight_")]
        # A projection (weight_hr) has no gates.
        return [
            _stacked(key, value, 1 if key.startswith("weight_hr") else value.shape[0] // base.hidden_size)
            for key, value in weights
        ]


class Parameters(FloraLayer):
    """Bare parameters of a module, whatever it computes with them.

    Lives as a child of the module that owns them, so that the module keeps its place and its name (it may be the model
    itself, or hold other adapted layers), and puts the adapted parameters in place while the owner's forward runs.
    """

    child_name = "adapted_parameters"
    supports_dora = False

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: FloraConfig, name: str, targets: list[str]):
        self._targets = targets
        self._own: dict[str, Any] = {}
        self._depth = 0
        super().__init__(base_layer, adapter_name, config, name)
        # The owner is the parent, not a child: it must not be registered as one.
        del self._modules["base_layer"]
        self.__dict__["base_layer"] = base_layer
        self._hooks = (
            base_layer.register_forward_pre_hook(self._put_in_place),
            base_layer.register_forward_hook(self._put_back, always_call=True),
        )

    def target(self, names: list[str]) -> None:
        """Set which parameters the next adapter adapts."""
        self._targets = names

    @override
    def describe_weights(self, config: FloraConfig, name: str) -> list[AdaptedWeight]:
        described = []
        for key in self._targets:
            shape = self.base_weight(key).shape
            full_name = f"{name}.{key}".lstrip(".")
            if not 2 <= len(shape) <= 6:
                raise ValueError(f"target_parameters: {full_name} has {len(shape)} modes; 2 to 6 can be adapted")
            kinds = stacked_kinds(len(shape), config, full_name, default=(0,) if len(shape) > 2 else ())
            described.append(plain(key, shape, kinds, output_dim=None))
        return described

    @override
    def base_weight(self, name: str) -> Tensor:
        return self._own[name] if name in self._own else super().base_weight(name)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Pass the input through: an owner that calls all its children in turn (nn.Sequential) calls this one too."""
        return args[0]

    def _put_in_place(self, owner: nn.Module, args: Any) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return
        adapters = self._present(self.active_adapters)
        names = dict.fromkeys(name for adapter in adapters for name in self.weights[adapter])
        if names and offloading(owner):
            raise ValueError(
                f"{self.full_name(next(iter(names)))}: a bare parameter of an offloaded module cannot be adapted, as "
                "its own values are put back when the module runs; keep the module on the device (device_map)"
            )
        adapted: dict[str, Any] = {name: self.adapted_weight(name, adapters) for name in names}
        for name, value in adapted.items():
            self._own[name] = owner._parameters[name]
            owner._parameters[name] = value

    def _put_back(self, owner: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            for name, own in self._own.items():
                owner._parameters[name] = own
            self._own.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Merge if asked, and let go of the owner; PEFT calls this when it unloads adapters."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        for hook in self._hooks:
            hook.remove()
        return nn.Identity()
