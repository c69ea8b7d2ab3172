"""Ending a run early, on a signal or after so many minutes; all ranks stop after the same step."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

from peer_scale.errors import StoppedEarly
from peer_scale.training.metering import StepRecord
from peer_scale.training.trainer import Callback, Trainer

_SECONDS_OF_ONE_INTERRUPT = 2.0


class StopAfter(Callback):
    """Asks for the end once the process has trained for `minutes`."""

    def __init__(self, minutes: float) -> None:
        self._deadline = time.monotonic() + 60 * minutes

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        trainer.wants_stop |= time.monotonic() >= self._deadline


class StopSignals:
    """Has SIGTERM and SIGUSR1 end the run in order: between two steps, or at once as long as no step has begun.

    Clusters send them before they take the nodes away. A context, in the main thread; elsewhere nothing is changed.
    """

    _NUMBERS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, *, active: bool = True) -> None:
        self.received: str | None = None
        self.training = False
        self._active = active
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if self._active and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in self._NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: Any) -> None:
        self.received = signal.Signals(number).name
        if not self.training:
            raise StoppedEarly(f"stopped by {self.received} before the first step: the same command goes on")


class StopOnSignal(Callback):
    """Asks for the end when one of the signals has come."""

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals
        signals.training = True

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        trainer.wants_stop |= self._signals.received is not None


class StopOnInterrupt(Callback):
    """Asks for the end at the first Ctrl-C and raises KeyboardInterrupt once all is saved; the last of the callbacks.

    A second Ctrl-C ends the process at once. Launchers pass on the one that they got themselves, so what comes within
    two seconds counts as the first; nor may the SIGTERM that they send next cut the save short.
    """

    def __init__(self, save: Path | None) -> None:
        self._save = save
        self._received_at: float | None = None
        self._is_installed = threading.current_thread() is threading.main_thread()
        if self._is_installed:
            self._previous = signal.signal(signal.SIGINT, self._remember)

    def _remember(self, *_: Any) -> None:
        now = time.monotonic()
        if self._received_at is None:
            self._received_at = now
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif now - self._received_at > _SECONDS_OF_ONE_INTERRUPT:
            raise KeyboardInterrupt

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        trainer.wants_stop |= self._received_at is not None

    def on_train_end(self, trainer: Trainer) -> None:
        if self._is_installed:
            signal.signal(signal.SIGINT, self._previous)
        if self._received_at is not None:
            kept = f"saved in {self._save}" if self._save else "nothing was saved, for want of --save"
            raise KeyboardInterrupt(f"interrupted after step {trainer.progress.step}: {kept}")
