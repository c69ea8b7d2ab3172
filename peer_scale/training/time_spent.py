"""What a process spends its time on, one thing at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Literal, TypeAlias, get_args

Part: TypeAlias = Literal["start", "load", "train", "validation", "save"]
PARTS: tuple[Part, ...] = get_args(Part)


class TimeSpent:
    """Seconds by what they were spent on; together they are the time since the process began."""

    def __init__(self, seconds_before: float = 0.0) -> None:
        """Begin with the start, so many seconds ago."""
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part: Part = "start"
        self._since = time.perf_counter() - seconds_before

    def switch(self, part: Part) -> Part:
        """Begin with another part; give the one before."""
        now = time.perf_counter()
        before, self._part = self._part, part
        self._seconds[before] += now - self._since
        self._since = now
        return before

    @contextlib.contextmanager
    def on(self, part: Part) -> Iterator[None]:
        """Count the block as a part."""
        before = self.switch(part)
        try:
            yield
        finally:
            self.switch(before)

    def seconds(self) -> dict[Part, float]:
        """Give the seconds of each part up to now."""
        self.switch(self._part)
        return dict(self._seconds)
