"""What a task is, and the eight tasks of GLUE that papers report (WNLI left out, as in all of them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

Kind = Literal["classification", "regression"]
Metric = Literal["accuracy", "mcc", "f1", "pearson_spearman"]


@dataclass(frozen=True)
class Task:
    """What is to be told of a text or a pair of texts.

    `labels` are the names of the classes in the order of their ids; empty for regression, and where the training data
    says them. `scale` is the least and greatest value of a regression, where it is known.
    """

    name: str
    kind: Kind
    metric: Metric
    columns: tuple[str, ...]
    label: str = "label"
    labels: tuple[str, ...] = ()
    scale: tuple[float, float] | None = None

    @property
    def is_regression(self) -> bool:
        """Whether a number is to be told, not a class."""
        return self.kind == "regression"

    @property
    def num_outputs(self) -> int:
        """How many numbers the model gives for an example."""
        return 1 if self.is_regression else len(self.labels)


@dataclass(frozen=True)
class Examples:
    """Texts, each with as many parts as the task has columns, and their labels [N]: ids or numbers; None: not known."""

    texts: list[tuple[str, ...]]
    labels: np.ndarray | None

    def __post_init__(self) -> None:
        assert self.labels is None or self.labels.shape == (len(self.texts),)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def known_labels(self) -> np.ndarray:
        """The labels of examples that must have some."""
        assert self.labels is not None
        return self.labels

    def take(self, numbers: list[int]) -> Examples:
        """Give the examples of these numbers, in this order."""
        labels = None if self.labels is None else self.labels[numbers]
        return Examples([self.texts[number] for number in numbers], labels)


@dataclass(frozen=True)
class TaskData:
    """A task with its examples; `dev` and `test` may have several parts, whose scores are averaged.

    `notes` say what is not as it should be and was passed over: lines that were skipped, sizes that are not known ones.
    """

    task: Task
    train: Examples
    dev: dict[str, Examples]
    test: dict[str, Examples]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GlueTask:
    """A task of GLUE: its folder in GLUE's own layout, columns on the Hugging Face hub, files for the test server.

    The task's columns are those of GLUE's own files. `sizes` are the examples of train and of each dev part.
    `server_files` are the names of the files to hand in, by the test part. `has_pairs_in_no_order` holds where the two
    texts may change places. `written_labels` are the classes as files, and the server, write them.
    """

    task: Task
    folder: str
    hub_columns: tuple[str, ...]
    sizes: tuple[int, ...]
    server_files: dict[str, str]
    has_pairs_in_no_order: bool = False
    written_labels: tuple[str, ...] = ()


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")

GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(
        Task("cola", "classification", "mcc", ("sentence",), "label", ("unacceptable", "acceptable")),
        *("CoLA", ("sentence",), (8551, 1043), {"test": "CoLA"}),
        written_labels=_BINARY,
    ),
    "sst2": GlueTask(
        Task("sst2", "classification", "accuracy", ("sentence",), "label", ("negative", "positive")),
        *("SST-2", ("sentence",), (67_349, 872), {"test": "SST-2"}),
        written_labels=_BINARY,
    ),
    "mrpc": GlueTask(
        Task(
            "mrpc",
            "classification",
            "accuracy",
            ("#1 String", "#2 String"),
            "Quality",
            ("not_equivalent", "equivalent"),
        ),
        *("MRPC", _PAIR, (3668, 408), {"test": "MRPC"}),
        has_pairs_in_no_order=True,
        written_labels=_BINARY,
    ),
    "stsb": GlueTask(
        Task("stsb", "regression", "pearson_spearman", _PAIR, "score", (), (0.0, 5.0)),
        *("STS-B", _PAIR, (5749, 1500), {"test": "STS-B"}),
        has_pairs_in_no_order=True,
    ),
    "qqp": GlueTask(
        Task(
            *("qqp", "classification", "accuracy", ("question1", "question2"), "is_duplicate"),
            ("not_duplicate", "duplicate"),
        ),
        *("QQP", ("question1", "question2"), (363_846, 40_430), {"test": "QQP"}),
        written_labels=_BINARY,
    ),
    "mnli": GlueTask(
        Task("mnli", "classification", "accuracy", _PAIR, "gold_label", _NLI),
        *("MNLI", ("premise", "hypothesis"), (392_702, 9815, 9832)),
        {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm", "ax": "AX"},
        written_labels=_NLI,
    ),
    "qnli": GlueTask(
        Task("qnli", "classification", "accuracy", ("question", "sentence"), "label", _ENTAILMENT),
        *("QNLI", ("question", "sentence"), (104_743, 5463), {"test": "QNLI"}),
        written_labels=_ENTAILMENT,
    ),
    "rte": GlueTask(
        Task("rte", "classification", "accuracy", _PAIR, "label", _ENTAILMENT),
        *("RTE", _PAIR, (2490, 277), {"test": "RTE"}),
        written_labels=_ENTAILMENT,
    ),
}
"""By the names of the Hugging Face hub; ids of labels are the hub's too."""


def dev_parts(name: str) -> tuple[str, ...]:
    """Name the dev parts of a GLUE task: files without their ending."""
    return ("dev_matched", "dev_mismatched") if name == "mnli" else ("dev",)
