"""A model of the order in which GPUs and NCCL carry out what ranks post, which finds out whether all come to an end.

The simulator lets every message go at once. On GPUs a transfer is a kernel: it takes its turn behind what was posted
before it, and it ends only when both ends have started it. Held to be true here:

- A rank's host posts one thing after another and waits for none of them.
- Computing is one stream, a queue whose entries start when the one before has ended. Each communicator is another.
- A transfer waits for all computing that was posted before it; it ends when the other end has started it too. (NCCL may
  let small ones go early; nothing may depend on that.)
- To wait for a message means that the computing that is posted afterwards waits for the transfer.

`Rules` has what depends on the machine. Each rule only makes something wait for more, so what comes to an end under
some rules does so under any that make it wait for less. `host_waits` makes everything wait for all that was posted
before it: what passes that passes however few streams, hardware queues and communicators there are.

The model is fed with what a `Messenger` posts: give it a `Recorder` as its transport.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from torch import Tensor

from peer_scale.pipeline.instructions import Channel, Compute, Message
from peer_scale.pipeline.simulator import ScheduleError


@dataclass(frozen=True)
class Rules:
    """What holds up ranks beside the order in each stream.

    Attributes:
        made_at_first_use: communicators are made at their first transfer, in which either host waits for the other.
        one_queue: all streams of a device share one hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1): an entry that
            cannot start yet holds up all that was posted after it, in whatever stream.
        host_waits: the host waits for the end of whatever it has posted.
    """

    made_at_first_use: bool = False
    one_queue: bool = False
    host_waits: bool = False


@dataclass(frozen=True)
class Transfer:
    """One end of a message's transfer."""

    message: Message
    communicator: Hashable


@dataclass(frozen=True)
class Wait:
    """What is computed afterwards waits for the message."""

    message: Message


Posted: TypeAlias = Compute | Transfer | Wait


class Recorder:
    """A `Transport` that writes down what one rank posts; `communicator` names what a message would go through."""

    def __init__(self, communicator: Callable[[Message], Hashable] = lambda message: message.channel) -> None:
        self.posted: list[Posted] = []
        self._communicator = communicator

    def compute(self, work: Compute) -> None:
        """Note that work is posted."""
        self.posted.append(work)

    def isend(self, message: Message, tensor: Tensor) -> _Request:
        """Note a transfer's beginning at its source."""
        return self._transfer(message)

    def irecv(self, message: Message, tensor: Tensor) -> _Request:
        """Note a transfer's beginning at its destination."""
        return self._transfer(message)

    def _transfer(self, message: Message) -> _Request:
        self.posted.append(Transfer(message, self._communicator(message)))
        return _Request(self, message)


@dataclass(frozen=True)
class _Request:
    recorder: Recorder
    message: Message

    def wait(self) -> None:
        self.recorder.posted.append(Wait(self.message))

    def is_completed(self) -> bool:
        return False  # the host knows nothing of what the device has done


def carry_out(ranks: Sequence[Sequence[Posted]], rules: Rules) -> None:
    """Carry out what the ranks have posted.

    Raises:
        ScheduleError: They wait for each other, or the two ends of a communicator do not post the messages of one
            direction in the same order.
    """
    communicators: defaultdict[Hashable, _Communicator] = defaultdict(_Communicator)
    devices = [_Device(index, posted, rules, communicators) for index, posted in enumerate(ranks)]
    while any(device.advance() for device in devices):
        pass
    waiting = [f"rank {device.index} at {device.current}" for device in devices if not device.is_done]
    if waiting:
        raise ScheduleError(f"deadlock: {'; '.join(waiting)}")


class _Communicator:
    """Which messages either end has started in each direction, in order, and who has come to make it."""

    def __init__(self) -> None:
        self.present: set[int] = set()
        self._started: defaultdict[Channel, defaultdict[int, list[Message]]] = defaultdict(lambda: defaultdict(list))

    def start(self, rank: int, message: Message) -> int:
        """Start a message's transfer at one end; give its number in its direction, from 1."""
        ends = self._started[message.channel]
        ends[rank].append(message)
        number = len(ends[rank])
        for other, theirs in ends.items():
            if len(theirs) >= number and theirs[number - 1] != message:
                raise ScheduleError(f"rank {rank} posts {message} where rank {other} posts {theirs[number - 1]}")
        return number

    def has_ended(self, message: Message, number: int) -> bool:
        """Say whether both ends have started the message of that number."""
        return sum(len(messages) >= number for messages in self._started[message.channel].values()) == 2


_COMPUTING: Final = "computing"
"""The stream of all computing; the others are called as their communicators."""


@dataclass(eq=False)
class _Entry:
    """An entry of a stream.

    A wait (for `awaited`) starts and ends when that has ended. A transfer that has started has its `number`.
    """

    posted: Posted
    stream: Hashable
    awaited: _Entry | None = None
    number: int = 0
    is_started: bool = False
    has_ended: bool = False


class _Device:
    """A rank's host, on its way through what it posts, and its device with what has been posted and not ended."""

    def __init__(
        self, index: int, posted: Sequence[Posted], rules: Rules, communicators: defaultdict[Hashable, _Communicator]
    ) -> None:
        self.index = index
        self._posted, self._rules, self._communicators = posted, rules, communicators
        self._position = 0
        self._streams: defaultdict[Hashable, deque[_Entry]] = defaultdict(deque)
        self._unstarted: deque[_Entry] = deque()
        self._transfers: dict[Message, _Entry] = {}
        self._last_computing: _Entry | None = None
        self._last: _Entry | None = None

    @property
    def is_done(self) -> bool:
        return self._position == len(self._posted) and not any(self._streams.values())

    @property
    def current(self) -> Posted:
        """What holds it up: the first entry that has not ended, or else what the host cannot post."""
        for queue in self._streams.values():
            if queue:
                return queue[0].posted
        return self._posted[self._position]

    def advance(self) -> bool:
        """Go on as far as possible; False where nothing could be done."""
        has_advanced = False
        while self._end_transfers() or self._start() or self._post():
            has_advanced = True
        return has_advanced

    def _post(self) -> bool:
        """Have the host post one thing; False where it waits or is through."""
        if self._position == len(self._posted):
            return False
        if self._rules.host_waits and self._last is not None and not self._last.has_ended:
            return False
        posted = self._posted[self._position]
        if isinstance(posted, Transfer):
            communicator = self._communicators[posted.communicator]
            is_first_here = self.index not in communicator.present
            communicator.present.add(self.index)
            if self._rules.made_at_first_use and len(communicator.present) < 2:
                return is_first_here
            if self._last_computing is not None:
                self._append(_Entry(posted, posted.communicator, awaited=self._last_computing))
            entry = self._transfers[posted.message] = _Entry(posted, posted.communicator)
            self._append(entry)
        elif isinstance(posted, Wait):
            entry = self._append(_Entry(posted, _COMPUTING, awaited=self._transfers[posted.message]))
            self._last_computing = entry
        else:
            self._last_computing = self._append(_Entry(posted, _COMPUTING))
        self._position += 1
        return True

    def _append(self, entry: _Entry) -> _Entry:
        self._streams[entry.stream].append(entry)
        self._unstarted.append(entry)
        self._last = entry
        return entry

    def _start(self) -> bool:
        """Start one entry; False where none can."""
        if self._rules.one_queue:
            if not self._unstarted or not self._can_start(self._unstarted[0]):
                return False
            self._start_entry(self._unstarted.popleft())
            return True
        for queue in self._streams.values():
            if queue and not queue[0].is_started and self._can_start(queue[0]):
                self._start_entry(queue[0])
                return True
        return False

    def _can_start(self, entry: _Entry) -> bool:
        if self._streams[entry.stream][0] is not entry:
            return False
        return entry.awaited is None or entry.awaited.has_ended

    def _start_entry(self, entry: _Entry) -> None:
        entry.is_started = True
        if isinstance(entry.posted, Transfer) and entry.awaited is None:
            communicator = self._communicators[entry.posted.communicator]
            entry.number = communicator.start(self.index, entry.posted.message)
        else:
            self._end(entry)

    def _end_transfers(self) -> bool:
        """End the transfers that the other end has started as well; False where there are none."""
        ended = [queue[0] for queue in self._streams.values() if queue and self._has_ended(queue[0])]
        for entry in ended:
            self._end(entry)
        return bool(ended)

    def _has_ended(self, entry: _Entry) -> bool:
        if not isinstance(entry.posted, Transfer) or not entry.number:
            return False
        return self._communicators[entry.stream].has_ended(entry.posted.message, entry.number)

    def _end(self, entry: _Entry) -> None:
        entry.has_ended = True
        assert self._streams[entry.stream].popleft() is entry, "a stream's entries end in order"
