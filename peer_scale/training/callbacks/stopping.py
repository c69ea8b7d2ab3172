"""Ending a run early, on a signal or after so many minutes; all ranks stop after the same step."""

from __future__ import annotations

import signal
import time
from typing import Any

from peer_scale.training.metering import StepRecord
from peer_scale.training.trainer import Callback, Trainer


class StopAfter(Callback):
    """Asks for the end once the process has trained for `minutes`."""

    def __init__(self, minutes: float) -> None:
        self._deadline = time.monotonic() + 60 * minutes

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        trainer.wants_stop |= time.monotonic() >= self._deadline


class StopOnSignal(Callback):
    """Asks for the end when SIGTERM has come."""

    def __init__(self) -> None:
        self._received = False
        signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, *_: Any) -> None:
        self._received = True

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        trainer.wants_stop |= self._received
