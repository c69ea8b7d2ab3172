"""Keeps summary.json and metrics.prom current while a run trains."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Any

import torch

from peer_scale.storage import write_atomically
from peer_scale.training.callbacks.reporting import without_nan
from peer_scale.training.callbacks.stragglers import memory_in_use
from peer_scale.training.complaints import RareComplaint
from peer_scale.training.goodput import Goodput
from peer_scale.training.metering import StepRecord
from peer_scale.training.trainer import Callback, Trainer

_SUMMARY_SECONDS = 30.0
_PROMETHEUS_SECONDS = 5.0
_PREFIX = "peer_scale_"


class RunSummary(Callback):
    """Writes summary.json at each checkpoint, every half a minute and at the end; stands after what saves."""

    def __init__(self, goodput: Goodput, device: torch.device, peak: float | None, save_interval: int | None) -> None:
        self._goodput, self._device, self._peak, self._save_interval = goodput, device, peak, save_interval
        self._warning = RareComplaint()
        self._next = -math.inf

    def on_metrics(self, metrics: dict[str, Any]) -> None:
        self._goodput.count(metrics)

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        is_saved = self._save_interval is not None and record.step % self._save_interval == 0
        if is_saved:
            self._goodput.mark()
        if is_saved or time.monotonic() >= self._next:
            self._write()

    def on_went_back(self, step: int) -> None:
        self._goodput.go_back(step)

    def on_train_end(self, trainer: Trainer) -> None:
        if trainer.run.output.save is not None:
            self._goodput.mark()
        self._write()

    def _write(self) -> None:
        self._next = time.monotonic() + _SUMMARY_SECONDS
        peak_memory, _ = memory_in_use(self._device)
        try:
            self._goodput.write(without_nan(self._goodput.summary(self._peak, peak_memory)))
        except OSError as error:
            self._warning.say(f"summary.json cannot be written ({error.strerror}); training goes on")


class PrometheusFile(Callback):
    """Writes the newest metrics as a text file for node_exporter's textfile collector, every five seconds at most."""

    def __init__(self, path: Path, model: str, goodput: Goodput) -> None:
        self._path, self._goodput = path, goodput
        self._model = re.sub(r'[\\"\n]', "_", model)
        self._warning = RareComplaint()
        self._next = -math.inf
        self._newest: dict[str, Any] = {}

    def on_metrics(self, metrics: dict[str, Any]) -> None:
        self._newest |= metrics  # some are not there in each step
        if time.monotonic() >= self._next:
            self._write()

    def on_train_end(self, trainer: Trainer) -> None:
        if self._newest:
            self._write()

    def _write(self) -> None:
        self._next = time.monotonic() + _PROMETHEUS_SECONDS
        parts = self._goodput.parts()
        more = {"seconds": parts, "last_step_unix_time": time.time()}
        try:
            write_atomically(self._path, prometheus_text({**self._newest, **more}, self._model).encode(), sync=False)
        except OSError as error:
            self._warning.say(f"{self._path}: cannot be written ({error.strerror}); training goes on")


def prometheus_text(metrics: dict[str, Any], model: str) -> str:
    """Give numbers in Prometheus' text format, those of an object with its keys as the label `of`."""
    lines = []
    for key, value in metrics.items():
        name = _PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", key)
        values = value if isinstance(value, dict) else {None: value}
        numbers = {of: number for of, number in values.items() if isinstance(number, int | float)}
        if numbers:
            lines.append(f"# TYPE {name} gauge")
        for of, number in numbers.items():
            label = "" if of is None else f',of="{of}"'
            lines.append(f'{name}{{model="{model}"{label}}} {float(number)!r}')
    return "".join(f"{line}\n" for line in lines).replace(" inf\n", " +Inf\n").replace(" -inf\n", " -Inf\n")
