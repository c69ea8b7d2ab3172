"""A pipeline schedule as data: for each stage the list of what it computes, sends and receives in one step.

`build_schedule` is a pure function of whole numbers, so every rank that calls it with the same arguments gets the same
lists. Kinds:

- `gpipe`: all forwards, then all backwards.
- `1f1b`: backwards first, at most as many micro-batches in flight as there are stages; all passes are one unit.
- `1f1b_phases`: the works before the first late one (the generator's pass) of all micro-batches in 1F1B, then the rest.
- `two_pass`: the order of work and the number of micro-batches in flight that a search finds best. A generator's
  backward needs nothing of the ranker, so it fills what would be the ranker's bubble, and the other way round.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, TypeAlias, get_args

from peer_scale.errors import UserError
from peer_scale.objectives.graph import Graph
from peer_scale.pipeline.costs import Costs
from peer_scale.pipeline.dataflow import needs, sends
from peer_scale.pipeline.instructions import (
    Compute,
    Forward,
    Instruction,
    Message,
    OptimizerStep,
    Recv,
    Send,
)
from peer_scale.pipeline.list_scheduling import WORK_KINDS, Order, StageOrders, list_schedule
from peer_scale.pipeline.placement import Placement
from peer_scale.pipeline.search import search

Kind: TypeAlias = Literal["gpipe", "1f1b", "1f1b_phases", "two_pass"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

_BACKWARD_FIRST: Final[Order] = (
    "late_backward",
    "early_backward",
    "table_backward",
    "late_forward",
    "table_forward",
    "early_forward",
)


@dataclass(frozen=True)
class Schedule:
    """One step of the whole pipeline; `stages[s]` is run by stage s from beginning to end.

    Sends do not wait. Receives wait where they stand; between two stages they stand in the order of the sends.
    """

    kind: Kind
    placement: Placement
    num_micro_batches: int
    stages: tuple[tuple[Instruction, ...], ...]


@lru_cache(maxsize=32)
def build_schedule(
    kind: Kind,
    placement: Placement,
    num_micro_batches: int,
    *,
    cap: int | None = None,
    order: Order | None = None,
    costs: Costs | None = None,
) -> Schedule:
    """Give the schedule of one step.

    Args:
        kind: See the module.
        placement: Which stage holds what.
        num_micro_batches: Micro-batches of one step on each data-parallel rank.
        cap: Most micro-batches that are begun and not finished. None: the number of stages; `two_pass` searches from
            there up to half as many more, within 1.5 times the activations of textbook 1F1B. `gpipe` has no cap.
        order: `two_pass` only: all `WORK_KINDS`, what comes first among ready work being first; None searches.
        costs: What the order is made from; the placement's where None.

    Raises:
        UserError: A kind, a number of micro-batches or a cap that cannot be.
    """
    if kind not in KINDS:
        raise UserError(f"pipeline schedule {kind!r}: unknown; choose one of {', '.join(KINDS)}")
    for name, value in (("number of micro-batches", num_micro_batches), ("micro-batches in flight", cap)):
        if value is not None and value < 1:
            raise UserError(f"pipeline schedule: {name} is {value}; it must be at least 1")
    assert order is None or sorted(order) == sorted(WORK_KINDS), "an order ranks every kind of work once"
    orders = _compute_orders(kind, placement, num_micro_batches, cap, order, costs or placement.costs)
    stages = tuple((*instructions, OptimizerStep()) for instructions in _with_messages(placement, orders))
    return Schedule(kind, placement, num_micro_batches, stages)


def _compute_orders(
    kind: Kind, placement: Placement, num_micro_batches: int, cap: int | None, order: Order | None, costs: Costs
) -> list[tuple[Compute, ...]]:
    """Say what each stage computes, in order."""

    def part(include: Callable[[Compute], bool], limit: int) -> StageOrders:
        return list_schedule(placement, costs, num_micro_batches, _BACKWARD_FIRST, limit, include)

    if kind == "two_pass":
        return list(search(placement, costs, num_micro_batches, cap=cap, order=order).stages)
    limit = cap or placement.num_stages
    if kind == "1f1b":
        parts = [part(lambda work: True, limit)]
    elif kind == "1f1b_phases":
        second = _second_phase(placement.graph)
        parts = [part(lambda work: work.work not in second, limit), part(lambda work: work.work in second, limit)]
    else:
        parts = [part(_is_forward, num_micro_batches), part(lambda work: not _is_forward(work), num_micro_batches)]
    return [sum((one.stages[stage] for one in parts), ()) for stage in range(placement.num_stages)]


def _is_forward(work: Compute) -> bool:
    return isinstance(work, Forward)


def _second_phase(graph: Graph) -> set[str]:
    """Name the first late work and all that come after it."""
    names = [work.name for work in graph.works]
    late = [index for index, work in enumerate(graph.works) if work.network is not None and work.takes]
    return set(names[late[0] :]) if late else set()


def _with_messages(placement: Placement, orders: Sequence[Sequence[Compute]]) -> list[list[Instruction]]:
    """Put sends right after what makes their content, and receives as late as the order of the sends lets them be."""
    channels: defaultdict[tuple[int, int], list[Message]] = defaultdict(list)
    for stage, order in enumerate(orders):
        for work in order:
            for message in sends(placement, stage, work):
                channels[stage, message.destination].append(message)
    stages = []
    for stage, order in enumerate(orders):
        arriving = {source: iter(messages) for (source, to), messages in channels.items() if to == stage}
        received: set[Message] = set()
        instructions: list[Instruction] = []
        for work in order:
            for wanted in needs(placement, stage, work).messages:
                while wanted not in received:
                    message = next(arriving[wanted.source])
                    received.add(message)
                    instructions.append(Recv(message))
            instructions.append(work)
            instructions += [Send(message) for message in sends(placement, stage, work)]
        stages.append(instructions)
    return stages
