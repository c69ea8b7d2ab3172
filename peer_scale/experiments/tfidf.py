"""The arm without a model: TF-IDF of words and word pairs under a linear model, on the same examples as the others."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, Final

import numpy as np

from peer_scale.experiments.measures import Measurement
from peer_scale.finetuning.data import load_task, subset
from peer_scale.finetuning.metrics import score
from peer_scale.finetuning.tasks import Examples, Task, TaskData

_STRENGTHS: Final = (0.1, 1.0, 10.0, 100.0)  # of the fit to the training examples, chosen on dev
_SUBSETS: Final = (1, 2, 3)


def tfidf_score(measurement: Measurement) -> dict[str, Any]:
    """Fit to the task's training examples, or to subsets as fine-tuning draws them; give an entry as of results.json.

    The score is of the test set where that has labels, else of dev, as for the models.
    """
    data_dir = measurement.options.get("data_dir")
    data = load_task(measurement.task.path or measurement.task.name, None if data_dir is None else Path(data_dir))
    size = None if measurement.size == "all" else measurement.size
    is_all = size is None or size >= len(data.train)
    seeds = (1,) if is_all else tuple(measurement.options.get("seeds", _SUBSETS))
    runs = [_run(data, subset(len(data.train), size, seed), seed) for seed in seeds]
    is_tested = all(run["test"] is not None for run in runs)
    scores = [run["test"] if is_tested else run["dev"] for run in runs]
    return {
        "metric": data.task.metric,
        "higher_is_better": True,
        "train_size": len(data.train) if is_all else size,
        "runs": runs,
        "mean": statistics.fmean(scores),
        "std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "n": len(scores),
        "failed": 0,
        "scored_on": "test" if is_tested else "dev",
    }


def _run(data: TaskData, numbers: list[int], seed: int) -> dict[str, Any]:
    """Fit with each strength; keep the one that is best on dev, of equal ones the weakest."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    train = data.train.take(numbers)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=1, token_pattern=r"(?u)\b\w+\b|[^\w\s]")
    words.fit([text for texts in train.texts for text in texts])
    features = _features(words, train)
    models = [_fit(data.task, features, train.labels, strength) for strength in _STRENGTHS]
    dev = [_score(data.task, words, model, data.dev) for model in models]
    best = max(range(len(models)), key=lambda index: dev[index])
    tested = {name: part for name, part in data.test.items() if part.labels is not None}
    test = _score(data.task, words, models[best], tested) if tested else None
    return {"seed": seed, "strength": _STRENGTHS[best], "dev": dev[best], "test": test}


def _features(words: Any, examples: Examples) -> Any:
    """Give the words of a text; of two texts both, their products and their differences, sparse [N, F]."""
    from scipy.sparse import hstack

    columns = [words.transform(column) for column in zip(*examples.texts, strict=True)]
    if len(columns) == 1:
        return columns[0]
    first, second = columns
    return hstack([first, second, first.multiply(second), abs(first - second)]).tocsr()


def _fit(task: Task, features: Any, labels: np.ndarray | None, strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression, Ridge

    if task.is_regression:
        return Ridge(alpha=1 / strength).fit(features, labels)
    return LogisticRegression(C=strength, max_iter=1000).fit(features, labels)


def _score(task: Task, words: Any, model: Any, parts: dict[str, Examples]) -> float:
    """Give the mean of the task's metric over the parts."""
    scores = []
    for part in parts.values():
        features = _features(words, part)
        if task.is_regression:
            logits = np.asarray(model.predict(features))[:, None]
        else:
            logits = np.full((len(part), task.num_outputs), -np.inf)
            logits[:, model.classes_] = model.predict_log_proba(features)
            logits = np.maximum(logits, -1e9)  # a class that the subset lacks, or that is impossible
        assert part.labels is not None
        scores.append(score(task, logits, part.labels)[task.metric])
    return statistics.fmean(scores)
