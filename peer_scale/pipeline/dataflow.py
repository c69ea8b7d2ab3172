"""What the pieces of a micro-batch's work need and give, read off the objective's graph.

A work with a network goes along the stages of the network's path, hidden states from one to the next, and their
gradients back. A work without one is on the first stage. Values go from the stage where a work ends to the stages where
others take them, and the gradients of those that have one go back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peer_scale.pipeline.instructions import Backward, Channel, Compute, Forward, Message

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peer_scale.objectives.graph import Work
    from peer_scale.pipeline.placement import Placement


@dataclass(frozen=True)
class Needs:
    """What a piece of work waits for: earlier work of the same stage, and messages from other stages."""

    local: tuple[Compute, ...] = ()
    messages: tuple[Message, ...] = ()


def stage_work(placement: Placement, stage: int, micro: int) -> list[Compute]:
    """List all that `stage` computes for one micro-batch of a training step."""
    computed: list[Compute] = []
    for work in placement.graph.works:
        if stage in placement.path(work.name):
            computed.append(Forward(work.name, micro))
            if work.has_backward:
                computed.append(Backward(work.name, micro))
    return computed


def needs(placement: Placement, stage: int, work: Compute) -> Needs:
    """Say what `work` on `stage` waits for."""
    list_needs = _forward_needs if isinstance(work, Forward) else _backward_needs
    found = tuple(list_needs(placement, stage, work))
    return Needs(
        tuple(one for one in found if not isinstance(one, Message)),
        tuple(one for one in found if isinstance(one, Message)),
    )


def sends(placement: Placement, stage: int, work: Compute) -> tuple[Message, ...]:
    """List the messages that `stage` sends when `work` is done."""
    list_messages = _after_forward if isinstance(work, Forward) else _after_backward
    return tuple(list_messages(placement, stage, work))


def channels(placement: Placement) -> tuple[Channel, ...]:
    """List the ordered pairs of stages between which messages go, in one order for all ranks."""
    found = {
        message.channel
        for stage in range(placement.num_stages)
        for work in stage_work(placement, stage, micro=0)
        for message in sends(placement, stage, work)
    }
    return tuple(sorted(found))


def taken_at(placement: Placement, stage: int, work: Work) -> tuple[str, ...]:
    """List the values that the work takes on `stage`: those of its beginning, of its end, or of both."""
    path = placement.path(work.name)
    begin = work.begin_takes if stage == path[0] else ()
    end = work.end_takes if stage == path[-1] else ()
    return (*begin, *(name for name in end if name not in begin))


def taking_stages(placement: Placement, value: str) -> tuple[int, ...]:
    """List the stages on which some work takes the value, each once."""
    stages: dict[int, None] = {}
    for work in placement.graph.takers(value):
        for stage in dict.fromkeys((placement.path(work.name)[0], placement.path(work.name)[-1])):
            if value in taken_at(placement, stage, work):
                stages[stage] = None
    return tuple(stages)


def _forward_needs(placement: Placement, stage: int, forward: Compute) -> Iterator[Compute | Message]:
    work = placement.graph.work(forward.work)
    before, _ = _neighbours(placement, stage, work.name)
    if before is not None:
        yield Message(work.name, forward.micro, before, stage)
    for value in taken_at(placement, stage, work):
        giver = placement.graph.giver(value)
        source = placement.path(giver.name)[-1]
        is_local = source == stage
        yield Forward(giver.name, forward.micro) if is_local else Message(value, forward.micro, source, stage)


def _backward_needs(placement: Placement, stage: int, backward: Compute) -> Iterator[Compute | Message]:
    work = placement.graph.work(backward.work)
    yield Forward(work.name, backward.micro)
    _, after = _neighbours(placement, stage, work.name)
    if after is not None:
        yield Message(work.name, backward.micro, after, stage, is_gradient=True)
        return
    for value in work.gives:
        if value.has_gradient:
            (taker,) = placement.graph.takers(value.name)
            (source,) = placement.path(taker.name)
            is_local = source == stage
            message = Message(value.name, backward.micro, source, stage, is_gradient=True)
            yield Backward(taker.name, backward.micro) if is_local else message


def _after_forward(placement: Placement, stage: int, forward: Compute) -> Iterator[Message]:
    work = placement.graph.work(forward.work)
    _, after = _neighbours(placement, stage, work.name)
    if after is not None:
        yield Message(work.name, forward.micro, stage, after)
        return
    for value in work.gives:
        for destination in taking_stages(placement, value.name):
            if destination != stage:
                yield Message(value.name, forward.micro, stage, destination)


def _after_backward(placement: Placement, stage: int, backward: Compute) -> Iterator[Message]:
    work = placement.graph.work(backward.work)
    before, _ = _neighbours(placement, stage, work.name)
    if before is not None:
        yield Message(work.name, backward.micro, stage, before, is_gradient=True)
    for value in work.takes:
        if placement.graph.value(value).has_gradient:
            destination = placement.path(placement.graph.giver(value).name)[-1]
            if destination != stage:
                yield Message(value, backward.micro, stage, destination, is_gradient=True)


def _neighbours(placement: Placement, stage: int, work: str) -> tuple[int | None, int | None]:
    """Find the stages before and after this one on the work's path; None at its ends."""
    path = placement.path(work)
    place = path.index(stage)
    return (path[place - 1] if place else None, path[place + 1] if place + 1 < len(path) else None)
