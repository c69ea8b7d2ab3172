"""Greedy list scheduling: whenever a stage is free it takes the first, in a given order, of the work that is ready."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal, TypeAlias, get_args

from peer_scale.objectives.graph import Graph
from peer_scale.pipeline.costs import Costs
from peer_scale.pipeline.dataflow import needs, sends, stage_work
from peer_scale.pipeline.instructions import Compute, Forward
from peer_scale.pipeline.placement import Placement

WorkKind: TypeAlias = Literal[
    "early_forward", "table_forward", "table_backward", "early_backward", "late_forward", "late_backward"
]
"""What an order ranks work by.

Early works run along a network and need nothing of others (a generator), late ones do (a ranker), and the rest is done
where the word table is (the MLM head).
"""
Order: TypeAlias = tuple[WorkKind, ...]
WORK_KINDS: Final[Order] = get_args(WorkKind)


def work_kind(graph: Graph, work: Compute) -> WorkKind:
    """Give the kind that an order ranks `work` by."""
    node = graph.work(work.work)
    if isinstance(work, Forward):
        return "table_forward" if node.network is None else "late_forward" if node.takes else "early_forward"
    return "table_backward" if node.network is None else "late_backward" if node.takes else "early_backward"


@dataclass(frozen=True)
class StageOrders:
    """In which order each stage computes, and what that costs by the figures it was made from.

    A search makes many of which it needs the figures alone, so the order is kept as the scheduler has it: for each
    stage (micro-batch, index into the template) in turn.
    """

    makespan: int
    peak_activations: tuple[int, ...]
    template: list[_Node]
    orders: list[list[tuple[int, int]]]

    @cached_property
    def stages(self) -> tuple[tuple[Compute, ...], ...]:
        """Say what each stage computes, in order."""
        return tuple(
            tuple(replace(self.template[index].work, micro=micro) for micro, index in order) for order in self.orders
        )


def list_schedule(
    placement: Placement,
    costs: Costs,
    num_micro_batches: int,
    order: Order,
    cap: int,
    include: Callable[[Compute], bool] = lambda _: True,
) -> StageOrders:
    """Schedule the work that `include` accepts, as if all other work had been done before.

    Args:
        placement: Where the work is done.
        costs: How long it takes; equal times are told apart by stage, micro-batch and kind, so the result depends on
            the arguments alone.
        num_micro_batches: Micro-batches of the step.
        order: What comes first, of all kinds of work; among equals the earlier micro-batch.
        cap: Most micro-batches that are begun and not finished.
        include: Which kinds of work to schedule.
    """
    template = _template(placement, costs, order, include)
    run = _Run(template, placement.num_stages, num_micro_batches, cap)
    peaks = tuple(_peak_activations(template, stage_order) for stage_order in run.orders)
    return StageOrders(run.now, peaks, template, run.orders)


def _peak_activations(template: list[_Node], order: list[tuple[int, int]]) -> int:
    """Find the most activations that are held at once."""
    return max(itertools.accumulate((template[index].activations for _, index in order), initial=0))


@dataclass(frozen=True)
class _Node:
    """A piece of one micro-batch's work; successors are indices into the template, with the time until they know.

    `activations` is what it adds to those held on its stage, or takes from them.
    """

    work: Compute
    stage: int
    time: int
    activations: int
    priority: int
    num_needs: int
    successors: tuple[tuple[int, int], ...]


def _template(placement: Placement, costs: Costs, order: Order, include: Callable[[Compute], bool]) -> list[_Node]:
    """Give the graph that is the same for every micro-batch."""
    nodes = [
        (stage, work)
        for stage in range(placement.num_stages)
        for work in stage_work(placement, stage, micro=0)
        if include(work)
    ]
    origins = {message: (stage, work) for stage, work in nodes for message in sends(placement, stage, work)}
    index = {node: position for position, node in enumerate(nodes)}
    successors: list[list[tuple[int, int]]] = [[] for _ in nodes]
    num_needs = [0] * len(nodes)
    for position, (stage, work) in enumerate(nodes):
        wanted = needs(placement, stage, work)
        before = [(index[stage, other], 0) for other in wanted.local if (stage, other) in index]
        before += [(index[origins[message]], costs.latency) for message in wanted.messages if message in origins]
        num_needs[position] = len(before)
        for origin, delay in before:
            successors[origin].append((position, delay))
    return [
        _Node(
            work,
            stage,
            costs.time(stage, work),
            costs.of(work.work).activations[stage] * (1 if isinstance(work, Forward) else -1),
            _priority(placement.graph, order, work),
            num_needs[position],
            tuple(successors[position]),
        )
        for position, (stage, work) in enumerate(nodes)
    ]


def _priority(graph: Graph, order: Order, work: Compute) -> int:
    """Rank by kind; within a kind, forward in the graph's order and backward against it."""
    names = [node.name for node in graph.works]
    place = names.index(work.work)
    within = place if isinstance(work, Forward) else len(names) - 1 - place
    return order.index(work_kind(graph, work)) * len(names) + within


class _Run:
    """Greedy stages at work; afterwards `orders` has (micro-batch, index into the template) of each stage in turn."""

    def __init__(self, template: list[_Node], num_stages: int, num_micro_batches: int, cap: int) -> None:
        self.orders: list[list[tuple[int, int]]] = [[] for _ in range(num_stages)]
        self.now = 0
        self._template, self._num_micro_batches, self._cap = template, num_micro_batches, cap
        self._entries = [index for index, task in enumerate(template) if not task.num_needs]
        self._missing = [[task.num_needs for task in template] for _ in range(num_micro_batches)]
        self._unfinished = [len(template)] * num_micro_batches
        self._num_begun = self._num_finished = 0
        self._is_free = [True] * num_stages
        self._ready: list[list[tuple[int, int, int]]] = [[] for _ in range(num_stages)]
        # (time, micro-batch, index, finished?): a task has finished, or one more of its needs has been met
        self._events: list[tuple[int, int, int, bool]] = []
        self._run()

    def _run(self) -> None:
        while True:
            self._begin_micro_batches()
            self._start_ready_work()
            if not self._events:
                return
            self._pass_time()

    def _begin_micro_batches(self) -> None:
        while self._num_begun < self._num_micro_batches and self._num_begun - self._num_finished < self._cap:
            for index in self._entries:
                self._make_ready(self._num_begun, index)
            self._num_begun += 1

    def _make_ready(self, micro: int, index: int) -> None:
        task = self._template[index]
        heapq.heappush(self._ready[task.stage], (task.priority, micro, index))

    def _start_ready_work(self) -> None:
        for stage, ready in enumerate(self._ready):
            if ready and self._is_free[stage]:
                _, micro, index = heapq.heappop(ready)
                self._is_free[stage] = False
                self.orders[stage].append((micro, index))
                heapq.heappush(self._events, (self.now + self._template[index].time, micro, index, True))

    def _pass_time(self) -> None:
        """On to the next event, and all others of the same time."""
        self.now = self._events[0][0]
        while self._events and self._events[0][0] == self.now:
            _, micro, index, has_finished = heapq.heappop(self._events)
            if has_finished:
                self._finish(micro, index)
            else:
                self._meet_need(micro, index)

    def _finish(self, micro: int, index: int) -> None:
        self._is_free[self._template[index].stage] = True
        self._unfinished[micro] -= 1
        self._num_finished += not self._unfinished[micro]
        for successor, delay in self._template[index].successors:
            if delay:
                heapq.heappush(self._events, (self.now + delay, micro, successor, False))
            else:
                self._meet_need(micro, successor)

    def _meet_need(self, micro: int, index: int) -> None:
        self._missing[micro][index] -= 1
        if not self._missing[micro][index]:
            self._make_ready(micro, index)
