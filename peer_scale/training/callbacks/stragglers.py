"""Which rank holds up the others, and how busy and full the ranks are."""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Sequence
from statistics import fmean, median_low
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from peer_scale.parallel.topology import Topology
from peer_scale.training.complaints import complain
from peer_scale.training.late_numbers import LateNumbers
from peer_scale.training.metering import StepRecord
from peer_scale.training.trainer import Callback, Trainer

_SLOW = 1.3
_SHARE_OF_STEP = 0.05
_STEPS = 50


class _Means(NamedTuple):
    """Of one rank: seconds per step, and bytes since the start; `reserved` is 0 on a CPU."""

    busy: float
    data_wait: float
    peak: float
    reserved: float


class Stragglers(Callback):
    """Compares the ranks once every `interval` steps, and names one that is slow for long.

    It adds to the metrics, so it stands before those that write them.

    A rank is slow where it is busy for more than 1.3 times what the median of its pipeline stage is, and the difference
    is a twentieth of a step. What ranks tell each other travels like a step's sums, so that nobody waits for it.
    """

    def __init__(self, topology: Topology, interval: int, host_of_rank: Sequence[str]) -> None:
        self._topology, self._interval, self._hosts = topology, interval, host_of_rank
        self._unread: deque[StepRecord] = deque()
        self._busy = self._data_wait = 0.0
        self._num_known = 0
        self._under_way: dict[int, LateNumbers] = {}
        self._slow_for = [0] * dist.get_world_size()
        self._first_step: int | None = None
        self._last_step: int | None = None

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self._unread.append(record)
        if self._last_step is None:
            self._first_step, self._last_step = record.step, record.step - 1
        if record.step % self._interval == 0 and self._num_known:
            self._under_way[record.step] = self._gather()

    def on_metrics(self, metrics: dict[str, Any]) -> None:
        step = metrics["step"]
        while self._unread and self._unread[0].step <= step:
            record = self._unread.popleft()
            if record.step != self._first_step:  # which compiles, and fills caches
                self._busy += float(record.own_time)
                self._data_wait += record.data_wait
                self._num_known += 1
        numbers = self._under_way.pop(step, None)
        if numbers is None or not self._topology.is_first_rank:
            return
        ranks = [_Means(*of_rank) for of_rank in numbers.tolist()]
        over = over_median([rank.busy for rank in ranks], len(ranks) // self._topology.size("pp"))
        metrics |= self._compared(ranks, over)
        assert self._last_step is not None, "a step has ended"
        self._look_for_slow(over, ranks, step - self._last_step, metrics["step_time_s"])
        self._last_step = step

    def on_went_back(self, step: int) -> None:
        self._unread.clear()
        self._under_way.clear()
        self._last_step = step

    def _gather(self) -> LateNumbers:
        """Send what this rank knows, and take from all; numbers are made on the device, as a step's counts are."""
        device, num = self._topology.device, self._num_known
        means = _Means(self._busy / num, self._data_wait / num, *memory_in_use(device))
        self._busy = self._data_wait = 0.0
        self._num_known = 0
        own = torch.stack([torch.full((), number, dtype=torch.float64, device=device) for number in means])
        ranks = torch.empty(dist.get_world_size(), len(means), dtype=torch.float64, device=device)
        dist.all_gather_into_tensor(ranks.view(-1), own)
        return LateNumbers(ranks)

    def _compared(self, ranks: Sequence[_Means], over: Sequence[float]) -> dict[str, Any]:
        found: dict[str, Any] = {
            "slowest_rank": max(range(len(ranks)), key=lambda rank: over[rank]),
            "busy_time_s": _spread([rank.busy for rank in ranks]),
            "rank_data_wait_s": _spread([rank.data_wait for rank in ranks]),
            "peak_memory_bytes": _spread([rank.peak for rank in ranks]),
        }
        if self._topology.device.type == "cuda":
            found["reserved_memory_bytes"] = _spread([rank.reserved for rank in ranks])
        return found

    def _look_for_slow(self, over: Sequence[float], ranks: Sequence[_Means], steps: int, step_time: float) -> None:
        for number, rank in enumerate(ranks):
            usual = rank.busy - over[number]
            before = self._slow_for[number]
            is_slow = rank.busy > _SLOW * usual and over[number] > _SHARE_OF_STEP * step_time
            self._slow_for[number] = before + steps if is_slow else 0
            if before < _STEPS <= self._slow_for[number]:
                complain(
                    f"rank {number} on {self._hosts[number]} holds up the others: for {self._slow_for[number]} steps "
                    f"it has been busy {rank.busy:.3g} s per step, where {usual:.3g} s is usual"
                )


def over_median(busy: Sequence[float], stage: int) -> list[float]:
    """Give for each rank by how much it is busier than the median of its pipeline stage, so many neighbours."""
    stages = [busy[first : first + stage] for first in range(0, len(busy), stage)]
    return [rank - median_low(ranks) for ranks in stages for rank in ranks]


def memory_in_use(device: torch.device) -> tuple[float, float]:
    """Give the most bytes so far, of tensors on a GPU or of the process, and what torch has taken of the GPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)), float(torch.cuda.max_memory_reserved(device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "mean": fmean(values), "max": max(values)}
