"""The contract of a task: three splits, a forward pass, a loss and a metric; and what every family needs for it."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

import evaluate
import numpy as np
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from flora import contents
from flora.errors import ConfigError
from flora.models.spec import ModelSpec

COUNTS = "counts"  # in a batch of an evaluation: False where it is only there because a batch cannot be empty

Batch = dict[str, Tensor]
# (module, batch, training) -> (outputs, targets): see Task.forward. Outputs are a tensor, or a tuple or dict of some.
Forward = Callable[[nn.Module, Batch, bool], tuple[Any, Tensor]]
Spec = TypeVar("Spec", bound=ModelSpec)


class Split(Protocol):
    """A dataset that gathers whole batches, with what is to be predicted under ``labels``.

    It may have more: ``lengths`` (a number an example), by which batches of texts are formed, and
    ``padded_to(multiple)``, which gives a split whose batches are as long as multiples of that; ``nbytes`` and
    ``to(device)``, if it can lie on a GPU; ``begin_epoch(seed, epoch)``, if its random numbers depend on them;
    ``unreadable`` (bool, one an image), what was skipped.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch:
        """One example."""

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch, which the DataLoader hands to ``collate_fn``, the identity."""

    def subset(self, count: int, seed: int = 0) -> Split:
        """``count`` examples in their old order, drawn with ``seed``; itself where there are no more."""


class TrainSplit(Split, Protocol):
    """A split to train on."""

    def concat(self, other: Any) -> TrainSplit:
        """This and the validation split after each other; ConfigError where they cannot be one."""


@dataclass(frozen=True)
class Splits:
    """A loaded task.

    Attributes:
        train: fits the adapter.
        validation: chooses settings and epochs.
        test: is evaluated once; it may be ``validation`` itself, where that is what was published.
        num_classes: counts outputs, 1 for a regression, 0 for a language model.
        class_names: in the order of outputs.
        facts: JSON-able, goes into the record: ``source``, ``counts`` per split, ``split_rule``, ``sha256`` of the
            files or of the rendered content, ``unreadable`` images skipped, ``warnings``.
        further_tests: are evaluated as well, their metrics under ``NAME_METRIC``.
        drawn: what names each example, by split, where the splits were drawn from the user's data; else empty.
    """

    train: TrainSplit
    validation: Split
    test: Split
    num_classes: int
    class_names: list[str]
    facts: dict[str, Any]
    further_tests: Mapping[str, Split] = field(default_factory=dict)
    drawn: Mapping[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Predicted:
    """What was predicted of an image of the user's own, to be written to files.

    Attributes:
        number: of the image among the inputs.
        path: what tells it apart for the user.
        name: of its files, without suffix; it may name a folder for them.
        image: opens it, in RGB.
        said: a ``flora.predict.Prediction``.
    """

    number: int
    path: str
    name: str
    image: Callable[[], Image.Image]
    said: Any


class Task(ABC, Generic[Spec]):
    """A dataset with its protocol, built by Hydra from ``configs/task``, for model specs of one kind (``Spec``).

    A run calls ``load_for``, then ``forward``, ``loss`` and ``metrics`` as often as it trains, and ``report`` once.

    Attributes:
        name: of the family, ``vtab``.
        dataset: within the family, ``eurosat``.
        metric: the key of ``metrics().compute(...)`` that selects and is reported.
        epochs: default length of training.
        whole_test: a saved run is tested on other data than its own: where ``read`` would draw splits, all is the test.
        trained_classes: of that run, in its order, of which the data may lack some; None: the data say which there are.
        usual_class: which of them that run's training data had most of; None: the data say it.
        pictures: files that ``report`` leaves in the run's folder, which loggers show.
        leaves_files: what is predicted of an input goes to files of its own (``leave``), and is no row of a table.
    """

    pictures: ClassVar[tuple[str, ...]] = ()
    leaves_files: ClassVar[bool] = False
    name: str
    dataset: str
    metric: str
    epochs: float
    whole_test: bool = False
    trained_classes: list[str] | None = None
    usual_class: str | None = None

    def network(self, model: ModelSpec) -> ModelSpec:
        """The model spec to train for this task; by default the one that is given.

        Dense prediction puts its heads over a classifier's backbone (``flora.models.feature_maps.DenseModel``).

        Args:
            model: what ``configs/model`` describes.

        Raises:
            ConfigError: nothing for this task can be made of it; one line that says what to choose.
        """
        return model

    @abstractmethod
    def accepts(self, model: ModelSpec) -> None:
        """Raise ConfigError, one line that says what to choose, for a model that cannot do this task."""

    @abstractmethod
    def read(self, model: Spec, data_dir: Path | None) -> Splits:
        """Read, check and split the data as an accepted model takes it; arguments and errors as of ``load_for``."""

    def load_for(self, model: ModelSpec, data_dir: Path | None) -> Splits:
        """The data for a model: nothing is read for one that is not accepted.

        Args:
            model: the model spec, for its image size or its tokenizer.
            data_dir: the folder ``paths.data``, or None for tasks that need no file.

        Raises:
            ConfigError: for a setting that cannot be used, or a model of another kind.
            DataError: for data that is missing, unreadable or inconsistent.
        """
        self.accepts(model)
        return self.read(cast(Spec, model), data_dir)

    @abstractmethod
    def files(self, data_dir: Path | None) -> tuple[Path, Sequence[Path]] | None:
        """The folder of the data and the tables in it that ``read`` would read; None: no file decides what is read.

        Args:
            data_dir: as of ``load_for``.

        Raises:
            DataError: there are none.
        """

    def contents(self, data_dir: Path | None) -> dict[str, str]:
        """What decides the data that ``read`` would read, cheap to ask for again: checksums by name, JSON-able.

        By default of ``files``. A run is known by it: other data, another run.
        """
        if (found := self.files(data_dir)) is None:
            return {}
        folder, files = found
        return contents.digests(files, folder)

    @abstractmethod
    def forward(self, model: Spec) -> Forward:
        """The forward pass ``(module, batch, training) -> (outputs, targets)`` of a model spec.

        The batch is on the device and stays as it is. Outputs go to ``loss`` with the targets, and to the metric with
        the batch's ``labels``, as ``condensed`` leaves them; while training, targets may be other than those: mixed, or
        of tokens.
        """

    def loss(self, outputs: Any, targets: Tensor, label_smoothing: float) -> Tensor:
        """The loss, a mean over examples or tokens; by default of a classifier."""
        return cross_entropy(outputs, targets, label_smoothing)

    def condensed(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What an evaluation keeps of a batch for the metric, on the device; by default all of it.

        Args:
            outputs: of ``forward``.
            labels: ``batch["labels"]``.

        Returns:
            what becomes the metric's predictions and its references. Both have a row for each example. Rows of
            different batches may differ in their second dimension alone, and are filled up with -100.
        """
        return outputs, labels

    @abstractmethod
    def metrics(self) -> evaluate.Metric:
        """The metric, ready to ``compute``, with ``greater_is_better``; it needs no network."""

    def unlabelled(self, model: Spec, inputs: Sequence[Any]) -> Split:
        """Inputs of the user's own, prepared as an evaluation prepares its examples; ``labels`` are their numbers.

        It needs no data: ``load_for`` need not come first.

        Args:
            model: an accepted model spec.
            inputs: what the family takes, at least one: an image (see ``flora.tasks.images.decode.as_picture``), a
                text, several texts in the order of the columns, or an image with a question.

        Raises:
            ConfigError: inputs that the family does not take.
            DataError: an input that cannot be read, by its name; perhaps only when its batch is asked for.
        """
        raise ConfigError(f"task={self.name} takes no inputs but its own: mode=predict is for other tasks")

    def remember(self, facts: Mapping[str, Any]) -> None:
        """Take from a saved run's ``Splits.facts`` what its outputs mean, before data are read; nothing by default."""
        return None

    def predicting(self, model: Spec) -> Forward:
        """The forward pass of ``unlabelled`` batches: ``(outputs, numbers of the inputs)``; by default an evaluation's.

        Outputs are logits ``[B, C]``, numbers ``[B]`` or ``[B, 1]``, tokens that ``written`` reads ``[B, T]``, or what
        ``understood`` reads.
        """
        return self.forward(model)

    def written(self, model: Spec, tokens: np.ndarray) -> str:
        """The text of what ``predicting`` gave for one input ``[T]``, negative tokens being padding."""
        raise ConfigError(f"task={self.name} writes no texts")

    def understood(self, row: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
        """Fields of a ``flora.predict.Prediction``, of what ``predicting`` gave for one input; if ``leaves_files``.

        Raises:
            ConfigError: it is not finite.
        """
        raise NotImplementedError

    def leave(self, predicted: Iterable[Predicted], class_names: Sequence[str], folder: Path) -> None:
        """Write what was predicted of images to files in a folder; if ``leaves_files``."""
        raise NotImplementedError

    def preprocessing(self, model: Spec) -> dict[str, Any]:
        """What is done to inputs, JSON-able, for who uses a saved run elsewhere."""
        names = ("image_size", "interpolation", "mean", "std", "aspect", "max_length")
        return {name: getattr(model, name) for name in names if hasattr(model, name)}

    def report(self, metric: Any, splits: Splits, folder: Path) -> None:
        """What else to leave in the run's folder, or in ``splits.facts``, after the test; by default nothing.

        Args:
            metric: that has just scored the test split.
            splits: of the run.
            folder: the run's.
        """
        return None


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Of logits ``[N, C]`` and classes ``[N]`` or their probabilities ``[N, C]``, in fp32 whatever the autocast."""
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


def draw(count: int, seed: int) -> np.ndarray:
    """A random order of ``range(count)``, int64 ``[count]``, the same on every machine.

    RandomState and not Generator: only its stream is promised never to change (NumPy's NEP 19).
    """
    return np.random.RandomState(seed).permutation(count)


def check_dataset(dataset: str, names: Collection[str], aliases: Collection[str] = ()) -> None:
    """ConfigError with the nearest names for a dataset that a family does not know."""
    if dataset in names or dataset in aliases:
        return
    close = difflib.get_close_matches(str(dataset), [*names, *aliases])
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ConfigError(f"task.dataset={dataset} is unknown; {hint}choose one of {', '.join(names)}")


def check_split_seed(split_seed: int) -> None:
    """ConfigError for a seed that ``draw`` cannot take."""
    if not isinstance(split_seed, int) or not 0 <= split_seed < 2**32:
        raise ConfigError(f"task.split_seed={split_seed} must be a whole number in 0..{2**32 - 1}")
