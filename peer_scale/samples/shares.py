"""Who computes which samples of a step: shares that cost alike, found from the samples' lengths alone.

Everything here is a pure function of the lengths, in whole numbers and sums of a fixed order, so that every rank finds
the same by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_EVEN = 0.002
"""Two shares whose costs differ by less than this part of the mean are even enough."""
_MOST_SWAPS = 12
"""Rounds of swaps: each takes the two ends of the costs nearer to one another; four are enough for most steps."""


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of a step are shared out among the data-parallel ranks, and on each among micro-batches.

    Step t (from 0) consists of samples [t * global_batch, (t + 1) * global_batch), however many ranks share them. All
    ranks get the same number of samples and of micro-batches.

    Attributes:
        global_batch: samples per step.
        micro_batch: samples per micro-batch, so that their number is the same in every step; None with a budget.
        token_budget: tokens that a micro-batch may have. There are as few micro-batches as a step's lengths allow.
        square_ratio: cost of a pair of tokens of one sequence over that of a token.
        data_parallel_rank: whose samples are asked for.
        data_parallel_size: ranks that share a step.
    """

    global_batch: int
    micro_batch: int | None = None
    token_budget: int | None = None
    square_ratio: float = 0.0
    data_parallel_rank: int = 0
    data_parallel_size: int = 1

    def __post_init__(self) -> None:
        assert (self.micro_batch is None) != (self.token_budget is None), "either samples or tokens"
        assert self.global_batch % self.data_parallel_size == 0, (self.global_batch, self.data_parallel_size)
        assert self.share % (self.micro_batch or 1) == 0, (self.share, self.micro_batch)

    @property
    def share(self) -> int:
        """Samples of one rank in a step."""
        return self.global_batch // self.data_parallel_size

    def samples(self, step: int) -> range:
        """Give the numbers of a step's samples, those of all ranks."""
        return range(step * self.global_batch, (step + 1) * self.global_batch)

    def micro_batches(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Give the samples of each of this rank's micro-batches in a step, by their places in it, ascending.

        Args:
            lengths: tokens of each of the step's samples, int64 [global_batch].
        """
        ranks = share_out(lengths, self.data_parallel_size, self.square_ratio)
        found: Sequence[np.ndarray]
        if self.token_budget is None:
            assert self.micro_batch is not None
            own = ranks[[self.data_parallel_rank]]
            (found,) = cut_evenly(lengths, own, self.share // self.micro_batch, self.square_ratio)
        else:
            found = cut_by_tokens(lengths, ranks, self.token_budget, self.square_ratio)[self.data_parallel_rank]
        return [np.sort(places) for places in found]


def share_out(lengths: np.ndarray, ranks: int, square_ratio: float) -> np.ndarray:
    """Give each rank equally many samples, at costs that are as equal as can be.

    Args:
        lengths: tokens of each sample, int64 [n].
        ranks: how many share the samples; they divide n.
        square_ratio: cost of a pair of tokens of one sequence over that of a token.

    Returns:
        Each rank's samples by their places in `lengths`, int64 [ranks, n / ranks].
    """
    return _even_shares(lengths[None], ranks, square_ratio)[0]


def cut_evenly(lengths: np.ndarray, ranks: np.ndarray, number: int, square_ratio: float) -> np.ndarray:
    """Cut each rank's samples into micro-batches of equally many samples and alike costs, the costliest first.

    Where all ranks meet at every micro-batch, those of one number cost alike on all of them.

    Args:
        lengths: as `share_out` has them.
        ranks: what `share_out` gave, int64 [ranks, share].
        number: micro-batches of each rank; they divide its share.
        square_ratio: as `share_out` has it.

    Returns:
        Places in `lengths`, int64 [ranks, number, share / number].
    """
    within = _even_shares(lengths[ranks], number, square_ratio).reshape(len(ranks), -1)
    costs = _costs(lengths, square_ratio)[ranks]
    cut = np.take_along_axis(ranks, within, 1).reshape(len(ranks), number, -1)
    sums = np.take_along_axis(costs, within, 1).reshape(cut.shape).sum(2)
    return np.take_along_axis(cut, np.argsort(-sums, axis=1, kind="stable")[:, :, None], 1)


def cut_by_tokens(
    lengths: np.ndarray, ranks: np.ndarray, token_budget: int, square_ratio: float
) -> list[list[np.ndarray]]:
    """Cut each rank's samples into micro-batches within a budget of tokens, equally many on all ranks, few of them.

    Their number is the least at which the longest samples first, each to the micro-batch with the fewest tokens, stay
    within the budget on every rank: seldom more than the tokens of the fullest rank ask for, since the micro-batches
    come out alike. The costliest are first.

    Args:
        lengths: as `share_out` has them; none is above the budget.
        ranks: what `share_out` gave, int64 [ranks, share].
        token_budget: tokens that a micro-batch may have.
        square_ratio: as `share_out` has it.

    Returns:
        For each rank its micro-batches, places in `lengths`.
    """
    assert lengths.max() <= token_budget, (lengths.max(), token_budget)
    tokens = lengths[ranks]
    number = max(1, -(-int(tokens.sum(1).max()) // token_budget))
    while True:
        micro, fullest = _fill(tokens, number)
        if fullest <= token_budget:
            break
        number += 1
    costs = _costs(lengths, square_ratio)[ranks]
    sums = np.stack([np.where(micro == one, costs, 0).sum(1) for one in range(number)], 1)
    order = np.argsort(-sums, axis=1, kind="stable")
    return [[ranks[rank][micro[rank] == one] for one in order[rank]] for rank in range(len(ranks))]


def _costs(lengths: np.ndarray, square_ratio: float) -> np.ndarray:
    return lengths + square_ratio * (lengths * lengths)


def _even_shares(lengths: np.ndarray, shares: int, square_ratio: float) -> np.ndarray:
    """Cut each row of samples into shares of equally many samples and costs that are as equal as can be.

    The longest are dealt out first, in rounds of one to each share: the longest of a round to the share that has had
    the least. What stays uneven (a round's samples differ less than its shares do) is evened out by swaps between the
    costliest and the cheapest share, the second costliest and the second cheapest, and so on.

    Args:
        lengths: of each sample, int64 [rows, n].
        shares: how many there are of a row; they divide n.
        square_ratio: as `share_out` has it.

    Returns:
        Places in the row, int64 [rows, shares, n / shares].
    """
    rows, size = len(lengths), lengths.shape[1] // shares
    if shares == 1:
        return np.broadcast_to(np.arange(size), (rows, 1, size))
    behind = lengths.max() - lengths
    behind = behind.astype(np.min_scalar_type(behind.max()))  # numpy sorts small integers ten times faster
    order = np.argsort(behind, axis=1, kind="stable")
    row = np.arange(rows)[:, None]
    sorted_costs = _costs(lengths[row, order], square_ratio).reshape(rows, size, shares)
    order = order.reshape(rows, size, shares)
    places, costs = np.empty((rows, shares, size), np.int64), np.empty((rows, shares, size))
    loads = np.zeros((rows, shares))
    for number in range(size):
        cheapest_first = np.argsort(loads, axis=1, kind="stable")
        places[row, cheapest_first, number] = order[:, number]
        costs[row, cheapest_first, number] = sorted_costs[:, number]
        loads[row, cheapest_first] += sorted_costs[:, number]
    if size > 1:
        _swap(places, costs, loads)
    return places


def _swap(places: np.ndarray, costs: np.ndarray, loads: np.ndarray) -> None:
    """Even out, in place, the shares `places` with their samples' `costs`, [rows, shares, size], and their sums."""
    pairs = loads.shape[1] // 2
    least_gap = _EVEN * loads.mean(1, keepdims=True)
    for _ in range(_MOST_SWAPS):
        order = np.argsort(loads, axis=1, kind="stable")
        cheap, costly = order[:, :pairs], order[:, ::-1][:, :pairs]
        gaps = np.take_along_axis(loads, costly, 1) - np.take_along_axis(loads, cheap, 1)
        row, pair = np.nonzero(gaps > least_gap)
        gap, high, low = gaps[row, pair], costly[row, pair], cheap[row, pair]
        wanted = costs[row, low] + gap[:, None] / 2  # the best swap moves half of the gap
        missed = costs[row, high][:, :, None] - wanted[:, None, :]
        best = np.abs(missed, out=missed).reshape(len(row), -1).argmin(1) if len(row) else row
        given, taken = np.divmod(best, places.shape[2])
        change = costs[row, high, given] - costs[row, low, taken]
        helps = (change > 0) & (change < gap)
        if not helps.any():
            return
        row, high, low, given, taken, change = (one[helps] for one in (row, high, low, given, taken, change))
        for array in (places, costs):
            array[row, high, given], array[row, low, taken] = array[row, low, taken], array[row, high, given]
        loads[row, high] -= change
        loads[row, low] += change


def _fill(tokens: np.ndarray, number: int) -> tuple[np.ndarray, int]:
    """Put each row's samples, the longest first, to the one of `number` micro-batches that has the fewest tokens.

    Args:
        tokens: of each sample, int64 [rows, n].
        number: micro-batches per row.

    Returns:
        The samples' micro-batches, int64 [rows, n], and the tokens of the fullest one.
    """
    rows = np.arange(len(tokens))
    order = np.argsort(-tokens, axis=1, kind="stable")
    micro = np.empty(tokens.shape, np.int64)
    loads = np.zeros((len(tokens), number), np.int64)
    for sample in order.T:
        emptiest = loads.argmin(1)
        micro[rows, sample] = emptiest
        loads[rows, emptiest] += tokens[rows, sample]
    return micro, int(loads.max())
