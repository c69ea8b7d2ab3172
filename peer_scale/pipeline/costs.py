"""What each piece of a pipeline's work costs: the numbers that schedules are made from and simulated on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peer_scale.pipeline.instructions import Backward, Compute, Forward, HeadForward, Network

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class PassCosts:
    """Costs of one network's pass, a number a stage: the work on one micro-batch, and what it holds in between."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    activations: tuple[int, ...]


@dataclass(frozen=True)
class Costs:
    """Time and memory of one micro-batch's work. Whole numbers, so that every rank makes the same schedule of them.

    Time is in any one unit (`place` gives FLOPs of one sequence). Activations are kept from a stage's forward to its
    backward; `place` counts a layer as its hidden size. `latency` is the time that every message takes.
    """

    generator: PassCosts
    ranker: PassCosts
    head_forward: int
    head_backward: int
    latency: int = 0

    def of_network(self, network: Network) -> PassCosts:
        """The costs of that network's pass."""
        return self.generator if network == "generator" else self.ranker

    def time(self, stage: int, work: Compute) -> int:
        """Duration of `work` on `stage`."""
        if isinstance(work, Forward):
            return self.of_network(work.network).forward[stage]
        if isinstance(work, Backward):
            return self.of_network(work.network).backward[stage]
        return self.head_forward if isinstance(work, HeadForward) else self.head_backward

    def stage_times(self) -> tuple[int, ...]:
        """All work of one micro-batch on each stage."""
        passes = (self.generator, self.ranker)
        times = [sum(one.forward[stage] + one.backward[stage] for one in passes) for stage in range(self.num_stages)]
        times[0] += self.head_forward + self.head_backward
        return tuple(times)

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages."""
        return len(self.generator.forward)

    @property
    def imbalance(self) -> float:
        """How much more than the mean the busiest stage has to do: max / mean - 1."""
        times = self.stage_times()
        return max(times) * len(times) / sum(times) - 1

    def one_f_one_b_peak(self, num_micro_batches: int) -> int:
        """Activations of textbook 1F1B's fullest stage; stage s of P holds both passes of P - s micro-batches."""
        per_stage = zip(self.generator.activations, self.ranker.activations, strict=True)
        return max(
            min(num_micro_batches, self.num_stages - stage) * (generator + ranker)
            for stage, (generator, ranker) in enumerate(per_stage)
        )


def peak_activations(costs: Costs, stage: int, order: Sequence[Compute]) -> int:
    """Most activations that `stage` holds at once when it does its work in that order; what heads keep is left out."""
    held = peak = 0
    for work in order:
        if isinstance(work, Forward):
            held += costs.of_network(work.network).activations[stage]
            peak = max(peak, held)
        elif isinstance(work, Backward):
            held -= costs.of_network(work.network).activations[stage]
    return peak
