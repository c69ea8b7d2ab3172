"""The words of a pipeline schedule: what a stage computes, sends and receives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

Channel: TypeAlias = tuple[int, int]
"""From which stage to which. It has no tags: what is sent first is received first."""


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

    @property
    def channel(self) -> Channel:
        """The way it takes."""
        return self.source, self.destination


@dataclass(frozen=True)
class Send:
    """Start sending, without waiting for the receiver."""

    message: Message


@dataclass(frozen=True)
class PostRecv:
    """Make room for the message and start receiving it, without waiting for the sender.

    From one stage to another, the order of all `PostRecv` is that of all `Send`, and so is the order of all `Recv`.
    """

    message: Message


@dataclass(frozen=True)
class Recv:
    """The message, whose receive has been posted, must be here before the stage goes on."""

    message: Message


@dataclass(frozen=True)
class OptimizerStep:
    """Gradients of all micro-batches are there: clip and update."""


Compute: TypeAlias = Forward | Backward
Instruction: TypeAlias = Compute | Send | PostRecv | Recv | OptimizerStep


def forwards_only(instructions: Iterable[Instruction]) -> tuple[Instruction, ...]:
    """Leave out what a step without gradients does not do: an evaluation."""
    return tuple(one for one in instructions if _is_of_forward(one))


def _is_of_forward(instruction: Instruction) -> bool:
    if isinstance(instruction, Send | PostRecv | Recv):
        return not instruction.message.is_gradient
    return isinstance(instruction, Forward)
