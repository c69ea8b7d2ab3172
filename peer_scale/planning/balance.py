"""How samples of different lengths fall into micro-batches, and what it costs that ranks do not get equal work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TypeAlias

import numpy as np

from peer_scale.errors import UserError
from peer_scale.flops import square_cost_ratio
from peer_scale.planning.layout import ParallelLayout, Workload
from peer_scale.samples.shares import cut_by_tokens, cut_evenly, share_out

Deal: TypeAlias = Callable[[np.ndarray, int, int, float], np.ndarray]
"""Share out samples by their lengths [n], over so many ranks with so many micro-batches each.

The last argument is the cost of a pair of tokens of one sequence over that of a token. The result is the samples'
places, int64 [ranks, micro-batches, samples].
"""

_MOST_SAMPLES = 1 << 18  # drawn for one figure: enough for three digits, and soon done
_MOST_STEPS = 64


def in_turns(lengths: np.ndarray, ranks: int, num_micro_batches: int, square_ratio: float) -> np.ndarray:
    """Deal samples out as they come, one micro-batch to each rank in turn."""
    del square_ratio
    return np.arange(len(lengths)).reshape(num_micro_batches, ranks, -1).transpose(1, 0, 2)


def equal_shares(lengths: np.ndarray, ranks: int, num_micro_batches: int, square_ratio: float) -> np.ndarray:
    """Share samples out as training does."""
    return cut_evenly(lengths, share_out(lengths, ranks, square_ratio), num_micro_batches, square_ratio)


def waiting_share(workload: Workload, layout: ParallelLayout, deal: Deal) -> float:
    """Estimate how much more than the mean the fullest data-parallel rank has to do in a step: max / mean - 1.

    Ranks meet once per step under ZeRO-1, at every micro-batch under ZeRO-2 and 3, which reduce gradients there. Steps
    are drawn from the text's lengths, always the same ones; a sample costs its products. 0 where all samples are alike.
    """
    if workload.lengths is None or not workload.lengths.are_known:
        return 0.0
    budget = layout.micro_batch_tokens
    num_micro = layout.num_micro_batches(workload.global_batch_size) if budget is None else 1
    return _waiting_share(workload, layout.data_parallel, num_micro, budget, layout.zero_stage > 1, deal)


def within_budget(layout: ParallelLayout, workload: Workload) -> ParallelLayout:
    """Give a layout with a budget of tokens the sequences that a micro-batch has on average; any other as it is.

    A step has as few micro-batches as its lengths allow, which the same drawn steps say as in `waiting_share`.

    Raises:
        UserError: A sequence may have more tokens than that, or the ranks get no equal numbers of sequences.
    """
    budget, ranks, batch = layout.micro_batch_tokens, layout.data_parallel, workload.global_batch_size
    if budget is None:
        return layout
    if budget < workload.seq_length:
        raise UserError(
            f"--micro-batch-tokens {budget} is less than one sequence may have (--seq-length {workload.seq_length})"
        )
    if batch % ranks:
        raise UserError(f"--global-batch-size {batch} is no multiple of data-parallel size {ranks}")
    share = batch // ranks
    if workload.lengths is None or not workload.lengths.are_known:
        number: float = math.ceil(share / math.floor(budget / workload.size.tokens))
    else:
        number = _mean_micro_batches(workload, ranks, budget)
    return replace(layout, micro_batch_size=share / number)


@lru_cache(maxsize=1024)
def _mean_micro_batches(workload: Workload, ranks: int, budget: int) -> float:
    ratio = square_cost_ratio(workload.model, workload.objective, workload.full)
    numbers = [
        len(cut_by_tokens(lengths, share_out(lengths, ranks, ratio), budget, ratio)[0])
        for lengths in _drawn_steps(workload)
    ]
    return sum(numbers) / len(numbers)


@lru_cache(maxsize=1024)
def _waiting_share(
    workload: Workload, ranks: int, num_micro_batches: int, budget: int | None, meets_often: bool, deal: Deal
) -> float:
    ratio = square_cost_ratio(workload.model, workload.objective, workload.full)
    fullest = mean = 0.0
    for lengths in _drawn_steps(workload):
        costs = lengths + ratio * lengths**2
        dealt = deal(lengths, ranks, num_micro_batches, ratio)
        work = costs[dealt].sum(2)  # [ranks, micro-batches]
        if budget is not None:
            micro_batches = cut_by_tokens(lengths, dealt[:, 0], budget, ratio)
            work = np.array([[costs[micro].sum() for micro in of_rank] for of_rank in micro_batches])
        fullest += work.max(0).sum() if meets_often else work.sum(1).max()
        mean += costs.sum() / ranks
    return float(fullest / mean - 1)


def _drawn_steps(workload: Workload) -> Iterator[np.ndarray]:
    """Give the lengths of some steps' samples [batch], always the same ones."""
    assert workload.lengths is not None
    batch = workload.global_batch_size
    num_steps = max(1, min(_MOST_STEPS, _MOST_SAMPLES // batch))
    return iter(workload.lengths.draw((num_steps, batch), np.random.default_rng(0)))
