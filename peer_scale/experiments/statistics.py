"""Which differences between arms are more than chance: Welch's t over pre-training seeds, Holm over all pairs."""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

_FEWEST = 2  # values that have a deviation


@dataclass(frozen=True)
class Summary:
    """Mean and sample deviation of `n` values; the deviation is None of one value, both are None of none."""

    mean: float | None
    std: float | None
    n: int


@dataclass(frozen=True)
class PairTest:
    """Welch's test of two arms' means; what cannot be computed is None.

    Attributes:
        measure: what is compared.
        family: of the arms whose pairs are corrected together.
        a: one arm.
        b: the other.
        difference: mean of a less mean of b.
        t: Welch's statistic; None with fewer than two seeds in an arm, or where neither varies.
        df: its degrees of freedom.
        p: two-sided.
        p_holm: after Holm's correction over the pairs of the measure and family.
        significant: whether p_holm is below the level.
    """

    measure: str
    family: str
    a: str
    b: str
    difference: float | None
    t: float | None = None
    df: float | None = None
    p: float | None = None
    p_holm: float | None = None
    significant: bool = False


def summarise(values: Sequence[float | None]) -> Summary:
    """Give mean and deviation of the values that are there."""
    present = [value for value in values if value is not None]
    if not present:
        return Summary(None, None, 0)
    std = statistics.stdev(present) if len(present) >= _FEWEST else None
    return Summary(statistics.fmean(present), std, len(present))


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float] | None:
    """Give t, degrees of freedom and two-sided p of two samples; None where they cannot be computed."""
    if min(len(a), len(b)) < _FEWEST or (len(set(a)) == 1 and len(set(b)) == 1):
        return None
    from scipy.stats import ttest_ind

    with warnings.catch_warnings():  # one of the two may be without deviation
        warnings.simplefilter("ignore", RuntimeWarning)
        result = ttest_ind(a, b, equal_var=False)
    found = float(result.statistic), float(result.df), float(result.pvalue)
    return found if all(map(math.isfinite, found)) else None


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p-values for being several (Holm 1979): step down, each at least the one before; None stays None."""
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    greatest = 0.0
    for rank, (p, index) in enumerate(order):
        greatest = max(greatest, min(1.0, (len(order) - rank) * p))
        corrected[index] = greatest
    return corrected


def compare_pairs(
    measure: str, family: str, scores: Mapping[str, Sequence[float | None]], *, alpha: float
) -> list[PairTest]:
    """Test all pairs of arms on one measure; `scores` has a value per pre-training seed, None where it is missing."""
    tests = []
    for a, b in itertools.combinations(scores, 2):
        ours, theirs = ([value for value in scores[arm] if value is not None] for arm in (a, b))
        difference = statistics.fmean(ours) - statistics.fmean(theirs) if ours and theirs else None
        found = welch(ours, theirs)
        test = PairTest(measure, family, a, b, difference)
        tests.append(test if found is None else replace(test, t=found[0], df=found[1], p=found[2]))
    corrected = holm([test.p for test in tests])
    return [
        replace(test, p_holm=p, significant=p is not None and p < alpha)
        for test, p in zip(tests, corrected, strict=True)
    ]
