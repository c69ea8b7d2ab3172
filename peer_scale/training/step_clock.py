"""How long a rank is busy by itself in each step, as opposed to waiting for other ranks."""

from __future__ import annotations

import time
from typing import Any, TypeAlias

import torch
from torch import nn

_Moment: TypeAlias = float | torch.cuda.Event


class OwnTime:
    """A rank's own time in one step; on a GPU it can be read once the step's numbers are on the host."""

    def __init__(self, spans: list[tuple[_Moment, _Moment]]) -> None:
        self._spans = spans

    def __float__(self) -> float:
        """Give the seconds."""
        return sum(_seconds(begin, end) for begin, end in self._spans)


class StepClock:
    """Adds up the time in which a rank waits for no other.

    In a synchronous step all ranks take equally long: those that are quick wait in the collectives for those that are
    not. What tells them apart is the time before the first collective of a step (data, callbacks, a host that is held
    up), and that of the forward passes, which have none under ZeRO-1 and 2 without tensor parallelism. On a GPU the
    moments are events in its queue: the host waits for nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._has_events = device.type == "cuda"
        self._begin: _Moment | None = None
        self._spans: list[tuple[_Moment, _Moment]] = []

    def start(self) -> None:
        """Note that the rank is busy from here on."""
        if self._begin is None:
            self._begin = self._now()

    def stop(self) -> None:
        """Note that it may be waiting for others from here on."""
        if self._begin is not None:
            self._spans.append((self._begin, self._now()))
            self._begin = None

    def take(self) -> OwnTime:
        """Give what has been added up since the last call."""
        self.stop()
        spans, self._spans = self._spans, []
        return OwnTime(spans)

    def watch_forward(self, module: nn.Module) -> None:
        """Count forward passes of a module in training as the rank's own time."""
        module.register_forward_pre_hook(self._begin_forward)
        module.register_forward_hook(self._end_forward)

    def _begin_forward(self, module: nn.Module, *_: Any) -> None:
        if module.training:
            self.start()

    def _end_forward(self, module: nn.Module, *_: Any) -> None:
        if module.training:
            self.stop()

    def _now(self) -> _Moment:
        if not self._has_events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(begin: _Moment, end: _Moment) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1e3
    assert isinstance(begin, float) and isinstance(end, float), "both are of one clock"
    return end - begin
