"""Shares of a step: every sample in exactly one, equal counts, costs as equal as can be, the same on every rank."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer_scale.flops import actual_train_flops, square_cost_ratio
from peer_scale.objectives.graph import SampleSize
from peer_scale.samples.shares import BatchPlan, share_out
from peer_scale.settings.presets import find_preset, preset_names


def skewed(count, seed=0, longest=512):
    """Lengths of short texts with some long ones among them, as encyclopaedias and web pages have."""
    return np.random.default_rng(seed).lognormal(4.4, 0.7, count).clip(4, longest).astype(np.int64)


def plans(ranks, **plan):
    return [BatchPlan(**plan, data_parallel_rank=rank, data_parallel_size=ranks) for rank in range(ranks)]


def cost(lengths, places, ratio):
    return sum(int(lengths[place]) + ratio * int(lengths[place]) ** 2 for place in places)


@st.composite
def steps(draw):
    """Lengths, number of ranks, micro-batches of a rank, samples of a micro-batch, and the square term's ratio."""
    ranks, number, size = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    count = ranks * number * size
    lengths = draw(st.lists(st.integers(4, 512), min_size=count, max_size=count))
    return np.array(lengths), ranks, number, size, draw(st.sampled_from([0.0, 1e-4, 1e-2]))


def check_equal_counts(step):
    lengths, ranks, number, size, ratio = step
    found = [
        plan.micro_batches(lengths)
        for plan in plans(ranks, global_batch=len(lengths), micro_batch=size, square_ratio=ratio)
    ]
    assert {len(share) for share in found} == {number}
    assert {len(places) for share in found for places in share} == {size}
    assert sorted(np.concatenate([places for share in found for places in share])) == list(range(len(lengths)))
    assert all((np.diff(places) > 0).all() for share in found for places in share)
    for share in found:
        costs = [cost(lengths, places, ratio) for places in share]
        assert costs == pytest.approx(sorted(costs, reverse=True), rel=1e-12), "the costliest first"


def check_tokens(step):
    lengths, ranks, number, size, ratio = step
    budget = max(512, int(lengths.sum()) // (ranks * number))
    found = [
        plan.micro_batches(lengths)
        for plan in plans(ranks, global_batch=len(lengths), token_budget=budget, square_ratio=ratio)
    ]
    assert len({len(share) for share in found}) == 1, "all ranks have as many micro-batches"
    assert len(found[0]) <= -(-number * size // (budget // 512)), "enough for full sequences"
    assert {sum(map(len, share)) for share in found} == {number * size}
    assert sorted(np.concatenate([places for share in found for places in share])) == list(range(len(lengths)))
    assert all(0 < lengths[places].sum() <= budget for share in found for places in share)


@pytest.mark.parametrize("check", [check_equal_counts, check_tokens])
@pytest.mark.parametrize("examples", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_any_step_is_shared_out(check, examples):
    settings(max_examples=examples, deadline=None)(given(steps())(check))()


def best_spread(costs, ranks):
    """Try all shares of equal counts: the least difference between the costliest and the cheapest."""

    def spreads(left, sums):
        if not left:
            yield max(sums) - min(sums)
            return
        for rest in itertools.combinations(left[1:], len(costs) // ranks - 1):
            taken = (left[0], *rest)
            yield from spreads([i for i in left if i not in taken], [*sums, sum(costs[i] for i in taken)])

    return min(spreads(list(range(len(costs))), []))


@pytest.mark.parametrize("ranks", [2, 3])
def test_no_shares_are_much_more_even(ranks):
    """Against all that are possible of nine to twelve samples; the difference is in samples of the mean length."""
    worse = []
    for seed in range(12):
        lengths = skewed(4 * ranks if ranks == 2 else 9, seed)
        sums = lengths[share_out(lengths, ranks, 0.0)].sum(1)
        worse.append((np.ptp(sums) - best_spread(lengths.tolist(), ranks)) / lengths.mean())
    assert min(worse) >= 0, "the brute force is right"
    assert max(worse) < 0.6 and np.mean(worse) < 0.15


@pytest.mark.parametrize(("ranks", "at_most"), [(8, 1.01), (64, 1.02), (256, 1.03)])
def test_the_fullest_rank_has_little_more_than_the_mean(ranks, at_most):
    lengths = skewed(32 * ranks)
    ratio = 1 / (6 * 256)
    for micro_batch in (32, 8, 1):
        plan = {"global_batch": 32 * ranks, "micro_batch": micro_batch, "square_ratio": ratio}
        shares = [np.concatenate(one.micro_batches(lengths)) for one in plans(ranks, **plan)[:8]]
        everyone = lengths[share_out(lengths, ranks, ratio)]
        assert {tuple(sorted(share)) for share in shares} <= {
            tuple(sorted(share)) for share in share_out(lengths, ranks, ratio)
        }
        costs = (everyone + ratio * everyone**2).sum(1)
        assert costs.max() / costs.mean() < 1.005
        assert everyone.sum(1).max() / lengths.sum() * ranks < at_most
    in_turns = lengths.reshape(ranks, 32).sum(1)
    assert in_turns.max() / in_turns.mean() > 1.1, "what the shares are for"


def test_micro_batches_of_one_number_cost_alike_on_all_ranks():
    """Ranks that meet at each of them wait for the costliest one."""
    lengths = skewed(16 * 32)
    found = plans(16, global_batch=len(lengths), micro_batch=8)
    tokens = np.array([[lengths[places].sum() for places in plan.micro_batches(lengths)] for plan in found])
    in_turns = lengths.reshape(4, 16, 8).sum(2).T

    def waited_for(tokens):
        return tokens.max(0).sum() / tokens.mean(0).sum()

    assert waited_for(tokens) < 1.03
    assert waited_for(in_turns) > 1.2


def test_the_square_term_counts():
    lengths = skewed(64)

    def spread(ratio, power):
        return np.ptp((lengths[share_out(lengths, 4, ratio)] ** power).sum(1))

    assert spread(1.0, 2) < 0.2 * spread(0.0, 2)
    assert spread(0.0, 1) < 0.2 * spread(1.0, 1)


@pytest.mark.parametrize("budget", [512, 700, 2048])
def test_hardly_a_micro_batch_more_than_the_tokens_need(budget):
    lengths = skewed(8 * 32)
    found = [plan.micro_batches(lengths) for plan in plans(8, global_batch=len(lengths), token_budget=budget)]
    fullest = max(sum(int(lengths[places].sum()) for places in share) for share in found)
    assert len(found[0]) - -(-fullest // budget) <= (budget < 600)


@pytest.mark.parametrize("name", preset_names())
def test_the_ratio_gives_the_costs_of_any_length(name):
    preset = find_preset(name)
    size = SampleSize.of_sequence(128, 19)
    ratio = square_cost_ratio(preset.model, preset.objective, size)

    def flops(times):
        size = SampleSize.of_sequence(128 * times, 19 * times)
        return actual_train_flops(preset.model, preset.objective, size, samples=1)

    def by_ratio(tokens):
        return tokens + ratio * tokens**2

    assert flops(3) / flops(1) == pytest.approx(by_ratio(3 * 128) / by_ratio(128), rel=1e-9)
    assert 0 < ratio < 0.01
