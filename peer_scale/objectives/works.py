"""What a work of the graph gets and what it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

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


@dataclass(frozen=True)
class WorkContext:
    """A micro-batch, the values that the work takes (by name, see `Value`), and the model to work with."""

    model: PretrainingModel
    batch: Batch
    values: Mapping[str, Tensor]
    warmup: bool


@dataclass(frozen=True)
class Outcome:
    """What a work makes of a micro-batch: losses and sums that add up over micro-batches and ranks, and values."""

    losses: Mapping[str, Tensor] = field(default_factory=dict)
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)
