"""Language and vision-language models from transformers: their sizes, their weights, their heads."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from flora.contents import checksum
from flora.errors import ConfigError, WeightsError, first_line
from flora.files import read_object
from flora.methods.base import first_lines
from flora.methods.heads import in_head
from flora.models.gguf import converted
from flora.models.quiet import quietly
from flora.models.spec import Kind
from flora.models.weights import Source, Weights, as_source, facts_of, read, resolve, sha256_of
from flora.values import with_floats

KINDS: dict[Kind, Any] = {
    "sequence_classification": transformers.AutoModelForSequenceClassification,
    "causal_lm": transformers.AutoModelForCausalLM,
    "image_text": transformers.AutoModelForImageTextToText,
}
_HEAD_DROPOUT = {"deberta-v2": "cls_dropout"}
_POSITIONS_AFTER_PAD = ("roberta", "xlm-roberta", "camembert")
_TOKENIZER = (".json", ".txt", ".model", ".py", ".jinja", ".tiktoken")  # names of a tokenizer's files end so
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class TransformersModel:
    """A transformers architecture with its weights: a ``TextSpec`` (flora.models.spec).

    Args:
        name: the name in records.
        kind: which model class: ``sequence_classification``, ``causal_lm`` or ``image_text`` (vision-language).
        architecture: ``model_type`` and the sizes, as in transformers' ``config.json``.
        classifier: names of the modules trained in full beside the adapter and counted as head: a fresh classifier
            (with the pooler, where pretraining left none), or the projector of a vision-language model. None given:
            what a classifier of the architecture has beside its backbone, as ``score`` of a language model.
        pretrained: load weights; otherwise the network starts random.
        weights: where they lie: a path (file or folder), a ``Source`` or its fields as a mapping. Files carry the
            names of transformers, or are GGUF; an ``.index.json`` names the shards beside it.
        adapter_targets: what adapters adapt by default, names or a regular expression as PEFT reads them.
        tokenizer: a folder with the tokenizer, or a repository on the hub; None: it lies beside the weights.
        head_dropout: dropout before the classifier; None: as the architecture has it.
        trust_remote_code: run the code that a tokenizer brings along; without it such a tokenizer is refused.

    Raises:
        ConfigError: an unknown kind or model type, or pretrained without weights.
    """

    parts: Any = None  # whose weights are put together, where a network has several (flora.models.llava)

    def __init__(
        self,
        name: str,
        kind: Kind,
        architecture: Mapping[str, Any],
        classifier: Sequence[str] = (),
        pretrained: bool = True,
        weights: Weights | None = None,
        adapter_targets: str | Sequence[str] = "all",
        tokenizer: str | None = None,
        head_dropout: float | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if kind not in KINDS:
            raise ConfigError(f"model.kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.name = name
        self.kind = kind
        self.architecture = dict(architecture)
        self._classifier = list(classifier)
        self.pretrained = pretrained
        self.weights = as_source(weights) if weights else None
        self.adapter_targets = adapter_targets
        self.tokenizer_place = tokenizer
        self.head_dropout = head_dropout
        self.trust_remote_code = trust_remote_code
        self.config()
        if pretrained and self.weights is None and self.parts is None:
            raise ConfigError(f"model.weights: name a place for the weights of {name}, or set model.pretrained=false")

    @property
    def classifier(self) -> list[str]:
        """Names of the modules that are trained in full."""
        if not self._classifier and self.kind == "sequence_classification":
            network: Any = self.skeleton()
            heads = [name for name, module in network.named_children() if any(True for _ in module.parameters())]
            self._classifier = [name for name in heads if name != network.base_model_prefix]
        return self._classifier

    @property
    def facts(self) -> dict[str, Any]:
        """What a record says of the weights: architecture, place and checksum."""
        facts: dict[str, Any] = {"model_type": self.architecture["model_type"], "pretrained": self.pretrained}
        if self.pretrained and self.parts is None:
            source = self._source()
            facts |= facts_of(source)
            if (index := resolve(source) if _is_index(source) else None) is not None:
                shards = {shard: _shard(source, index, shard) for shard in _shards(index)}
                facts["shards"] = {name: {"sha256": sha256_of(resolve(shard))} for name, shard in shards.items()}
        return facts | self._tokenizer_facts()

    def _tokenizer_facts(self) -> dict[str, Any]:
        """What identifies a tokenizer of the user's own, which may lie beside weights of his."""
        beside = self.weights.path if self.weights is not None else None
        named = self.tokenizer_place or beside
        if not named or (named == beside and named.endswith(".gguf")):  # which holds its own
            return {}
        place = Path(named).expanduser()
        folder = place if place.is_dir() else place.parent
        if not place.exists():
            return {"tokenizer": {"hub": named}}
        files = [path for path in folder.iterdir() if path.suffix in _TOKENIZER and ".index." not in path.name]
        return {"tokenizer": {"path": str(folder), "sha256": checksum(filter(Path.is_file, files), folder, deep=False)}}

    @property
    def max_length(self) -> int:
        """The longest text in tokens that the network has positions for."""
        config = self.config()
        text = config.get_text_config() if self.kind == "image_text" else config
        offset = text.pad_token_id + 1 if text.model_type in _POSITIONS_AFTER_PAD else 0
        return text.max_position_embeddings - offset

    def tokenizer(self) -> Any:
        """The tokenizer that belongs to the weights, as transformers loads it.

        Raises:
            ConfigError: no place is named, its vocabulary is not the network's, or it needs code that is not trusted.
            WeightsError: it is missing or unreadable, or without its vocabulary.
        """
        place = self.tokenizer_place or self._tokenizer_beside()
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=self.trust_remote_code)
            tokenizer(["a"]), tokenizer(["a"], ["a"])  # some files break only what is done with them
        except BaseException as error:  # transformers raises almost any type on files that are not what it expects
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of tokenizers' Rust
                raise
            if not self.trust_remote_code and "trust_remote_code" in str(error):
                raise ConfigError(
                    f"model.tokenizer: {place} brings code of its own, which is not run: choose another, or set "
                    "model.trust_remote_code=true where you trust it"
                ) from error
            reason = first_line(error)
            raise WeightsError(f"no tokenizer of {self.name} at {place} ({reason}): set model.tokenizer") from error
        config = self.config()
        if self.kind == "sequence_classification" and tokenizer.pad_token_id != config.pad_token_id:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)  # which the network looks for
        _check_vocabulary(tokenizer, config.get_text_config().vocab_size, self.name, place)
        return tokenizer

    def _tokenizer_beside(self) -> str:
        if self.weights is None:
            raise ConfigError(f"model.tokenizer: name a folder, {self.name} has no weights that it could lie beside")
        if self.weights.path:
            place = Path(self.weights.path).expanduser()
            if place.suffix == ".gguf":
                return str(converted(place))
            return str(place if place.is_dir() else place.parent)
        if self.weights.package:
            file = resolve(self.weights)
            return str(converted(file) if file.suffix == ".gguf" else file.parent)
        return str(self.weights.hub)

    def config(self, num_classes: int | None = None) -> Any:
        """The transformers config of the network; ``num_classes`` counts for classifiers only, two by default."""
        sizes = dict(self.architecture)
        if self.kind == "sequence_classification" and num_classes is not None:
            sizes["num_labels"] = num_classes
        if self.head_dropout is not None:
            sizes[_HEAD_DROPOUT.get(sizes["model_type"], "classifier_dropout")] = self.head_dropout
        try:
            config = transformers.AutoConfig.for_model(**_with_floats(sizes))
            if self.kind == "sequence_classification" and config.pad_token_id is None:
                # A language model is read at its last token that is no padding.
                ends = config.eos_token_id
                config.pad_token_id = (ends[0] if isinstance(ends, list) else ends) or 0
            return config
        except Exception as error:  # of a kind of its own for each check
            raise ConfigError(f"model.architecture: {first_lines(error)}") from error

    def skeleton(self, num_classes: int | None = None) -> nn.Module:
        """The network on the meta device, without values, to count with; ``num_classes`` as for ``config``."""
        with torch.device("meta"):
            return self._network(self.config(num_classes))

    def build(self, num_classes: int, drop_path: float = 0.0) -> nn.Module:
        """Make the network in float32: pretrained weights, a fresh classifier from torch's global seed.

        Args:
            num_classes: outputs of a classifier; other kinds have none.
            drop_path: must be 0, these networks skip no branches.

        Returns:
            a module in training mode on the CPU, called as transformers calls it.

        Raises:
            ConfigError: a setting that does not fit.
            WeightsError: the weights are missing, damaged or those of another network.
        """
        if drop_path:
            raise ConfigError(f"trainer.drop_path must be 0: {self.name} skips no branches")
        config = self.config(num_classes)
        if not self.pretrained:
            return self._network(config)
        state, source = self._state()
        fresh = self._fresh()
        state = {name: tensor for name, tensor in state.items() if not in_head(name, fresh)}
        try:
            with quietly():
                model, report = type(self.skeleton(num_classes)).from_pretrained(  # type: ignore[attr-defined]
                    None, config=config, state_dict=state, output_loading_info=True, dtype=torch.float32
                )
        except RuntimeError as error:
            raise WeightsError(f"{source} is not of {self.name}: {first_line(error)}") from error
        missing = sorted(name for name in report["missing_keys"] if not in_head(name, fresh))
        if missing:
            raise WeightsError(
                f"{source} is not of {self.name}: {len(missing)} tensors are missing, first {missing[0]}; "
                "name weights of this architecture"
            )
        return model.train()

    def _network(self, config: Any) -> nn.Module:
        try:
            return KINDS[self.kind].from_config(config, trust_remote_code=False)
        except Exception as error:  # transformers raises almost any type on sizes that do not fit each other
            raise ConfigError(f"model.architecture: {self.name} cannot be built ({first_line(error)})") from error

    def _fresh(self) -> list[str]:
        """Names of the modules that pretraining left out."""
        return self.classifier if self.kind == "sequence_classification" else []

    def _state(self) -> tuple[dict[str, Tensor], str]:
        """All pretrained tensors, and what to call their file."""
        source = self._source()
        return _read(source), source.name

    def _source(self) -> Source:
        assert self.weights is not None
        folder = Path(self.weights.path or "").expanduser()
        if not self.weights.path or not folder.is_dir():
            return self.weights
        file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
        if file is None:
            raise WeightsError(f"{folder} holds none of {', '.join(_FILES)}: correct model.weights")
        return replace(self.weights, path=str(file))


def _check_vocabulary(tokenizer: Any, rows: int, name: str, place: str) -> None:
    """Hold a tokenizer against the embedding of its network, of so many rows.

    transformers makes a tokenizer of special tokens alone where a folder has no vocabulary (DeBERTa's has 7, T5's 104).
    Embeddings are padded, to multiples of 128 or less: DeBERTa-v3's 128,001 tokens have 128,100 rows, Phi-2's 50,295
    have 51,200. So a tokenizer has at most as many tokens as there are rows, and at least half as many or all but 128.
    """
    tokens, special = len(tokenizer), set(tokenizer.all_special_ids)
    if sum(number not in special for number in tokenizer.get_vocab().values()) < 2:
        files = " or ".join(dict.fromkeys(tokenizer.vocab_files_names.values()))
        raise WeightsError(
            f"no vocabulary of {name} at {place}: its {tokens} tokens are special ones; put {files} there, or set "
            "model.tokenizer"
        )
    if tokens > rows:
        raise ConfigError(f"model.tokenizer: {place} has {tokens} tokens, but {name} knows {rows}")
    if tokens < min(rows / 2, rows - 128):
        raise ConfigError(
            f"model.tokenizer: {place} has {tokens} tokens, far fewer than the {rows} of {name}: name the tokenizer "
            "of these weights"
        )


def _shards(index: Path) -> list[str]:
    """Names of the files that an index lists, which lie beside it."""
    try:
        names = set(read_object(index)["weight_map"].values())
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("its weight_map names no files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is no index of weights ({first_line(error)}): fetch it again") from error
    return sorted(names)


def _is_index(source: Source) -> bool:
    return str(source.path or source.file).endswith(".index.json")


def _shard(source: Source, index: Path, shard: str) -> Source:
    """Where a shard lies: beside its index."""
    here = str(index.parent / shard) if source.path else None
    file = str(Path(source.file).parent / shard) if source.file else None
    return replace(source, path=here, file=file, sha256=None)


def _with_floats(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes, also of the parts, with floats where transformers takes no integer for one."""
    inner = {key: _with_floats(value) if isinstance(value, Mapping) else value for key, value in sizes.items()}
    kind = str(sizes.get("model_type"))
    return with_floats(transformers.CONFIG_MAPPING[kind], inner) if kind in transformers.CONFIG_MAPPING else inner


def _read(source: Source) -> dict[str, Tensor]:
    """All tensors of a file, or of the shards that an index names."""
    path = resolve(source)
    if path.name.endswith(".index.json"):
        state: dict[str, Tensor] = {}
        for shard in _shards(path):
            state |= _read(_shard(source, path, shard))
        return state
    if path.suffix == ".gguf":
        path = converted(path) / "model.safetensors"
    return read(path, load_file if path.suffix == ".safetensors" else partial(torch.load, weights_only=True))
