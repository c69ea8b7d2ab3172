"""What is reached without pre-training: the majority, the overlap of a pair's words, TF-IDF with a linear model."""

from __future__ import annotations

from collections import Counter

import numpy as np
from scipy.sparse import csr_matrix, hstack
from scipy.stats import pearsonr, spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, matthews_corrcoef
from sklearn.preprocessing import StandardScaler
from sources import normalised_words
from tasks import Row, Task

PENALTIES = (0.1, 1.0, 10.0)  # inverse strengths of the linear models' penalty, chosen on the development set


def baselines(task: Task) -> dict[str, float | None]:
    """Return the test scores, in hundredths, of `majority`, `overlap` (pairs only) and `tfidf`."""
    labels = {part: [row[-1] for row in rows] for part, rows in task.rows.items()}
    scores: dict[str, float | None] = {"majority": 0.0, "overlap": None}
    if task.kind == "classification":
        most = Counter(labels["train"]).most_common(1)[0][0]
        scores["majority"] = _score(task, labels["test"], [most] * len(labels["test"]))
    if len(task.columns) == 2:
        scaler = StandardScaler().fit(_overlaps(task.rows["train"]))
        features = {part: csr_matrix(scaler.transform(_overlaps(rows))) for part, rows in task.rows.items()}
        scores["overlap"] = _best_linear(task, features, labels)
    scores["tfidf"] = _best_linear(task, _tfidf(task), labels)
    return scores


def _score(task: Task, gold: list[str], predicted: list[str] | np.ndarray) -> float:
    """Return the task's metric in hundredths."""
    if task.kind == "regression":
        numbers, guesses = np.array(gold, float), np.asarray(predicted, float)
        return 50 * float(pearsonr(numbers, guesses)[0] + spearmanr(numbers, guesses)[0])
    metric = matthews_corrcoef if task.metric == "mcc" else accuracy_score
    return 100 * float(metric(gold, predicted))


def _best_linear(task: Task, features: dict[str, csr_matrix], labels: dict[str, list[str]]) -> float:
    """Return the test score of the linear model whose penalty does best on the development set."""
    best, of_best = -np.inf, 0.0
    for strength in PENALTIES:
        if task.kind == "regression":
            model = Ridge(alpha=1 / strength).fit(features["train"], np.array(labels["train"], float))
        else:
            model = LogisticRegression(C=strength, max_iter=300).fit(features["train"], labels["train"])
        dev, test = (_score(task, labels[part], model.predict(features[part])) for part in ("dev", "test"))
        if dev > best:
            best, of_best = dev, test
    return of_best


def _overlaps(rows: list[Row]) -> np.ndarray:
    """Return for every pair the shares of common words and the lengths."""
    found = []
    for first, second, _ in rows:
        one, other = set(normalised_words(first)), set(normalised_words(second))
        common = len(one & other)
        shares = (common / len(one | other), common / len(one), common / len(other))
        found.append((*shares, len(first.split()), len(second.split())))
    return np.array(found)


def _tfidf(task: Task) -> dict[str, csr_matrix]:
    """Return TF-IDF of words and pairs of words; of two texts their own, the product and the difference."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"[^\W_]+|[^\w\s]")
    vectorizer.fit(text for row in task.rows["train"] for text in row[:-1])
    features = {}
    for part, rows in task.rows.items():
        columns = [vectorizer.transform([row[at] for row in rows]) for at in range(len(task.columns))]
        if len(columns) == 2:
            columns += [columns[0].multiply(columns[1]), abs(columns[0] - columns[1])]
        features[part] = csr_matrix(hstack(columns))
    return features
