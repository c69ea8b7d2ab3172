"""What a work of the graph gets and what it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from peer_scale.objectives.statistics import Places

if TYPE_CHECKING:
    from torch import Tensor

    from peer_scale.models.networks import PretrainingModel
    from peer_scale.samples.examples import Batch


class GlobalCounts(NamedTuple):
    """Normalisers of one optimizer step, summed over all its micro-batches on all ranks (0-dim fp32 tensors)."""

    selected: Tensor
    tokens: Tensor


class StepInfo(NamedTuple):
    """What all micro-batches of a step have in common; `warmup` as `Objective.warmup_steps` says."""

    counts: GlobalCounts
    warmup: bool = False


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function; what `WorkContext.call` is where nothing is compiled."""
    return function(*arguments)


@dataclass(frozen=True)
class WorkContext:
    """A micro-batch, the values that the work takes (by name, see `Value`), and the model to work with.

    `call` calls a function, or what it was compiled to.
    """

    model: PretrainingModel
    batch: Batch
    values: Mapping[str, Tensor]
    warmup: bool
    call: Callable[..., Any] = call

    def tally(self, statistic: Callable[..., dict[str, Tensor]], *tensors: Tensor) -> dict[str, Tensor]:
        """Give the sums that a statistic makes of tensors and of the micro-batch's `Places`."""
        return self.call(statistic, *tensors, Places.of(self.batch))


@dataclass(frozen=True)
class Outcome:
    """What a work makes of a micro-batch: losses and sums that add up over micro-batches and ranks, and values."""

    losses: Mapping[str, Tensor] = field(default_factory=dict)
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)
