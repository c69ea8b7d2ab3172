"""Scores of predictions, through scikit-learn and scipy, and what a run that learned nothing would get.

Degenerate predictions have a score: where all are the same, a correlation is not defined, and counts as 0.
"""

from __future__ import annotations

import warnings

import numpy as np
from scipy import stats
from sklearn import metrics as sklearn_metrics

from peer_scale.finetuning.tasks import Metric, Task


def predicted(task: Task, logits: np.ndarray) -> np.ndarray:
    """Give the predictions [N], ids or numbers, of the model's outputs [N, C] or [N, 1]."""
    assert logits.shape[1:] == (task.num_outputs,), f"{logits.shape}: {task.num_outputs} outputs an example expected"
    return logits[:, 0] if task.is_regression else logits.argmax(1)


def score(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute the task's metric, under its name, and what goes with it.

    Outputs that are not finite score 0 in everything. "undefined" is 1 where a correlation counted as 0 because the
    predictions (or labels) were all the same.
    """
    predictions = predicted(task, logits)
    if task.is_regression:
        return _correlations(predictions, labels) if np.isfinite(logits).all() else _nothing("pearson", "spearman")
    if not np.isfinite(logits).all():
        return {task.metric: 0.0, "accuracy": 0.0}
    found = {
        "accuracy": float(sklearn_metrics.accuracy_score(labels, predictions)),
        "f1": _f1(labels, predictions, task.num_outputs),
    }
    if task.metric == "mcc":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "A single label was found")  # then it is 0
            found["mcc"] = float(sklearn_metrics.matthews_corrcoef(labels, predictions))
    return {task.metric: found[task.metric], **found}


def floor(task: Task, labels: np.ndarray) -> float:
    """Give the best score of predictions that are all the same: a run that reaches no more has failed.

    It is the majority class's share for accuracy, and 0 for MCC and for correlations.
    """
    if task.metric in ("mcc", "pearson_spearman"):
        return 0.0
    constants = (np.full_like(labels, label) for label in range(task.num_outputs))
    if task.metric == "accuracy":
        return max(float(sklearn_metrics.accuracy_score(labels, constant)) for constant in constants)
    return max(_f1(labels, constant, task.num_outputs) for constant in constants)


def failed(task: Task, logits: np.ndarray, labels: np.ndarray) -> bool:
    """Say whether outputs are no better than predictions that are all the same."""
    return not score(task, logits, labels)[task.metric] > floor(task, labels)


def default_metric(*, is_regression: bool) -> Metric:
    """Give the metric of a task for which none was named."""
    return "pearson_spearman" if is_regression else "accuracy"


def _f1(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> float:
    """F1 of the second of two classes; of more classes the mean of all."""
    if num_classes == 2:
        return float(sklearn_metrics.f1_score(labels, predictions, labels=[0, 1], pos_label=1, zero_division=0.0))
    classes = list(range(num_classes))
    return float(sklearn_metrics.f1_score(labels, predictions, labels=classes, average="macro", zero_division=0.0))


def _correlations(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    if len(labels) < 2:
        return _nothing("pearson", "spearman")
    predictions = predictions.astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        pearson = float(stats.pearsonr(predictions, labels).statistic)
        spearman = float(stats.spearmanr(predictions, labels).statistic)
    if not np.isfinite([pearson, spearman]).all():
        return _nothing("pearson", "spearman")
    return {"pearson_spearman": (pearson + spearman) / 2, "pearson": pearson, "spearman": spearman}


def _nothing(*names: str) -> dict[str, float]:
    return {"pearson_spearman": 0.0, **dict.fromkeys(names, 0.0), "undefined": 1.0}
