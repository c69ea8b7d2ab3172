"""What each piece of a pipeline's work costs: the numbers that schedules are made from and simulated on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from peer_scale.pipeline.instructions import Backward, Compute, Forward

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class WorkCosts:
    """Costs of one work of the graph, a number per stage: its time on one micro-batch, and what it holds in between."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    activations: tuple[int, ...]


@dataclass(frozen=True)
class Costs:
    """Time and memory of one micro-batch's work. Whole numbers, so that every rank makes the same schedule of them.

    Time is in any one unit (`place` gives FLOPs of one sequence). Activations are kept from a stage's forward to its
    backward; `place` counts a layer as its hidden size. `latency` is the time that every message takes.
    """

    works: tuple[tuple[str, WorkCosts], ...]
    latency: int = 0

    def of(self, work: str) -> WorkCosts:
        """Give the costs of that work."""
        return self._by_name[work]

    @cached_property
    def _by_name(self) -> dict[str, WorkCosts]:
        return dict(self.works)

    def time(self, stage: int, work: Compute) -> int:
        """Give the duration of `work` on `stage`."""
        costs = self.of(work.work)
        return costs.forward[stage] if isinstance(work, Forward) else costs.backward[stage]

    def stage_times(self) -> tuple[int, ...]:
        """Add up all work of one micro-batch on each stage."""
        return tuple(
            sum(costs.forward[stage] + costs.backward[stage] for _, costs in self.works)
            for stage in range(self.num_stages)
        )

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages."""
        return len(self.works[0][1].forward)

    @property
    def imbalance(self) -> float:
        """How much more than the mean the busiest stage has to do: max / mean - 1."""
        times = self.stage_times()
        return max(times) * len(times) / sum(times) - 1

    def one_f_one_b_peak(self, num_micro_batches: int) -> int:
        """Give what textbook 1F1B's fullest stage holds; stage s of P holds all works of P - s micro-batches."""
        return max(
            min(num_micro_batches, self.num_stages - stage) * sum(costs.activations[stage] for _, costs in self.works)
            for stage in range(self.num_stages)
        )


def peak_activations(costs: Costs, stage: int, order: Sequence[Compute]) -> int:
    """Find the most activations that `stage` holds at once when it does its work in that order."""
    held = peak = 0
    for work in order:
        size = costs.of(work.work).activations[stage]
        held += -size if isinstance(work, Backward) else size
        peak = max(peak, held)
    return peak
