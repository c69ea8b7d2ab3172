"""Cutting two networks with shared bottom layers into stages: exact, by dynamic programming over prefixes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias


class Share(NamedTuple):
    """Numbers of shared layers, of the generator's own and of the ranker's own: of one stage, or up to a stage."""

    shared: int
    generator: int
    ranker: int

    def plus(self, other: Share) -> Share:
        """Sum by kind."""
        return Share(self.shared + other.shared, self.generator + other.generator, self.ranker + other.ranker)


Split: TypeAlias = tuple[Share, ...]

# What is minimised, in this order: sum of squared stage costs, visits of stages, then layers on late stages.
_Rank: TypeAlias = tuple[int, int, tuple[tuple[int, int, int], ...]]


@dataclass(frozen=True)
class Load:
    """What is to be cut: how many layers, and the cost of one of each kind (a shared one counts in both passes).

    `first` comes on top of stage 0 and `last` on top of the stage with the ranker's last layer.
    """

    layers: Share
    layer_cost: Share
    first: int
    last: int

    def stage_cost(self, stage: int, before: Share, share: Share) -> int:
        """Cost of a stage that takes `share` when the stages before it have taken `before`."""
        cost = sum(count * one for count, one in zip(share, self.layer_cost, strict=True))
        return cost + self.first * (stage == 0) + self.last * self.ends_ranker(before, share)

    def ends_ranker(self, before: Share, share: Share) -> bool:
        """Whether a stage that takes `share` after `before` gets the ranker's last layer."""
        after, whole = before.plus(share), self.layers
        return share.shared + share.ranker > 0 and (after.shared, after.ranker) == (whole.shared, whole.ranker)

    def split_costs(self, split: Split) -> list[int]:
        """Cost of each stage."""
        costs, before = [], Share(0, 0, 0)
        for stage, share in enumerate(split):
            costs.append(self.stage_cost(stage, before, share))
            before = before.plus(share)
        return costs


def best_splits(load: Load, num_stages: int, limit: int) -> list[Split]:
    """The first `limit` of the splits whose largest stage cost is minimal.

    Every stage but the first has a layer; own layers come after all shared ones. Splits are in order of their sum of
    squared stage costs, then of the number of stages that the two passes visit, then of layers on early stages.
    """
    pieces = (*load.layer_cost, load.first)
    total = load.first + load.last + sum(n * one for n, one in zip(load.layers, load.layer_cost, strict=True))
    # filling each stage up to the mean overshoots it by less than one piece
    bound = total // num_stages + max(pieces) + load.last
    smallest = bound
    while found := _splits_within(load, num_stages, bound, limit=1):
        smallest = max(load.split_costs(found[0]))
        bound = smallest - 1
    return _splits_within(load, num_stages, smallest, limit)


def _splits_within(load: Load, num_stages: int, bound: int, limit: int) -> list[Split]:
    """The first `limit` splits without a stage above `bound`."""
    prefixes: dict[Share, list[_Rank]] = {Share(0, 0, 0): [(0, 0, ())]}
    for stage in range(num_stages):
        longer: defaultdict[Share, list[_Rank]] = defaultdict(list)
        for before, ranks in prefixes.items():
            for share, cost in _shares(load, stage, before, bound):
                after = before.plus(share)
                if not _can_finish(load, after, num_stages - stage - 1, bound):
                    continue
                visits = (share.shared + share.generator > 0) + (share.shared + share.ranker > 0)
                late = (-share.shared, -share.ranker, -share.generator)
                longer[after] += [
                    (squares + cost * cost, hops + visits, (*cuts, late)) for squares, hops, cuts in ranks
                ]
        prefixes = {after: sorted(ranks)[:limit] for after, ranks in longer.items()}
    return [
        tuple(Share(-shared, -generator, -ranker) for shared, ranker, generator in cuts)
        for _, _, cuts in prefixes.get(load.layers, [])
    ]


def _shares(load: Load, stage: int, before: Share, bound: int) -> Iterator[tuple[Share, int]]:
    """What `stage` may take within `bound`, with its cost; nothing at all is for the first stage only."""
    whole = load.layers
    for shared in range(whole.shared - before.shared + 1):
        has_all_shared = before.shared + shared == whole.shared
        for generator in range(whole.generator - before.generator + 1 if has_all_shared else 1):
            for ranker in range(whole.ranker - before.ranker + 1 if has_all_shared else 1):
                share = Share(shared, generator, ranker)
                if stage and not any(share):
                    continue
                cost = load.stage_cost(stage, before, share)
                if cost > bound:
                    break
                yield share, cost


def _can_finish(load: Load, after: Share, stages_left: int, bound: int) -> bool:
    """Whether the layers that remain are enough for the stages that remain, and can be within the bound."""
    left = [whole - done for whole, done in zip(load.layers, after, strict=True)]
    cost = sum(count * one for count, one in zip(left, load.layer_cost, strict=True))
    return sum(left) >= stages_left and cost <= stages_left * bound
