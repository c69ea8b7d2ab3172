"""Two actions in turns: how long each takes, and what memory it needs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from bench_memory import working_memory

B = TypeVar("B")


class Action(Protocol):
    """What is timed; called once to warm up, once for its memory, then once in each pair."""

    def __call__(self) -> object: ...

    def prepare(self) -> None:
        """Do what belongs to each call and is not timed."""

    def memory(self) -> int | None:
        """Return the bytes that one call needs beyond what is there before it; None where nobody tells."""

    def close(self) -> None:
        """Let go of what the action holds; it is not called again."""


@dataclass(frozen=True)
class Here:
    """An action of this process.

    Attributes:
        action: what is timed.
        device: what it computes on.
        before: what belongs to each call and is not timed.
    """

    action: Callable[[], object]
    device: torch.device
    before: Callable[[], object] = lambda: None

    def __call__(self) -> None:
        self.action()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def prepare(self) -> None:
        self.before()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> int | None:
        return working_memory(self.action, self.device)

    def close(self) -> None:
        pass


def over_batches(step: Callable[[B], object], batches: Sequence[B]) -> Callable[[], object]:
    """Give a step over the batches in turns. The first one is met twice, in the call for memory too."""
    order = itertools.chain(batches[:1], itertools.cycle(batches))
    return lambda: step(next(order))


def measured(ours: Action, peer: Action, repeats: int) -> tuple[list[tuple[float, float]], int | None, int | None]:
    """Warm both up, see what memory each needs, and return the seconds of each in turns, with the bytes of each."""
    for action in (ours, peer):
        seconds(action)
    sizes = []
    for action in (ours, peer):
        action.prepare()
        sizes.append(action.memory())
    return [(seconds(ours), seconds(peer)) for _ in range(repeats)], sizes[0], sizes[1]


def seconds(action: Action) -> float:
    """Time a call."""
    action.prepare()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
