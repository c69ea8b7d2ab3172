"""What it costs that data-parallel ranks do not get equal work: the fullest one holds up all others."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import numpy as np

from peer_scale.flops import square_cost_ratio
from peer_scale.planning.layout import ParallelLayout, Workload
from peer_scale.samples.shares import cut_evenly, share_out

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
    meets_often = layout.zero_stage > 1
    num_micro = layout.num_micro_batches(workload.global_batch_size)
    return _waiting_share(workload, layout.data_parallel, num_micro, meets_often, deal)


@lru_cache(maxsize=1024)
def _waiting_share(workload: Workload, ranks: int, num_micro_batches: int, meets_often: bool, deal: Deal) -> float:
    assert workload.lengths is not None
    batch = workload.global_batch_size
    ratio = square_cost_ratio(workload.model, workload.objective, workload.full)
    num_steps = max(1, min(_MOST_STEPS, _MOST_SAMPLES // batch))
    fullest = mean = 0.0
    for lengths in workload.lengths.draw((num_steps, batch), np.random.default_rng(0)):
        costs = lengths + ratio * lengths**2
        work = costs[deal(lengths, ranks, num_micro_batches, ratio)].sum(2)  # [ranks, micro-batches]
        fullest += work.max(0).sum() if meets_often else work.sum(1).max()
        mean += costs.sum() / ranks
    return float(fullest / mean - 1)
