"""The base of PEFT tuners: which adapted layer stands in for which module of a model, and what of it is loaded."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NoReturn

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from typing_extensions import override

from flora.replaced import merging, targets
from flora.replaced.bases import packed_linear
from flora.replaced.layer import ReplacedLayer
from flora.replaced.mixed import passing_names
from flora.replaced.saving import check_adapter_name, put_back, whole, without
from flora.replaced.tied import check_tokens, note_tied_weights
from flora.replaced.weights import matching_pattern

Layers = tuple[tuple[tuple[type[nn.Module], ...], type[ReplacedLayer]], ...]  # kinds of modules -> what adapts them
_HEADS_OF_PEFT = ("classifier", "score", "qa_outputs")  # PEFT adds them to modules_to_save, there or not


class ReplacedModel(BaseTuner):
    """A model whose targeted layers are ``ReplacedLayer``s; made by ``peft.get_peft_model(model, config)``."""

    prefix = "tucker_"
    tuner_layer_cls: type[ReplacedLayer] = ReplacedLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]
    layer_classes: ClassVar[Layers]

    # ------------------------------------------------------------------ injection

    @override
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        targets.choose(config, model, self._adapts)
        names = config.target_modules
        names = sorted(names) if isinstance(names, list | set | tuple) else []
        try:
            check_adapter_name(adapter_name)
            with warnings.catch_warnings():
                # PEFT compares rank_pattern with modules only; names of parameters are checked below.
                warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            self._take_out(model, adapter_name)
            raise
        self.warn_of_missed("target_modules", names, self.targeted_module_names)
        there = [name for name, _ in model.named_modules()]
        saved = [own for own in config.modules_to_save or [] if own not in _HEADS_OF_PEFT]
        if missed := [own for own in saved if not any(name.endswith(own) for name in there)]:
            warnings.warn(f"modules_to_save: {', '.join(missed)} match no module and stay untrained", stacklevel=2)
        adapted = [name for name, _, _ in self.adapted_weights(adapter_name)]
        adapted += [name.rpartition(".")[0] for name in adapted] + self.targeted_module_names
        for field in config._patterns:
            for pattern in getattr(config, field):
                if not any(matching_pattern({pattern: True}, name) for name in adapted):
                    warnings.warn(f"{field}[{pattern!r}] matches no adapted layer", stacklevel=2)

    def _take_out(self, model: nn.Module, adapter_name: str) -> None:
        """Undo an injection that failed half-way: the model is as it was before."""
        self.peft_config.pop(adapter_name, None)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, ReplacedLayer) and adapter_name in layer.weights:
                layer.forget(adapter_name)
                if not layer.weights:
                    parent, _, child = name.rpartition(".")
                    unload = getattr(type(layer), "unload_and_optionally_merge_module", None)
                    base = layer.get_base_layer() if unload is None else unload(layer, False, False, None)
                    self._replace_module(model.get_submodule(parent), child, base, layer)

    @staticmethod
    @override
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        found = check_target_module_exists(peft_config, key)
        targets = peft_config.target_modules
        if isinstance(found, _ExcludedModule) or not isinstance(targets, list | set) or key in targets:
            return found
        # PEFT looks for a layer's index behind two names, and so takes an expert's for that of layers.3.experts.0.
        return check_target_module_exists(peft_config, f".{key}")

    @staticmethod
    def warn_of_missed(field: str, targets: Sequence[str], names: Sequence[str]) -> None:
        """Warn of targets that are neither one of the names nor the end of one."""
        missed = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
        if missed:
            warnings.warn(f"{field}: {', '.join(missed)} match nothing and stay untrained", stacklevel=3)

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
        if isinstance(parent, ReplacedLayer):
            return  # part of an adapted layer, such as the output projection of an attention
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, current_key)
        else:
            new_module = self._create_new_module(peft_config, adapter_name, target, current_key)
            if adapter_name not in self.active_adapters:
                new_module.requires_grad_(False)  # a further adapter is not trained before it is made active
            self._replace_module(parent, target_name, new_module, target)

    def _create_new_module(  # type: ignore[override]
        self, config: Any, adapter_name: str, target: nn.Module, name: str
    ) -> ReplacedLayer:
        if isinstance(target, BaseTunerLayer):
            raise ValueError(f"target_modules: {name} already carries an adapter of another method")
        if (layer := self._layer_for(target)) is not None:
            return layer(target, adapter_name, config, name)
        supported = ", ".join(kind.__name__ for kinds, _ in self.layer_classes for kind in kinds)
        self.refuse_layer(config, name, type(target).__name__, supported)

    def _layer_for(self, module: nn.Module) -> type[ReplacedLayer] | None:
        """What adapts a module of its kind, if anything does."""
        found = (
            layer
            for kinds, layer in self.layer_classes
            if isinstance(module, kinds) or (nn.Linear in kinds and packed_linear(module))
        )
        return next(found, None)

    def _adapts(self, module: nn.Module) -> bool:
        if isinstance(module, ReplacedLayer):
            return isinstance(module, self.tuner_layer_cls) and not module.child_name
        return self._layer_for(module) is not None

    def refuse_layer(self, config: Any, name: str, kind: str, supported: str) -> NoReturn:
        """Raise ValueError: the layer of this name and kind is none of the supported kinds."""
        raise ValueError(f"target_modules: {name} is a {kind}; {config.method.value} takes {supported}")

    @override
    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # an adapter is created on its base layer's device

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        # Opened by PeftModel around forward and generate.
        return passing_names(self, kwargs)

    # ------------------------------------------------------------------ merging

    @override
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    @override
    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_mergeable(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Refuse before anything is changed, so that no model is left merged in part."""
        for layer in self.model.modules():
            if isinstance(layer, ReplacedLayer):
                names = layer.active_adapters if adapter_names is None else adapter_names
                merging.rehearse(layer, [n for n in names if n in layer.weights and n not in layer.merged_adapters])

    @override
    def _check_merge_allowed(self) -> None:
        # PEFT warns of tied weights here, into which its own methods merge at both ends; a merged layer of ours lets go
        # of what it shares.
        check_tokens(self.model)
        note_tied_weights(self.model, [layer for layer in self.model.modules() if isinstance(layer, ReplacedLayer)])

    # ------------------------------------------------------------------ saving and loading

    @classmethod
    @override
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        put_back(model, adapter_name, unwanted_adapter_names, cls.tuner_layer_cls, state_dict)
        saved = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return whole(without(model, unwanted_adapter_names, cls.tuner_layer_cls, saved))

    @classmethod
    @override
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Other entries have lost it already; their last name may be the adapter's by chance.
        ours = f".{cls.prefix}" in f".{key}"
        return super()._remove_adapter_name_from_key(key, adapter_name) if ours else key

    @classmethod
    @override
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = model.state_dict()
        for key, value in remapped.items():
            if f".{cls.prefix}" not in f".{key}":
                continue
            key = key if key in own else key.removeprefix("base_model.model.")
            if key not in own:
                raise ValueError(f"adapter does not fit the model: the model has no adapted weight for {key}")
            if own[key].shape != value.shape:
                raise ValueError(
                    f"adapter does not fit the model: {key} is {list(value.shape)} in the file, {list(own[key].shape)} "
                    "in the model; load it onto the architecture and with the ranks it was trained with"
                )
        return remapped

    # ------------------------------------------------------------------ inspection

    def adapted_weights(self, adapter_name: str) -> Iterator[tuple[str, Any, str]]:
        """Full name (layer.weight), layer and weight name of everything an adapter adapts."""
        for name, layer in self.model.named_modules():
            if isinstance(layer, ReplacedLayer) and adapter_name in layer.weights:
                owner = name.removesuffix(layer.child_name).rstrip(".")
                for weight in layer.weights[adapter_name]:
                    yield f"{owner}.{weight}".lstrip("."), layer, weight

    def effective_ranks(self, adapter_name: str | None = None) -> dict[str, list[int]]:
        """Clipped ranks per mode of every adapted weight; 1 for a mode of size 1, which has no factor.

        Args:
            adapter_name: which adapter; the first active one by default.

        Returns:
            Name of the layer (followed by the name of the weight where a layer has several) -> rank per mode.
        """
        adapter_name = adapter_name or self.active_adapters[0]
        listed = {}
        for name, layer, weight in self.adapted_weights(adapter_name):
            short = name.removesuffix(f".{weight}") if weight == "weight" else name
            listed[short] = list(layer.effective_ranks[adapter_name][weight])
        return listed

    def explain(self, adapter_name: str | None = None) -> list[str]:
        """How the layers run now, a line for each shape: form, ranks, and how many weights are built together.

        The choice of ``forward='auto'`` depends on the device and on autocast: ask where the model trains.

        Args:
            adapter_name: which adapter; the first active one by default.
        """
        adapter_name = adapter_name or self.active_adapters[0]
        together = self._together()
        lines: dict[tuple[Any, ...], list[str]] = {}
        for name, layer, weight in self.adapted_weights(adapter_name):
            form = layer.form_for([adapter_name])
            ranks = layer.effective_ranks[adapter_name][weight]
            shape = layer.weights[adapter_name][weight].shape
            lines.setdefault((form, shape, ranks, together.get(layer, 1)), []).append(name)
        return [
            f"{form} {list(shape)} ranks {list(ranks)}: {len(names)} weight{'s' * (len(names) > 1)}"
            f"{f', {count} built together' if count > 1 else ''} ({names[0]}{', ...' if len(names) > 1 else ''})"
            for (form, shape, ranks, count), names in lines.items()
        ]

    def _together(self) -> Mapping[Any, int]:
        """With how many layers the weight of a layer is built; 1 for those that are not listed."""
        return {}

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: only FLoRA's adapters are combined."""
        raise ValueError(f"{type(self).__name__} cannot combine adapters; merge them one after the other")
