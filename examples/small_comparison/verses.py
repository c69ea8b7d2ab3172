"""Pairs of verses in two translations: the same verse or not, at the same overlap of words."""

from __future__ import annotations

import random
from collections import defaultdict
from functools import cache

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sources import normalised_words

NEIGHBOURS = 8  # candidates for a negative, per verse
BINS = 12  # of the similarity, and of the overlap
SAME = 0.8  # two verses with more of their words in common say the same in parallel books, and are no negatives


@cache
def _word_set(text: str) -> frozenset[str]:
    return frozenset(normalised_words(text))


def overlap(first: str, second: str) -> float:
    """Return Jaccard's overlap of two texts' words."""
    one, other = _word_set(first), _word_set(second)
    return len(one & other) / max(1, len(one | other))


def matched_pairs(
    old: dict[int, str], new: dict[int, str], numbers: list[int], rng: random.Random
) -> list[tuple[str, str, str]]:
    """Return (old translation, new translation, label) of `numbers`, as many same as other at every similarity.

    A negative is one of the most similar other verses. Positives and negatives are matched in bins of the cosine of
    their TF-IDF and of the overlap of their words, so that neither the subject nor the common words give the label away
    (as in PAWS).
    """
    candidates: dict[tuple[int, int], dict[str, list[tuple[str, str, str]]]] = defaultdict(lambda: defaultdict(list))
    for first, second, cosine in _similar(old, new, numbers):
        if first == second:
            label = "same"
        elif overlap(new[first], new[second]) < SAME and overlap(old[first], old[second]) < SAME:
            label = "other"
        else:
            continue
        place = int(cosine * BINS), int(overlap(old[first], new[second]) * BINS)
        candidates[place][label].append((old[first], new[second], label))
    pairs = []
    for place in sorted(candidates):
        same, other = candidates[place]["same"], candidates[place]["other"]
        count = min(len(same), len(other))
        pairs += rng.sample(same, count) + rng.sample(other, count)
    rng.shuffle(pairs)
    return pairs


def _similar(old: dict[int, str], new: dict[int, str], numbers: list[int]) -> list[tuple[int, int, float]]:
    """Return for every verse of the old translation itself and the most similar others of the new one, with cosines."""
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    new_rows = vectorizer.fit_transform([new[number] for number in numbers])
    old_rows = vectorizer.transform([old[number] for number in numbers])
    found = []
    for begin in range(0, len(numbers), 1000):
        scores = (old_rows[begin : begin + 1000] @ new_rows.T).toarray()
        for row, line in enumerate(scores):
            own = begin + row
            nearest = {own, *np.argpartition(-line, min(NEIGHBOURS, len(line) - 1))[:NEIGHBOURS].tolist()}
            found += [(numbers[own], numbers[column], float(line[column])) for column in sorted(nearest)]
    return found
