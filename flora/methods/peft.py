"""Any PEFT method, FLoRA included."""

import dataclasses
import importlib
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import TrainerCallback

from flora.adapters.config import FloraConfig
from flora.adapters.rates import core_parameters
from flora.methods import alpha
from flora.methods.allocation import Spectra, check_allocation
from flora.methods.base import CONVS, LAYERS, OLD_NAME_IN_PEFT, Adapted, adaptable, effective_ranks, normalisations
from flora.methods.budget import Budget, Matched
from flora.methods.gradient import GradientSettings
from flora.methods.ladders import has_ranks
from flora.replaced.config import ReplacedConfig
from flora.replaced.targets import exactly
from flora.values import with_floats

_KINDS = {kind.__name__: kind for kind in LAYERS}


class Peft:
    """Any PEFT method, FLoRA included; the head is trained through ``modules_to_save``.

    Args:
        name: the method's name in records.
        config_class: import path of the PEFT config, e.g. ``flora.FloraConfig``.
        target_modules: ``all`` (every conv and linear except the head), ``norms`` (every normalisation layer with
            parameters), or what PEFT accepts: names or a regex.
        skip_depthwise: leave depthwise and grouped convolutions out, for methods that cannot adapt them.
        skip_own_padding: leave convolutions out that pad their input themselves (TensorFlow's "same" in timm), for
            methods that run their update as a convolution with the layer's ``padding``.
        layer_types: the kinds of layers that the method can adapt, e.g. ``[Linear]``; others are left out. None: all.
        core_lr_ratio: how many times faster FLoRA's cores learn than all else; None: as fast.
        b_lr_ratio: the same of LoRA's second matrix B, as in LoRA+ (arXiv 2402.12354).
        explain: say on stderr, when training starts, in which form every layer runs (methods that have several).
        options: everything else goes to the PEFT config; a ``*_pattern`` may be a list of ``{pattern, rank}`` (or
            ``{pattern, shape}``), since Hydra's command line cannot carry a regex as a key; an alpha may be a multiple
            of the rank, ``2r``, that of each layer where a budget or patterns set ranks layer by layer.
            ``init=gradient`` of FLoRA's makes the adapter with ``zero_output``; the run gives it its start.

    Attributes:
        budget: how many parameters to train outside the head, which sets all ranks; None: the options do.
        starts_from_gradients: whether ``flora.init_from_gradients`` belongs to the method.

    Raises:
        ValueError: a setting that cannot be used.
    """

    def __init__(
        self,
        name: str,
        config_class: str,
        target_modules: str | Sequence[str] = "all",
        skip_depthwise: bool = False,
        skip_own_padding: bool = False,
        layer_types: Sequence[str] | None = None,
        core_lr_ratio: float | None = None,
        b_lr_ratio: float | None = None,
        explain: bool = False,
        **options: Any,
    ) -> None:
        module, _, attribute = config_class.rpartition(".")
        if module.split(".")[0] not in ("flora", "peft"):
            raise ValueError(f"adapter.config_class {config_class!r} is not allowed: name a config of flora or peft")
        self.name = name
        try:
            self.config_class = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"adapter.config_class {config_class!r} cannot be found ({error})") from error
        if not (isinstance(self.config_class, type) and issubclass(self.config_class, peft.PeftConfig)):
            raise ValueError(f"adapter.config_class {config_class!r} is not allowed: it is no PEFT config")
        self.budget: Budget | None = None
        self.explain = explain
        self._lr_ratios = {"core_lr_ratio": core_lr_ratio, "b_lr_ratio": b_lr_ratio}
        for key, ratio in self._lr_ratios.items():
            if ratio is not None and not (type(ratio) in (int, float) and 0 < ratio < math.inf):
                raise ValueError(f"adapter.{key} must be a number above 0, got {ratio!r}")
        self.target_modules = target_modules
        self.skip_depthwise = skip_depthwise
        self.skip_own_padding = skip_own_padding
        unknown = [kind for kind in layer_types or () if kind not in _KINDS]
        if unknown:
            raise ValueError(f"adapter.layer_types: {unknown[0]!r} is none of {', '.join(_KINDS)}")
        self.layer_types = LAYERS if layer_types is None else tuple(_KINDS[kind] for kind in layer_types)
        self._gradient = GradientSettings()
        self.starts_from_gradients = options.get("init") == "gradient"
        if self.starts_from_gradients:
            if not issubclass(self.config_class, FloraConfig):
                raise ValueError(f"adapter.init=gradient is a start of FLoRA's (adapter=flora), {name} has none")
            options["init"] = "zero_output"
        options = with_floats(self.config_class, options)
        self.options = {key: _pattern(key, value) for key, value in options.items()}
        self.alpha = alpha.multiple(options)

    @property
    def has_ranks(self) -> bool:
        """Whether a budget can set the ranks, layer by layer."""
        return has_ranks(self.config_class)

    def set_budget(
        self, size: str | int | float | None, allocation: str | None = None, matched: Matched | None = None
    ) -> None:
        """Let a budget set the ranks of a method that has some; None: the options do. See ``Budget`` for the rest."""
        if check_allocation(allocation) == "gradient" and size is None:
            raise ValueError("adapter.allocation=gradient shares a budget: set adapter.budget, or leave it out")
        self.budget = None if size is None else Budget(size, allocation, matched)

    def set_gradient(self, **settings: Any) -> None:
        """Say how to look at gradients, if anything asks for that: fields of ``GradientSettings``."""
        self._gradient = GradientSettings(**settings)

    @property
    def gradient(self) -> GradientSettings | None:
        """What is looked at before training; None: nothing."""
        return self._gradient if self.starts_from_gradients or self.allocates_by_gradients else None

    @property
    def allocates_by_gradients(self) -> bool:
        """Whether ``apply`` needs spectra."""
        return self.budget is not None and self.budget.allocation == "gradient"

    def apply(self, model: nn.Module, head: Sequence[str], spectra: Spectra | None = None) -> Adapted:
        """Wrap ``model``; raises ValueError naming the field when a setting does not fit the model.

        Args:
            model, head: see Method.apply.
            spectra: of the gradients, for a budget with ``allocation=gradient``.
        """
        targets, skipped = self._targets(model, head)
        fields = {field.name for field in dataclasses.fields(self.config_class)}
        if foreign := [key for key in self.options if key not in fields]:
            raise ValueError(f"{foreign[0]}: {self.name} has no such setting; leave it out")
        layers = ", ".join(adaptable(model, head)[:3])
        if missed := self._missed(model):
            raise ValueError(f"target_modules: {', '.join(missed)} match no layer; layers are called {layers}, ...")
        config = self._config(targets, head)
        try:
            if self.budget is not None:
                self.budget.solve(config, model, head, self.target_modules, spectra)
            if self.alpha is not None and not isinstance(config, ReplacedConfig):
                alpha.follow_ranks(config, *self.alpha)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=OLD_NAME_IN_PEFT)
                wrapped = peft.get_peft_model(model, config)
        except NoMatchingPeftModuleError as error:
            raise ValueError(
                f"target_modules: {self.target_modules!r} match no layer; layers are called {layers}, ..."
            ) from error
        callbacks: list[TrainerCallback] = [Explain()] if self.explain else []
        return Adapted(wrapped, skipped, effective_ranks(wrapped), callbacks, lr_scales=self._lr_scales(wrapped))

    def _lr_scales(self, wrapped: nn.Module) -> dict[str, float]:
        """Factors of the learning rate, by name, of what learns at a rate of its own."""
        scales: dict[str, float] = {}
        for key, parameters, what in (
            ("core_lr_ratio", core_parameters, "core"),
            ("b_lr_ratio", _b_parameters, "matrix B of LoRA"),
        ):
            ratio = self._lr_ratios[key]
            if ratio is not None:
                faster = parameters(wrapped)
                if not faster:
                    raise ValueError(f"{key}: {self.name} trains no {what}; leave it out")
                scales |= dict.fromkeys(faster, ratio)
        return scales

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` (PEFT's format, head included)."""
        assert isinstance(model, peft.PeftModel)
        with warnings.catch_warnings():
            # PEFT asks the hub whether the vocabulary grew; ours never does.
            warnings.filterwarnings("ignore", message="Could not find a config file")
            model.save_pretrained(str(folder))

    def _config(self, targets: str | list[str], head: Sequence[str]) -> Any:
        """The PEFT config; of our own methods an alpha that follows the ranks is a constant scale."""
        options = dict(self.options)
        if self.alpha is not None:
            key, factor = self.alpha
            del options[key]
            if issubclass(self.config_class, ReplacedConfig):
                if options.get("scale") is not None or options.get("rank_stabilized"):
                    raise ValueError(f"{key}: a multiple of the rank excludes scale and rank_stabilized; give a number")
                options["scale"] = factor
        return self.config_class(target_modules=targets, modules_to_save=list(head), **options)

    def _missed(self, model: nn.Module) -> list[str]:
        """Listed names that are no module's, nor the end of one's: PEFT passes over them as long as others match."""
        if isinstance(self.target_modules, str):
            return []
        names = [f".{name}" for name, _ in model.named_modules()]
        return [target for target in self.target_modules if not any(name.endswith(f".{target}") for name in names)]

    def _targets(self, model: nn.Module, head: Sequence[str]) -> tuple[str | list[str], list[str]]:
        if self.target_modules == "all":
            names = adaptable(model, head)
        elif self.target_modules == "norms":
            return exactly(normalisations(model, head), model), []
        elif self.skip_depthwise or self.skip_own_padding or self.layer_types != LAYERS:
            probe = peft.LoraConfig(target_modules=cast(Any, self.target_modules))
            names = [n for n, m in model.named_modules() if isinstance(m, LAYERS) and _matches(probe, n)]
        else:
            names = []
        if not names:
            targets = self.target_modules
            return (targets if isinstance(targets, str) else list(targets)), []
        skipped = sorted(name for name in names if not self._can_adapt(model.get_submodule(name)))
        if len(skipped) == len(names):
            raise ValueError(f"target_modules: {self.name} can adapt none of the targeted layers ({skipped[0]}, ...)")
        return exactly(sorted(set(names) - set(skipped)), model), skipped

    def _can_adapt(self, layer: nn.Module) -> bool:
        if self.skip_depthwise and getattr(layer, "groups", 1) > 1:
            return False
        own_padding = isinstance(layer, CONVS) and all(type(layer).forward is not conv.forward for conv in CONVS)
        return isinstance(layer, self.layer_types) and not (self.skip_own_padding and own_padding)


class Explain(TrainerCallback):
    """Says on stderr how the adapted layers run, once the model is where it trains."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Print the lines of the tuner's ``explain``."""
        tuner: Any = getattr(model, "base_model", None)
        if not hasattr(tuner, "explain"):
            print("explain: this method has one form only", file=sys.stderr)
            return
        low = torch.float16 if args.fp16 else torch.bfloat16
        with torch.autocast(args.device.type, low, enabled=args.bf16 or args.fp16):
            print(*tuner.explain(), sep="\n", file=sys.stderr)


def _b_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained second matrices of LoRA's layers and embeddings, by name."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {n: p for n, p in trained.items() if ".lora_B." in f".{n}" or ".lora_embedding_B." in f".{n}"}


def _pattern(key: str, value: Any) -> Any:
    """A list of two-key mappings, one of them ``pattern``, as the dict that PEFT expects."""
    if not key.endswith("_pattern") or value is None or isinstance(value, dict):
        return value
    if not isinstance(value, list):
        raise ValueError(f"adapter.{key} must be a list of {{pattern, rank}} entries, got {value!r}")
    patterns = {}
    for entry in value:
        if not isinstance(entry, dict) or len(entry) != 2 or "pattern" not in entry:
            raise ValueError(f"adapter.{key} must be a list of {{pattern, rank}} entries, got {entry!r}")
        (setting,) = (v for k, v in entry.items() if k != "pattern")
        patterns[str(entry["pattern"])] = setting
    return patterns


def _matches(config: peft.PeftConfig, name: str) -> bool:
    return bool(check_target_module_exists(config, name))
