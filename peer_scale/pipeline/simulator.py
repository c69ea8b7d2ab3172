"""Executes a schedule on cost figures instead of ranks: how long it takes, who idles, what is held in memory.

A stage does one thing at a time, in list order. Sends cost nothing and do not wait; a receive waits for the message,
which is under way for `Costs.latency`. A channel from one stage to another has no tags: it delivers in order. What real
devices and their communicators add to this is in `ordering.py`.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from peer_scale.objectives.graph import Graph
from peer_scale.pipeline.costs import Costs, peak_activations
from peer_scale.pipeline.dataflow import needs, sends, stage_work
from peer_scale.pipeline.instructions import (
    Backward,
    Channel,
    Compute,
    Instruction,
    Message,
    OptimizerStep,
    PostRecv,
    Recv,
    Send,
)
from peer_scale.pipeline.schedule import Schedule

# messages under way, with the time they arrive
_Channels: TypeAlias = defaultdict[Channel, deque[tuple[Message, int]]]


class ScheduleError(RuntimeError):
    """A schedule that real ranks could not run; the message says where and why."""


@dataclass(frozen=True)
class Executed:
    """A piece of work with its begin and end, in the unit of the costs."""

    start: int
    end: int
    work: Compute


@dataclass(frozen=True)
class Simulation:
    """What came out; times and activations in the units of the costs, an entry a stage."""

    makespan: int
    busy: tuple[int, ...]
    peak_activations: tuple[int, ...]
    peak_micro_batches: tuple[int, ...]
    executed: tuple[tuple[Executed, ...], ...]

    @property
    def bubble_share(self) -> float:
        """Share of the step's time that the busiest stage idles: what a better schedule could still gain."""
        return 1 - max(self.busy) / self.makespan

    @property
    def mean_idle_share(self) -> float:
        """Share of all stages' time that is idle; what the stages' imbalance costs is in it."""
        return 1 - sum(self.busy) / (len(self.busy) * self.makespan)


def simulate(schedule: Schedule, costs: Costs | None = None) -> Simulation:
    """Run the schedule; `costs` are the placement's where None.

    Raises:
        ScheduleError: Stages wait for each other in a circle; work begins whose input is not there or whose
            activations are gone; a message is not the next one that its channel delivers or for which a receive has
            been posted.
    """
    costs = costs or schedule.placement.costs
    channels: _Channels = defaultdict(deque)
    stages = [_StageRun(schedule, stage, costs) for stage in range(len(schedule.stages))]
    while any(stage.advance(channels) for stage in stages):
        pass
    waiting = [f"stage {stage.index} waits for {stage.current}" for stage in stages if not stage.is_finished]
    if waiting:
        raise ScheduleError(f"deadlock: {'; '.join(waiting)}")
    never_received = [message for queue in channels.values() for message, _ in queue]
    if never_received:
        raise ScheduleError(f"sent, but never received: {never_received[0]}")
    never_sent = [message for stage in stages for message in stage.posted]
    if never_sent:
        raise ScheduleError(f"receive posted, but never waited for: {never_sent[0]}")
    orders = [[done.work for done in stage.executed] for stage in stages]
    return Simulation(
        makespan=max(stage.clock for stage in stages),
        busy=tuple(sum(done.end - done.start for done in stage.executed) for stage in stages),
        peak_activations=tuple(peak_activations(costs, stage, order) for stage, order in enumerate(orders)),
        peak_micro_batches=tuple(_peak_micro_batches(schedule.placement.graph, order) for order in orders),
        executed=tuple(tuple(stage.executed) for stage in stages),
    )


def validate(schedule: Schedule) -> None:
    """Prove that real ranks can run the schedule to its end, and that it is the whole step.

    Raises:
        ScheduleError: As `simulate`; or a stage's work on a micro-batch is missing or not its own; or the optimizer
            step is not there once, at the end.
    """
    for stage, instructions in enumerate(schedule.stages):
        expected = {
            work for micro in range(schedule.num_micro_batches) for work in stage_work(schedule.placement, stage, micro)
        }
        found = {one for one in instructions if not isinstance(one, Send | PostRecv | Recv | OptimizerStep)}
        for problem, works in (("does not belong here", found - expected), ("is missing", expected - found)):
            if works:
                raise ScheduleError(f"stage {stage}: {min(map(str, works))} {problem}")
        if [index for index, one in enumerate(instructions, 1) if one == OptimizerStep()] != [len(instructions)]:
            raise ScheduleError(f"stage {stage}: the optimizer step must be there once, at the end")
    simulate(schedule)


class _StageRun:
    """One stage on its way through its list."""

    def __init__(self, schedule: Schedule, index: int, costs: Costs) -> None:
        self.index = index
        self.clock = 0
        self.executed: list[Executed] = []
        self._placement, self._instructions, self._costs = schedule.placement, schedule.stages[index], costs
        self._position = 0
        self._posted: defaultdict[int, deque[Message]] = defaultdict(deque)
        self._done: set[Compute] = set()
        self._received: set[Message] = set()
        self._unsent: set[Message] = set()

    @property
    def is_finished(self) -> bool:
        return self._position == len(self._instructions)

    @property
    def current(self) -> Instruction:
        return self._instructions[self._position]

    @property
    def posted(self) -> list[Message]:
        """Messages for which receives are posted and not waited for."""
        return [message for queue in self._posted.values() for message in queue]

    def advance(self, channels: _Channels) -> bool:
        """Go on until a message is missing or the list ends; False where not one instruction could be done."""
        start = self._position
        while not self.is_finished and self._execute(self.current, channels):
            self._position += 1
        return self._position > start

    def _execute(self, instruction: Instruction, channels: _Channels) -> bool:
        """Do one instruction; False where it has to wait."""
        if isinstance(instruction, Recv):
            return self._receive(instruction.message, channels)
        if isinstance(instruction, Send):
            self._send(instruction.message, channels)
        elif isinstance(instruction, PostRecv):
            self._posted[instruction.message.source].append(instruction.message)
        elif not isinstance(instruction, OptimizerStep):
            self._compute(instruction)
        return True

    def _receive(self, message: Message, channels: _Channels) -> bool:
        queue = channels[message.source, self.index]
        if not queue:
            return False
        delivered, arrival = queue.popleft()
        if delivered != message:
            self._fail(f"expects {message}, but the next from stage {message.source} is {delivered}")
        posted = self._posted[message.source]
        if not posted or posted.popleft() != message:
            self._fail(f"{message} is not the next from stage {message.source} for which a receive has been posted")
        self._received.add(message)
        self.clock = max(self.clock, arrival)
        return True

    def _send(self, message: Message, channels: _Channels) -> None:
        if message not in self._unsent:
            self._fail(f"has no {message} to send")
        self._unsent.remove(message)
        channels[self.index, message.destination].append((message, self.clock + self._costs.latency))

    def _compute(self, work: Compute) -> None:
        if work in self._done:
            self._fail(f"{work} is done twice")
        wanted = needs(self._placement, self.index, work)
        for missing in [*(one for one in wanted.local if one not in self._done), *wanted.messages]:
            if missing not in self._received:
                self._fail(f"{work} begins without {missing}")
        self._received.difference_update(wanted.messages)
        self._done.add(work)
        self._unsent.update(sends(self._placement, self.index, work))
        end = self.clock + self._costs.time(self.index, work)
        self.executed.append(Executed(self.clock, end, work))
        self.clock = end

    def _fail(self, why: str) -> None:
        raise ScheduleError(f"stage {self.index}, instruction {self._position}: {why}")


def _peak_micro_batches(graph: Graph, order: Sequence[Compute]) -> int:
    """Find the most micro-batches of which a stage holds any activations at once."""
    held: set[tuple[str, int]] = set()
    peak = 0
    for work in order:
        if isinstance(work, Backward):
            held.remove((work.work, work.micro))
        elif graph.work(work.work).has_backward:
            held.add((work.work, work.micro))
            peak = max(peak, len({micro for _, micro in held}))
    return peak
