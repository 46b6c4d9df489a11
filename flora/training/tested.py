"""The settings of a saved run that is tested or predicts: its own, under what the user sets anew."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from flora import inputs
from flora.config import not_semantic, parsed, semantic_config
from flora.errors import ConfigError, WeightsError
from flora.training import saved

_PLACES = ("path", "bundled", "package", "hub")
GROUPS = ("task", "model", "adapter", "trainer", "protocol")


@dataclass(frozen=True)
class Tested:
    """A saved run under the settings that it is tested with, or predicts with.

    Attributes:
        cfg: the settings.
        folder: of its weights.
        anew: by key what was set anew, ``{"now": ..., "trained": ...}``.
        typed: keys of the command line.
    """

    cfg: DictConfig
    folder: Path
    anew: dict[str, Any] = field(default_factory=dict)
    typed: frozenset[str] = frozenset()

    @property
    def method(self) -> str:
        """The name of the method that trained it."""
        return str(saved.facts(self.folder).get("adapter", self.cfg.adapter.get("name")))

    @property
    def model(self) -> dict[str, Any]:
        """The settings of its model, resolved."""
        return dict(OmegaConf.to_container(self.cfg.model, resolve=True))  # type: ignore[arg-type]

    def prepare(self, task: Any, found: inputs.Inputs) -> None:
        """Tell a task, before it reads data, what the outputs of the run mean, and whether other data are read."""
        trained = saved.facts(self.folder)
        names, facts = trained.get("class_names"), trained.get("data")
        facts = facts if isinstance(facts, dict) else {}
        if self._elsewhere(found):
            task.whole_test = True
            task.trained_classes = names if isinstance(names, list) and len(names) > 1 else None
            baseline = facts.get("baseline")
            task.usual_class = baseline.get("class") if isinstance(baseline, dict) else None
        try:
            task.remember(facts)
        except (KeyError, TypeError, ValueError):
            return  # saved by older code, or a full copy of weights: the data that are read say it

    def _elsewhere(self, found: inputs.Inputs) -> bool:
        own = (saved.facts(self.folder).get("config") or {}).get("inputs") or {}
        return bool(own) and own.get("data") != found.get("data")

    def check(self, model: Any, method: Any, splits: Any, found: inputs.Inputs) -> None:
        """Refuse a model or a method that is not the trained one, other classes, and other base weights than its own.

        Args:
            model: see ``flora.models.spec``.
            method: see ``flora.methods.base``.
            splits: what it is tested on, see ``flora.tasks.base``.
            found: what identifies that; other data than the run's are said, and ``anew``.

        Raises:
            ConfigError: a model of another name, a method that nothing names, or classes by other names or in another
                order than the outputs of the network.
            WeightsError: other weights that nobody has named on the command line; those that were are ``anew``.
        """
        saved.check_method(self.folder, method)
        saved.check_same_model(self.folder, model.name)
        facts = saved.facts(self.folder)
        names, there = facts.get("class_names"), saved.written(splits.class_names)
        if isinstance(names, list) and splits.num_classes > 1 and names != there:
            raise ConfigError(
                f"checkpoint={self.folder} tells {_some(names)} apart, in this order, but the data has {_some(there)}: "
                "test it on data of its classes"
            )
        own = (facts.get("config") or {}).get("inputs") or {}
        if self._elsewhere(found):
            self.anew["data"] = {"now": found.get("data"), "trained": own.get("data")}
            print(
                "tested on other data than the run was trained on; of what it was trained on, some may be in the test",
                file=sys.stderr,
            )
        try:
            check_weights(self.folder, model)
        except WeightsError as error:
            if not any(key.partition(".")[0] in ("model", "experiment") for key in self.typed):
                raise
            print(f"tested on other base weights: {error}", file=sys.stderr)
            self.anew["weights"] = str(error)


def trained_with(folder: Path) -> dict[str, Any] | None:
    """What decided the run that saved a folder of weights (``flora.config.semantic_config``); None if it is unknown.

    No code is run on a folder's word: ``trust_remote_code`` is off, and ``model.allow`` is empty.

    Raises:
        ConfigError: what the folder says is not the config of a run.
    """
    if (config := saved.facts(folder).get("config")) is None:
        return None
    whole = isinstance(config, dict) and all(isinstance(config.get(group), dict) for group in GROUPS)
    # What a run writes is resolved: a reference would read this machine's environment on a folder's word.
    if not whole or type(config.get("seed")) is not int or "${" in json.dumps(config):
        raise ConfigError(f"{folder}/run.json: its config is not that of a run: copy the whole folder again")
    if config["model"].get("trust_remote_code"):
        config["model"]["trust_remote_code"] = False
    if config["model"].get("allow"):
        config["model"]["allow"] = []
    return config


def as_trained(cfg: DictConfig, typed: Sequence[str] | None) -> Tested:
    """The saved run ``cfg.checkpoint`` under its own settings, but for what was typed; says what that is.

    Groups that were typed (``task=imagefolder``) take the place of the run's, single settings go into them.

    Args:
        cfg: what was composed.
        typed: the overrides that it was composed from; None: it is meant as it is.

    Raises:
        ConfigError: no such run, a method other than its own, or another seed where the base weights come from it.
    """
    folder = saved.adapter_folder(cfg.checkpoint, cfg.mode)
    if typed is None:
        return Tested(cfg, folder)
    own, facts = trained_with(folder), saved.facts(folder)
    words = [parsed(word) for word in typed]
    keys = frozenset(word.key_or_group for word in words)
    if own is None:
        print(f"checkpoint={cfg.checkpoint} does not say how it was trained: what is typed counts", file=sys.stderr)
        return Tested(cfg, folder, typed=keys)
    asked: Any = OmegaConf.to_container(cfg, resolve=True)
    whole = set(GROUPS) if "experiment" in keys else keys & set(GROUPS)
    if (method := asked["adapter"].get("name")) != own["adapter"].get("name") and "adapter" in whole:
        raise ConfigError(
            f"adapter={method}: checkpoint={cfg.checkpoint} was trained with {own['adapter'].get('name')}"
        )
    new: Any = {"adapter": own["adapter"]}
    for group in {*GROUPS} - whole - {"adapter"}:  # what decides no result is this machine's
        new[group] = own[group] | {key: asked[group][key] for key in not_semantic(group) if key in asked[group]}
    if "trainer" in new:  # it may have settings that are new since then
        new["trainer"] = asked["trainer"] | new["trainer"]
    if not keys & {"seed", "experiment"}:
        new["seed"] = own["seed"]
    place = facts.get("data_folder")  # where it is gone, no other takes its place without a word
    if "paths.data" not in keys and "paths" not in keys and isinstance(place, str):
        new["paths"] = asked["paths"] | {"data": place}
    tested = OmegaConf.create(asked | new)
    for word in words:
        group, _, rest = word.key_or_group.partition(".")
        if rest and group in new:
            _set(tested, cfg, word.key_or_group, word.is_delete())
    with open_dict(tested):
        tested.checkpoint = cfg.checkpoint
    anew = _differences(own, semantic_config(tested))
    own_keys = [key for key in anew if key.startswith("adapter.")]
    if wrong := next((key for key in own_keys if key in keys), next(iter(own_keys), None)):
        raise ConfigError(f"{wrong}={anew[wrong]['now']}: a saved adapter is as it was trained; leave {wrong} out")
    weights = facts.get("weights")
    if isinstance(weights, Mapping) and weights.get("pretrained") is False and tested.seed != own["seed"]:
        raise ConfigError(
            f"seed={tested.seed}: the base weights of checkpoint={cfg.checkpoint} are random and come from its "
            f"seed, {own['seed']}: leave seed out"
        )
    if anew:
        said = ", ".join(f"{key}={value['now']} (trained with {value['trained']})" for key, value in anew.items())
        print(f"{'tested' if cfg.mode == 'eval' else 'predicted'} with: {said}", file=sys.stderr)
    return Tested(tested, folder, anew, keys)


def _set(tested: DictConfig, cfg: DictConfig, key: str, delete: bool) -> None:
    """Let a setting be as it was composed."""
    parent, _, last = key.rpartition(".")
    try:
        with open_dict(tested):
            if not delete:
                value = OmegaConf.select(cfg, key)
                value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
                OmegaConf.update(tested, key, value, merge=False, force_add=True)
            elif isinstance(node := OmegaConf.select(tested, parent), DictConfig):
                node.pop(last, None)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key} is no setting of this run: {error.msg or error}") from error


def _differences(own: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """By key what differs in the groups and the seed; a group of another class is one difference."""
    found = {}
    for group in GROUPS:
        before, after = own[group], now[group]
        if before.get("_target_") != after.get("_target_"):
            found[group] = {"now": _name(after), "trained": _name(before)}
            continue
        flat, other = _flat(before, group), _flat(after, group)
        for key in [*flat, *(key for key in other if key not in flat)]:
            if flat.get(key) != other.get(key):
                found[key] = {"now": other.get(key), "trained": flat.get(key)}
    if own["seed"] != now["seed"]:
        found["seed"] = {"now": now["seed"], "trained": own["seed"]}
    return found


def _some(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names[:10])) + (", ..." if len(names) > 10 else "")


def _name(group: Mapping[str, Any]) -> Any:
    return group.get("name") or group.get("timm_name") or str(group.get("_target_")).rpartition(".")[2]


def _flat(node: Any, key: str) -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {key: node}
    return {name: value for part, inner in node.items() for name, value in _flat(inner, f"{key}.{part}").items()}


def check_weights(folder: Path, model: Any) -> None:
    """WeightsError where the base weights of a model differ from those that a saved run was trained on."""
    trained, now = saved.facts(folder).get("weights"), _flat(model.facts, "")
    for key, value in _flat(trained, "").items() if isinstance(trained, Mapping) else ():
        place, _, what = key.rpartition(".")
        if what in ("sha256", "code_sha256", "pretrained") and now.get(key, value) != value:
            name = next((now[f"{place}.{kind}"] for kind in _PLACES if f"{place}.{kind}" in now), model.name)
            raise WeightsError(
                f"{name} has {what} {now[key]}, but {folder} was trained on weights with {what} {value}: name those "
                "with model.weights=PATH"
            )
