"""A trace of some steps, for chrome://tracing and Perfetto."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from peer_scale.training.complaints import complain
from peer_scale.training.metering import StepRecord
from peer_scale.training.trainer import Callback, Trainer

_COMMUNICATION = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel")


class Profiling(Callback):
    """Profiles the steps `first` to `last` of this rank, or as many of them as the run has, and writes their trace."""

    def __init__(self, folder: Path, rank: int, first: int, last: int, *, done: int, device: torch.device) -> None:
        """Begin at once where the first step to come is `first`.

        Args:
            folder: for the traces of all ranks.
            rank: this one's number.
            first: step to begin with.
            last: step to end with.
            done: the last step that is done.
            device: that is looked at beside the host.
        """
        self._path = folder / f"rank_{rank:05d}_steps_{first}-{last}.json.gz"
        self._first, self._last = first, last
        self._activities = [ProfilerActivity.CPU]
        self._activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._profile: Any = None
        self._begin_before(done + 1)

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step == self._last:
            self._end()
        self._begin_before(record.step + 1)

    def on_train_end(self, trainer: Trainer) -> None:
        self._end()

    def _begin_before(self, step: int) -> None:
        if step == self._first:
            self._profile = profile(activities=self._activities)
            self._profile.start()

    def _end(self) -> None:
        if self._profile is None:
            return
        found, self._profile = self._profile, None
        found.stop()
        aside = self._path.with_name(f".{self._path.name}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            found.export_chrome_trace(str(aside))
            aside.replace(self._path)
        except OSError as error:
            complain(f"{self._path}: cannot be written ({error.strerror}); training goes on")
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            return
        print(f"profile: {self._path}, {communication(found)}", flush=True)


def communication(found: Any) -> str:
    """Say how long a profile's messages between ranks took."""
    events = [event for event in found.key_averages() if event.key.startswith(_COMMUNICATION)]
    seconds = sum(max(event.cpu_time_total, event.device_time_total) for event in events) / 1e6
    calls = sum(event.count for event in events)
    return f"{seconds:.3g} s in {calls} messages between ranks"
