"""Welch's test and Holm's correction against hand-computed numbers."""

import math

import pytest
from scipy import stats

from peer_scale.experiments.statistics import compare_pairs, holm, summarise, welch

A, B = [80.0, 82.0, 84.0], [70.0, 71.0, 75.0, 72.0]


def test_welch_by_its_formula():
    variances = [4.0, 14 / 3]  # of A: 8 / 2; of B, mean 72: (4 + 1 + 9 + 0) / 3
    parts = [variances[0] / 3, variances[1] / 4]
    expected = 10 / math.sqrt(sum(parts))
    df = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 3)
    t, found_df, p = welch(A, B)
    assert t == pytest.approx(expected)
    assert found_df == pytest.approx(df)
    assert p == pytest.approx(2 * stats.t.sf(expected, df))


def test_the_paper_s_own_comparison_comes_out_as_it_says():
    # five seeds with the means and deviations of Table 3: PEER-Small (212.5K) and ELECTRA-Small
    def seeds(mean, std):
        return [mean + std * x / math.sqrt(2.5) for x in (-2, -1, 0, 1, 2)]

    t, _, p = welch(seeds(81.40, 0.25), seeds(80.77, 0.16))
    assert t > 0
    assert p / 2 < 0.005


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([], [1.0, 2.0]), ([1.0, 1.0], [2.0, 2.0])])
def test_what_cannot_be_tested_is_none(a, b):
    assert welch(a, b) is None


def test_one_arm_without_deviation_can_be_tested():
    assert welch([1.0, 1.0, 1.0], [2.0, 3.0, 4.0])[0] == pytest.approx(-2 / math.sqrt(1 / 3))


def test_holm_by_hand():
    # sorted: 0.01 x 4, 0.02 x 3, 0.03 x 2 = 0.06, 0.04 x 1 = 0.04, which is raised to the one before
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_holm_does_not_count_what_was_not_tested():
    assert holm([None, 0.02, None, 0.5]) == [None, pytest.approx(0.04), None, pytest.approx(0.5)]


def test_all_pairs_are_compared_and_corrected_together():
    scores = {"a": A, "b": [*B, None], "c": [71.0, 72.0, 73.0]}
    tests = compare_pairs("m", "arms", scores, alpha=0.05)
    assert [(test.a, test.b) for test in tests] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [test.difference for test in tests] == pytest.approx([10.0, 10.0, 0.0])
    assert [test.p_holm for test in tests] == pytest.approx(holm([test.p for test in tests]))
    assert [test.significant for test in tests] == [True, True, False]
    assert tests[0].p_holm > tests[0].p


def test_a_pair_with_a_single_seed_has_a_difference_and_no_test():
    (test,) = compare_pairs("m", "arms", {"a": [1.0], "b": [0.5, None]}, alpha=0.05)
    assert (test.difference, test.t, test.p_holm, test.significant) == (0.5, None, None, False)


def test_summaries_count_what_is_there():
    assert summarise([None, 1.0, 3.0]).mean == 2.0
    assert summarise([None, 1.0, 3.0]).std == pytest.approx(math.sqrt(2))
    assert (summarise([None]).mean, summarise([5.0]).std, summarise([None]).n) == (None, None, 0)
