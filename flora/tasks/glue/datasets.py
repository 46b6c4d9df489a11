"""The nine tasks of GLUE: metrics, official sizes, columns and classes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a task without its files.

    Attributes:
        metric: what is reported.
        rows: official numbers of rows, train and development; MNLI's second development set is a field of its own.
        folder: in the official download.
        columns: of the text in the hub's layout.
        tsv: of the text in the official TSV; numbers where it has no header.
        label: of the target in the official TSV.
        classes: names in the order of their indices; none for a regression.
    """

    metric: str
    rows: dict[str, int]
    folder: str
    columns: tuple[str, ...]
    tsv: tuple[str | int, ...]
    label: str | int
    classes: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """Of the network."""
        return len(self.classes) or 1


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str | int, ...], str | int, tuple[str, ...]]] = {
    "cola": (("sentence",), (3,), 1, ("unacceptable", "acceptable")),
    "sst2": (("sentence",), ("sentence",), "label", ("negative", "positive")),
    "mrpc": (_PAIR, ("#1 String", "#2 String"), "Quality", ("not_equivalent", "equivalent")),
    "stsb": (_PAIR, _PAIR, "score", ()),
    "rte": (_PAIR, _PAIR, "label", _ENTAILMENT),
    "qnli": (("question", "sentence"), ("question", "sentence"), "label", _ENTAILMENT),
    "qqp": (("question1", "question2"), ("question1", "question2"), "is_duplicate", ("not_duplicate", "duplicate")),
    "mnli": (("premise", "hypothesis"), _PAIR, "gold_label", ("entailment", "neutral", "contradiction")),
    "wnli": (_PAIR, _PAIR, "label", ("not_entailment", "entailment")),
}
DATASETS = {
    name: DatasetInfo(metric, rows, folder, *_COLUMNS[name])
    for name, metric, folder, rows in [
        ("cola", "matthews_correlation", "CoLA", {"train": 8551, "validation": 1043}),
        ("sst2", "accuracy", "SST-2", {"train": 67349, "validation": 872}),
        ("mrpc", "accuracy", "MRPC", {"train": 3668, "validation": 408}),
        ("stsb", "pearson", "STS-B", {"train": 5749, "validation": 1500}),
        ("rte", "accuracy", "RTE", {"train": 2490, "validation": 277}),
        ("qnli", "accuracy", "QNLI", {"train": 104743, "validation": 5463}),
        ("qqp", "accuracy", "QQP", {"train": 363846, "validation": 40430}),
        ("mnli", "accuracy", "MNLI", {"train": 392702, "validation_matched": 9815, "validation_mismatched": 9832}),
        ("wnli", "accuracy", "WNLI", {"train": 635, "validation": 71}),
    ]
}
