"""The words of a pipeline schedule: what a stage computes, sends and receives."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypeAlias

Network: TypeAlias = Literal["generator", "ranker"]


@dataclass(frozen=True)
class Forward:
    """A network's layers on this stage over one micro-batch.

    On the first stage it begins with the embeddings and the projection (of the corrupted ids for the ranker); on the
    last stage of the ranker's path it ends with the ranking head and the TQR loss.
    """

    network: Network
    micro: int


@dataclass(frozen=True)
class Backward:
    """Backward of what `Forward` did on this stage; its activations are free afterwards."""

    network: Network
    micro: int


@dataclass(frozen=True)
class HeadForward:
    """MLM head and loss on the selected positions, then sampling, labels and corrupted ids; on stage 0."""

    micro: int


@dataclass(frozen=True)
class HeadBackward:
    """Backward of the MLM head: gradients of its parameters and of the selected positions' hidden states."""

    micro: int


class Payload(Enum):
    """What a message carries.

    ACTIVATION and GRADIENT: hidden states between two stages of a path, and their gradients. SELECTED_STATES and
    SELECTED_GRADIENT: the same for the selected positions only, between the generator's last stage and the MLM head.
    LABELS: what the ranking head needs of a corrupted micro-batch, from stage 0 to the ranker's last stage.
    """

    ACTIVATION = "activation"
    GRADIENT = "gradient"
    SELECTED_STATES = "selected states"
    SELECTED_GRADIENT = "selected gradient"
    LABELS = "labels"


@dataclass(frozen=True)
class Message:
    """One transfer between two stages; no two of a step are equal, so it can serve as a tag."""

    payload: Payload
    network: Network
    micro: int
    source: int
    destination: int


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


Compute: TypeAlias = Forward | Backward | HeadForward | HeadBackward
Instruction: TypeAlias = Compute | Send | Recv | OptimizerStep
