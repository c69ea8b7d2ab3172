"""What the pieces of a micro-batch's work need and give: the one place that knows how the two passes hang together.

    generator: embeddings -> layers, stage after stage -> MLM head on stage 0, and back the same way
    ranker:    embeddings of what the head sampled -> layers, stage after stage -> ranking head, and back the same way

No gradient goes from the ranker to the generator, so the generator's backward needs nothing of the ranker's pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peer_scale.pipeline.instructions import (
    Backward,
    Compute,
    Forward,
    HeadBackward,
    HeadForward,
    Message,
    Network,
    Payload,
)

if TYPE_CHECKING:
    from peer_scale.pipeline.placement import Placement


@dataclass(frozen=True)
class Needs:
    """What a piece of work waits for: earlier work of the same stage, and messages from other stages."""

    local: tuple[Compute, ...] = ()
    messages: tuple[Message, ...] = ()


def stage_work(placement: Placement, stage: int, micro: int) -> list[Compute]:
    """All that `stage` computes for one micro-batch of a training step."""
    work: list[Compute] = []
    for network in placement.networks:
        if stage in placement.path(network):
            work += [Forward(network, micro), Backward(network, micro)]
    if stage == 0:
        work += [HeadForward(micro), HeadBackward(micro)]
    return work


def needs(placement: Placement, stage: int, work: Compute) -> Needs:
    """What `work` on `stage` waits for."""
    if isinstance(work, Forward):
        return _forward_needs(placement, stage, work)
    if isinstance(work, Backward):
        return _backward_needs(placement, stage, work)
    if isinstance(work, HeadBackward):
        return Needs(local=(HeadForward(work.micro),))
    last = placement.path("generator")[-1]
    if last == 0:
        return Needs(local=(Forward("generator", work.micro),))
    return Needs(messages=(Message(Payload.SELECTED_STATES, "generator", work.micro, last, 0),))


def sends(placement: Placement, stage: int, work: Compute) -> tuple[Message, ...]:
    """The messages that `stage` sends when `work` is done."""
    micro = work.micro
    if isinstance(work, HeadForward):
        last = placement.path("ranker")[-1] if "ranker" in placement.networks else 0
        return (Message(Payload.LABELS, "ranker", micro, 0, last),) if last else ()
    if isinstance(work, HeadBackward):
        last = placement.path("generator")[-1]
        return (Message(Payload.SELECTED_GRADIENT, "generator", micro, 0, last),) if last else ()
    before, after = _neighbours(placement, stage, work.network)
    if isinstance(work, Backward):
        return () if before is None else (Message(Payload.GRADIENT, work.network, micro, stage, before),)
    if after is not None:
        return (Message(Payload.ACTIVATION, work.network, micro, stage, after),)
    if work.network == "generator" and stage:
        return (Message(Payload.SELECTED_STATES, "generator", micro, stage, 0),)
    return ()


def _forward_needs(placement: Placement, stage: int, work: Forward) -> Needs:
    before, after = _neighbours(placement, stage, work.network)
    if before is None:
        return Needs(local=(HeadForward(work.micro),) if work.network == "ranker" else ())
    messages = [Message(Payload.ACTIVATION, work.network, work.micro, before, stage)]
    if work.network == "ranker" and after is None:
        messages.append(Message(Payload.LABELS, "ranker", work.micro, 0, stage))
    return Needs(messages=tuple(messages))


def _backward_needs(placement: Placement, stage: int, work: Backward) -> Needs:
    _, after = _neighbours(placement, stage, work.network)
    own = Forward(work.network, work.micro)
    if after is not None:
        return Needs((own,), (Message(Payload.GRADIENT, work.network, work.micro, after, stage),))
    if work.network == "ranker":
        return Needs((own,))
    if stage == 0:
        return Needs((own, HeadBackward(work.micro)))
    return Needs((own,), (Message(Payload.SELECTED_GRADIENT, "generator", work.micro, 0, stage),))


def _neighbours(placement: Placement, stage: int, network: Network) -> tuple[int | None, int | None]:
    """The stages before and after this one on the network's path; None at its ends."""
    path = placement.path(network)
    place = path.index(stage)
    return (path[place - 1] if place else None, path[place + 1] if place + 1 < len(path) else None)
