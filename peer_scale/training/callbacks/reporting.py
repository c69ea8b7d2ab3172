"""Metrics on disk: metrics.jsonl and TensorBoard."""

import json
import math
from pathlib import Path
from typing import Any

from peer_scale.errors import UserError
from peer_scale.storage import write_atomically
from peer_scale.training.trainer import Callback


class MetricsFile(Callback):
    """Appends one JSON object per step to metrics.jsonl (first rank only), flushed at once."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        _keep_steps_up_to(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def on_metrics(self, metrics: dict[str, Any]) -> None:
        self._file.write(json.dumps(_without_nan(metrics), allow_nan=False) + "\n")
        self._file.flush()


def _keep_steps_up_to(path: Path, step: int) -> None:
    """Drop what a stopped run wrote after the checkpoint that is resumed from, and a line it did not finish."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            break
    write_atomically(path, "".join(kept).encode())


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MonitorEvents(Callback):
    """Sends every number to DeepSpeed's monitor: TensorBoard under the log folder, and what the ds_config enables."""

    def __init__(self, log_dir: Path | None, ds_config: dict[str, Any]) -> None:
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        blocks = dict(ds_config)
        if log_dir is not None:
            blocks.setdefault("tensorboard", {"enabled": True, "output_path": str(log_dir), "job_name": "tensorboard"})
        try:
            self._monitor = MonitorMaster(get_monitor_config(blocks))
        except (ImportError, ValueError) as error:
            raise UserError(f"the ds_config's monitor cannot be started: {error}") from error

    def on_metrics(self, metrics: dict[str, Any]) -> None:
        if self._monitor.enabled:
            events = [(f"train/{key}", value, metrics["step"]) for key, value in _flat(metrics) if key != "step"]
            self._monitor.write_events(events)


def _flat(metrics: dict[str, Any]) -> list[tuple[str, float]]:
    numbers = []
    for key, value in metrics.items():
        if isinstance(value, dict):
            numbers += [(f"{key}/{inner}", number) for inner, number in value.items() if number is not None]
        elif value is not None:
            numbers.append((key, value))
    return numbers
