"""Curves with fewer points say what the whole ones do."""

import numpy as np
import pytest

from peer_scale.reporting.thinning import bins, evenly, extremes, half_window, smoothed


@pytest.mark.parametrize("length", [1, 5, 399, 401, 10_000, 1_000_003])
def test_spikes_survive(length):
    values = np.random.default_rng(length).normal(size=length)
    spikes = np.random.default_rng(1).integers(0, length, 20)
    for place in spikes:  # each the extreme of its neighbourhood, and some of the whole
        trial = values.copy()
        trial[place] = 50.0 if place % 2 else -50.0
        kept = extremes(trial, 400)
        assert place in kept
        assert kept[0] == 0 and kept[-1] == length - 1 and len(kept) <= 410
        assert (np.diff(kept) > 0).all()


def test_the_beginning_has_its_points_too():
    kept = extremes(np.random.default_rng(0).normal(size=100_000), 400)
    assert (kept < 100).sum() > 40, "a logarithmic axis shows the first hundred steps as two fifths of all"
    assert (kept > 50_000).sum() > 80


def test_missing_values_are_no_points():
    values = np.full(5000, np.nan)
    values[[17, 400, 4000]] = 1.0, 2.0, 3.0
    assert extremes(values, 400).tolist() == [17, 400, 4000]
    assert evenly(values, 2).tolist() == [17, 4000] or evenly(values, 2).tolist() == [17, 400, 4000]
    assert not len(extremes(np.full(9, np.nan), 400))


def test_smoothing_is_the_mean_around_each_step_within_its_segment():
    values = np.random.default_rng(3).normal(size=400)
    values[[5, 250]] = np.nan
    half = half_window(400)
    assert half == 10
    smooth = smoothed(values, [slice(0, 200), slice(200, 400)])
    for at in range(400):
        begin, end = (0, 200) if at < 200 else (200, 400)
        back = min(half, at - begin)
        expected = np.nanmean(values[at - back : min(at + back, end - 1) + 1])
        assert np.isnan(smooth[at]) if np.isnan(values[at]) else smooth[at] == pytest.approx(expected)


def test_a_straight_line_stays_where_it_is():
    values = np.arange(1000.0)
    assert smoothed(values, [slice(0, 1000)])[:900] == pytest.approx(values[:900])


def test_bins_cover_everything_once():
    for length in (1, 3, 200, 201, 5000):
        edges = bins(length, 200)
        assert edges[0] == 0 and edges[-1] == length and (np.diff(edges) > 0).all() and len(edges) <= 203
