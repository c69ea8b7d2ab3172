"""Scores against formulas written out in numpy, on random and on degenerate predictions."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from peer_scale.finetuning.metrics import failed, floor, score
from peer_scale.finetuning.tasks import Task


def classification(metric, classes=2):
    return Task("t", "classification", metric, ("text",), labels=tuple(map(str, range(classes))))


REGRESSION = Task("t", "regression", "pearson_spearman", ("text",))


def logits_of(predictions, classes):
    return np.eye(classes, dtype=np.float32)[predictions]


def mcc(predictions, labels):
    a, b = (np.array(x, float) for x in (predictions, labels))
    tp, tn, fp, fn = (a * b).sum(), ((1 - a) * (1 - b)).sum(), (a * (1 - b)).sum(), ((1 - a) * b).sum()
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / below**0.5 if below else 0.0


def f1(predictions, labels, of):
    hits = ((predictions == of) & (labels == of)).sum()
    below = (predictions == of).sum() + (labels == of).sum()
    return 2 * hits / below if below else 0.0


def ranks(values):
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def pearson(a, b):
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / ((a**2).sum() * (b**2).sum()) ** 0.5


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [2, 3])
def test_classification(seed, classes):
    rng = np.random.default_rng(seed)
    labels, predictions = rng.integers(classes, size=(2, 40))
    logits = logits_of(predictions, classes) + rng.normal(size=(40, classes)) * 0.01
    found = score(classification("mcc", classes), logits, labels)
    assert found["accuracy"] == pytest.approx((labels == predictions).mean())
    wanted = [f1(predictions, labels, of) for of in range(classes)]
    assert found["f1"] == pytest.approx(wanted[1] if classes == 2 else np.mean(wanted))
    assert found["mcc"] == pytest.approx(sklearn_metrics.matthews_corrcoef(labels, predictions))
    if classes == 2:
        assert found["mcc"] == pytest.approx(mcc(predictions, labels))


@pytest.mark.parametrize("seed", range(5))
def test_regression(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(6, size=30).astype(np.float32)  # ties
    predictions = (labels + rng.normal(size=30) * 2).round(1).astype(np.float32)
    found = score(REGRESSION, predictions[:, None], labels)
    assert found["pearson"] == pytest.approx(pearson(predictions, labels), abs=1e-6)
    assert found["spearman"] == pytest.approx(pearson(ranks(predictions), ranks(labels)), abs=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr(predictions, labels).statistic)
    assert found["pearson_spearman"] == pytest.approx((found["pearson"] + found["spearman"]) / 2)


@pytest.mark.parametrize("of", [0, 1])
def test_one_class_alone_has_failed(of):
    labels = np.array([0, 0, 1, 1, 1])
    logits = logits_of(np.full(5, of), 2)
    for metric, wanted in (("accuracy", 0.6 if of else 0.4), ("mcc", 0.0), ("f1", 0.75 if of else 0.0)):
        task = classification(metric)
        assert score(task, logits, labels)[metric] == pytest.approx(wanted)
        assert floor(task, labels) == pytest.approx({"accuracy": 0.6, "mcc": 0.0, "f1": 0.75}[metric])
        assert failed(task, logits, labels)
        assert not failed(task, logits_of(labels, 2), labels)


def test_labels_of_one_class_are_scored_without_a_word(recwarn):
    for predictions in ([1, 1, 1], [0, 1, 1]):
        assert score(classification("mcc"), logits_of(predictions, 2), np.array([1, 1, 1]))["mcc"] == 0
    assert not recwarn.list


def test_no_better_than_the_majority_has_failed():
    labels = np.array([0, 0, 1, 1, 1])
    task = classification("accuracy")
    assert failed(task, logits_of([0, 1, 1, 1, 0], 2), labels)
    assert not failed(task, logits_of([0, 1, 1, 1, 1], 2), labels)
    assert failed(classification("mcc"), logits_of([1, 1, 0, 0, 1], 2), labels), "worse than chance"


@pytest.mark.parametrize("predictions", [np.full(4, 2.5), np.array([1, np.nan, 2, 3]), np.array([1, np.inf, 2, 3])])
def test_undefined_correlations_count_as_0(predictions):
    labels = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    found = score(REGRESSION, predictions[:, None].astype(np.float32), labels)
    assert found == {"pearson_spearman": 0.0, "pearson": 0.0, "spearman": 0.0, "undefined": 1.0}
    assert failed(REGRESSION, predictions[:, None], labels)
    assert failed(REGRESSION, -labels[:, None], labels)
    assert not failed(REGRESSION, labels[:, None], labels)


def test_logits_that_are_not_finite_have_failed():
    task = classification("accuracy")
    assert score(task, np.full((3, 2), np.nan), np.array([0, 0, 0]))["accuracy"] == 0.0


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(AssertionError):
        score(REGRESSION, np.zeros((4, 4)), np.zeros(4))
