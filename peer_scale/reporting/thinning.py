"""Fewer points per curve, and smoother ones, that still say what the run did."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from peer_scale.reporting.runs import Floats

Indices = NDArray[np.int64]
_STEPS_PER_HALF_WINDOW = 40  # a window is a twentieth of the run


def half_window(num_steps: int) -> int:
    """How many steps to each side the smoothed curve averages."""
    return num_steps // _STEPS_PER_HALF_WINDOW


def bins(length: int, number: int) -> Indices:
    """Give about `number + 1` rising edges from 0 to `length`: half of them evenly spaced, half by their logarithm.

    So a curve keeps its points where either kind of axis shows them.
    """
    if length <= number:
        return np.arange(length + 1)
    even = np.linspace(0, length, number // 2 + 1)
    by_logarithm = np.geomspace(1, length, number // 2)
    return np.unique(np.concatenate([even, by_logarithm]).round().astype(np.int64))


def extremes(values: Floats, points: int) -> Indices:
    """Give at most about `points` indices of finite values, in order: each bin's lowest and highest, first and last."""
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) <= points:
        return finite
    known = values[finite]
    edges = bins(len(known), points // 2)
    kept = [0, len(known) - 1]
    for begin, end in itertools.pairwise(edges):
        kept += [begin + int(known[begin:end].argmin()), begin + int(known[begin:end].argmax())]
    return finite[np.unique(kept)]


def smoothed(values: Floats, segments: Sequence[slice]) -> Floats:
    """Average each value with its neighbours, as many on either side, so that nothing is shifted.

    The window gets smaller towards the beginning of a segment, where curves are steep; at its end, where a few noisy
    values would look like a turn, it loses only what is not there. A missing value stays missing and counts nothing.
    """
    result = np.full(len(values), math.nan)
    half = half_window(len(values))
    for segment in segments:
        part = values[segment]
        known = np.isfinite(part)
        totals = np.concatenate([[0.0], np.cumsum(np.where(known, part, 0.0))])
        counts = np.concatenate([[0], np.cumsum(known)])
        at = np.arange(len(part))
        width = np.minimum(half, at)
        low, high = at - width, np.minimum(at + width, len(part) - 1) + 1
        with np.errstate(invalid="ignore"):
            mean = (totals[high] - totals[low]) / (counts[high] - counts[low])
        result[segment] = np.where(known, mean, math.nan)
    return result


def evenly(values: Floats, points: int) -> Indices:
    """Give at most about `points` indices of finite values, first and last included: for a curve that is smooth."""
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) <= points:
        return finite
    edges = bins(len(finite) - 1, points)
    return finite[edges]
