"""Lines that warn: on stderr, and in the rank's own log file where it has one."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time

_SECONDS_BETWEEN = 60.0
_LOGGER = logging.getLogger("peer_scale")
_LOGGER.addHandler(logging.NullHandler())  # stderr has the line already


def complain(text: str) -> None:
    """Print a line on stderr, and hand it to whoever keeps the package's log."""
    with contextlib.suppress(OSError):  # stderr may be on a disk that is full
        print(f"warning: {text}", file=sys.stderr, flush=True)
    _LOGGER.warning(text)


class RareComplaint:
    """A line of one kind, at most once a minute."""

    def __init__(self) -> None:
        self._next = -math.inf

    def say(self, text: str, *, at_once: bool = False) -> None:
        """Complain, unless the last time was just now."""
        now = time.monotonic()
        if now >= self._next or at_once:
            self._next = now + _SECONDS_BETWEEN
            complain(text)
