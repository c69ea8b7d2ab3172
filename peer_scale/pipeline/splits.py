"""Cutting networks with shared bottom layers into stages: exact, by dynamic programming over prefixes."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

LayerCounts: TypeAlias = tuple[int, ...]
"""Numbers of shared layers and of each network's own: of one stage, or up to a stage."""

Split: TypeAlias = tuple[LayerCounts, ...]

# What is minimised, in this order: sum of squared stage costs, visits of stages, then layers on late stages.
_Rank: TypeAlias = tuple[int, int, tuple[tuple[int, ...], ...]]


def plus(left: LayerCounts, right: LayerCounts) -> LayerCounts:
    """Add up by kind."""
    return tuple(a + b for a, b in zip(left, right, strict=True))


@dataclass(frozen=True)
class Load:
    """What is to be cut: how many layers, and the cost of one of each kind (a shared one counts in every pass).

    `first` comes on top of stage 0 and `ends`, a number per network, on top of the stages with their last layers.
    """

    layers: LayerCounts
    layer_cost: LayerCounts
    first: int
    ends: tuple[int, ...]

    def stage_cost(self, stage: int, before: LayerCounts, counts: LayerCounts) -> int:
        """Give the cost of a stage that takes `counts` when the stages before it have taken `before`."""
        cost = sum(count * one for count, one in zip(counts, self.layer_cost, strict=True))
        ends = sum(end for network, end in enumerate(self.ends) if self.ends_network(network, before, counts))
        return cost + self.first * (stage == 0) + ends

    def ends_network(self, network: int, before: LayerCounts, counts: LayerCounts) -> bool:
        """Say whether a stage that takes `counts` after `before` gets the network's last layer."""
        after, own = plus(before, counts), network + 1
        has_layers = counts[0] + counts[own] > 0
        return has_layers and (after[0], after[own]) == (self.layers[0], self.layers[own])

    def split_costs(self, split: Split) -> list[int]:
        """Give the cost of each stage."""
        costs, before = [], no_layers(len(self.ends))
        for stage, counts in enumerate(split):
            costs.append(self.stage_cost(stage, before, counts))
            before = plus(before, counts)
        return costs


def no_layers(num_networks: int) -> LayerCounts:
    """Give the counts of nothing."""
    return (0,) * (1 + num_networks)


def best_splits(load: Load, num_stages: int, limit: int) -> list[Split]:
    """Find the first `limit` of the splits whose largest stage cost is minimal.

    Every stage but the first has a layer; own layers come after all shared ones. Splits are in order of their sum of
    squared stage costs, then of the number of stages that the passes visit, then of layers on early stages.
    """
    pieces = (*load.layer_cost, load.first)
    ends = sum(load.ends)
    total = load.first + ends + sum(n * one for n, one in zip(load.layers, load.layer_cost, strict=True))
    # filling each stage up to the mean overshoots it by less than one piece
    bound = total // num_stages + max(pieces) + ends
    smallest = bound
    while found := _splits_within(load, num_stages, bound, limit=1):
        smallest = max(load.split_costs(found[0]))
        bound = smallest - 1
    return _splits_within(load, num_stages, smallest, limit)


def _splits_within(load: Load, num_stages: int, bound: int, limit: int) -> list[Split]:
    """Find the first `limit` splits without a stage above `bound`."""
    prefixes: dict[LayerCounts, list[_Rank]] = {no_layers(len(load.ends)): [(0, 0, ())]}
    for stage in range(num_stages):
        longer: defaultdict[LayerCounts, list[_Rank]] = defaultdict(list)
        for before, ranks in prefixes.items():
            for counts, cost in _stage_counts(load, stage, before, bound):
                after = plus(before, counts)
                if not _can_finish(load, after, num_stages - stage - 1, bound):
                    continue
                visits = sum(counts[0] + own > 0 for own in counts[1:])
                late = (-counts[0], *(-own for own in reversed(counts[1:])))
                longer[after] += [
                    (squares + cost * cost, hops + visits, (*cuts, late)) for squares, hops, cuts in ranks
                ]
        prefixes = {after: sorted(ranks)[:limit] for after, ranks in longer.items()}
    return [
        tuple((-shared, *(-own for own in reversed(owns))) for shared, *owns in cuts)
        for _, _, cuts in prefixes.get(load.layers, [])
    ]


def _stage_counts(load: Load, stage: int, before: LayerCounts, bound: int) -> Iterator[tuple[LayerCounts, int]]:
    """List what `stage` may take within `bound`, with its cost; nothing at all is for the first stage only."""
    left = [whole - done for whole, done in zip(load.layers, before, strict=True)]
    most = [min(count, bound // one) if one else count for count, one in zip(left, load.layer_cost, strict=True)]
    for shared in range(most[0] + 1):
        has_all_shared = shared == left[0]
        ranges = [range(own + 1 if has_all_shared else 1) for own in most[1:]]
        for owns in itertools.product(*ranges):
            counts = (shared, *owns)
            if stage and not any(counts):
                continue
            cost = load.stage_cost(stage, before, counts)
            if cost <= bound:
                yield counts, cost


def _can_finish(load: Load, after: LayerCounts, stages_left: int, bound: int) -> bool:
    """Say whether the layers that remain are enough for the stages that remain, and can be within the bound."""
    left = [whole - done for whole, done in zip(load.layers, after, strict=True)]
    cost = sum(count * one for count, one in zip(left, load.layer_cost, strict=True))
    return sum(left) >= stages_left and cost <= stages_left * bound
