"""The words of a pipeline schedule: what a stage computes, sends and receives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Forward:
    """A work of the objective's graph on this stage over one micro-batch."""

    work: str
    micro: int


@dataclass(frozen=True)
class Backward:
    """Backward of what `Forward` did on this stage; its activations are free afterwards."""

    work: str
    micro: int


@dataclass(frozen=True)
class Message:
    """One transfer between two stages; no two of a step are equal, so it can serve as a tag.

    `value` is the name of a value of the graph, or of a work for its hidden states between two stages of its path; with
    `is_gradient` it is the gradient of that, going the other way.
    """

    value: str
    micro: int
    source: int
    destination: int
    is_gradient: bool = False


@dataclass(frozen=True)
class Send:
    """Start sending, without waiting for the receiver."""

    message: Message


@dataclass(frozen=True)
class Recv:
    """The message must be here before the stage goes on.

    From one stage to another, the order of all `Recv` is that of all `Send`. An executor can therefore post the
    receives of the whole list ahead of time, in list order, and only wait here.
    """

    message: Message


@dataclass(frozen=True)
class OptimizerStep:
    """Gradients of all micro-batches are there: clip and update."""


Compute: TypeAlias = Forward | Backward
Instruction: TypeAlias = Compute | Send | Recv | OptimizerStep
