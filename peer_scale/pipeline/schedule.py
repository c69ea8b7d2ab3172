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

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Final, Literal, TypeAlias, get_args

from peer_scale.errors import UserError
from peer_scale.objectives.graph import Graph
from peer_scale.pipeline.costs import Costs
from peer_scale.pipeline.dataflow import needs, sends
from peer_scale.pipeline.instructions import (
    Channel,
    Compute,
    Forward,
    Instruction,
    Message,
    OptimizerStep,
    PostRecv,
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

    Sends and the posting of receives do not wait; `Recv` waits where it stands. Between two stages all three stand in
    the same order. All lists are drawn from one order of the whole pipeline, in which a transfer has one place.
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
    lists = _with_messages(placement, orders, costs or placement.costs)
    stages = tuple((*instructions, OptimizerStep()) for instructions in lists)
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


def _with_messages(placement: Placement, orders: Sequence[Sequence[Compute]], costs: Costs) -> list[list[Instruction]]:
    """Give each stage its list, of which all are drawn from one order of the whole pipeline's work.

    A send stands right after what makes its content, the posting of its receive at the same place of the common order,
    and the wait for it as late as the order of the sends lets it be. So each stage meets its transfers in the common
    order, and none can wait for one that comes later, however little its streams can do at once.
    """
    lists: list[list[Instruction]] = [[] for _ in orders]
    posted: defaultdict[Channel, deque[Message]] = defaultdict(deque)
    received: set[Message] = set()
    for stage, work, wanted in _by_completion(placement, orders, costs):
        for message in wanted:
            while message not in received:
                following = posted[message.channel].popleft()
                received.add(following)
                lists[stage].append(Recv(following))
        lists[stage].append(work)
        for message in sends(placement, stage, work):
            lists[stage].append(Send(message))
            lists[message.destination].append(PostRecv(message))
            posted[message.channel].append(message)
    return lists


def _by_completion(
    placement: Placement, orders: Sequence[Sequence[Compute]], costs: Costs
) -> list[tuple[int, Compute, tuple[Message, ...]]]:
    """List the work of all stages, with the messages it waits for, by the time it ends.

    Each stage begins its next work as soon as it can, as in the simulator. What ends at the same time is in an order in
    which it could be done, which also holds for work that takes no time.
    """
    listed: list[tuple[int, int, Compute, tuple[Message, ...]]] = []
    arrivals: dict[Message, int] = {}
    clocks, positions = [0] * len(orders), [0] * len(orders)
    total = sum(map(len, orders))
    while len(listed) < total:
        before = len(listed)
        for stage, order in enumerate(orders):
            while positions[stage] < len(order):
                work = order[positions[stage]]
                wanted = needs(placement, stage, work).messages
                if not all(message in arrivals for message in wanted):
                    break
                start = max([clocks[stage], *(arrivals[message] for message in wanted)])
                clocks[stage] = start + costs.time(stage, work)
                for message in sends(placement, stage, work):
                    arrivals[message] = clocks[stage] + costs.latency
                listed.append((clocks[stage], stage, work, wanted))
                positions[stage] += 1
        assert len(listed) > before, "stages wait for each other in a circle"
    # stable: what ends at the same time stays in the order in which it was found to be possible
    return [(stage, work, wanted) for _, stage, work, wanted in sorted(listed, key=itemgetter(0))]
