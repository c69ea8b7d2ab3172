"""What a run's metrics.jsonl says: totals, held-out figures, and a curve of at most 200 points."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from peer_scale.errors import UserError

MOST_POINTS: Final = 200
_CUMULATIVE = ("step", "samples", "tokens", "train_flops")
_VALIDATION = "validation_"


@dataclass(frozen=True)
class Curve:
    """A run's pre-training: totals and points; `last` has the last step's metrics."""

    steps: int
    tokens: int
    flops_paper: float
    flops_actual: float
    wall_s: float
    points: list[dict[str, Any]]
    last: dict[str, Any]


def read_curve(metrics: Path, num_devices: int) -> Curve:
    """Read a finished run's metrics.jsonl; UserError where it is not there or no line of it can be read."""
    try:
        with metrics.open(encoding="utf-8") as file:
            lines = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{metrics}: cannot be read: {error}") from None
    if not lines:
        raise UserError(f"{metrics}: is empty")
    seconds = 0.0
    actual = 0
    for line in lines:
        seconds += line["step_time_s"]
        # whole numbers, before they were divided by the time
        actual += round(line["tflops_per_device"] * 1e12 * line["step_time_s"] * num_devices)
        line["time_s"] = seconds
    last = lines[-1]
    return Curve(last["step"], last["tokens"], last["train_flops"], actual, seconds, _points(lines), last)


def look_up(metrics: Mapping[str, Any], name: str) -> float | None:
    """Find a metric by its key; a slash leads into an object: `rank_label_fractions/-1`."""
    value: Any = metrics
    for part in name.split("/"):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def held_out(last: Mapping[str, Any]) -> dict[str, Any]:
    """Give the validation's metrics of a step."""
    return {name: value for name, value in last.items() if name.startswith(_VALIDATION)}


def _points(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give one point for each of at most 200 equal parts of the run."""
    number = min(MOST_POINTS, len(lines))
    ends = [len(lines) * (index + 1) // number for index in range(number)]
    return [_point(lines[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]


def _point(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Take counts and times at the end of a part, the last validation in it, and the means of all else."""
    point: dict[str, Any] = {}
    for name in dict.fromkeys(name for line in lines for name in line):
        values = [line[name] for line in lines if line.get(name) is not None]
        if not values:
            point[name] = None
        elif name in (*_CUMULATIVE, "time_s") or name.startswith(_VALIDATION):
            point[name] = values[-1]
        elif isinstance(values[0], Mapping):
            point[name] = _means(values)
        else:
            point[name] = sum(values) / len(values)
    return point


def _means(values: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for key in dict.fromkeys(key for value in values for key in value):
        present = [value[key] for value in values if value.get(key) is not None]
        means[key] = sum(present) / len(present) if present else None
    return means
