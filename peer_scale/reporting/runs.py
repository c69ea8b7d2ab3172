"""Reading what runs have written: metrics, configuration, starts, summary."""

from __future__ import annotations

import itertools
import json
import math
import re
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peer_scale.errors import UserError
from peer_scale.settings import yaml_text
from peer_scale.storage import read_json_lines, read_json_object

METRICS, RUN_YAML, STARTS, SUMMARY, RESULTS = (
    *("metrics.jsonl", "run.yaml", "starts.jsonl", "summary.json"),
    "results.json",  # of a fine-tuning
)
AXES = ("step", "tokens", "train_flops", "time_s")
_SHARE_AT_THE_END = 0.02  # of the steps, whose mean is a run's last value
_DEEPEST_RESULTS = 4  # folders below a run's

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """A fine-tuning of one checkpoint: mean score per task, and the step of the checkpoint where it is known."""

    name: str
    step: int | None
    tasks: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """One run: a value per step of everything that was measured, NaN where there is none.

    Attributes:
        columns: a float64 array per metric, all as long as `columns["step"]`, which rises.
        nested: metrics with a value per label, as columns again.
        restarts: steps after which the run was started again.
        unread: lines of metrics.jsonl that are no records.
    """

    name: str
    folder: Path | None
    columns: Mapping[str, Floats]
    nested: Mapping[str, Mapping[str, Floats]] = field(default_factory=dict)
    restarts: tuple[int, ...] = ()
    unread: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    starts: tuple[Mapping[str, Any], ...] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    scores: tuple[Scores, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> Floats:
        """The numbers of the steps that there are, shape [records]."""
        return self.columns["step"]

    @property
    def last_step(self) -> int:
        """The last step, 0 where there is none."""
        return int(self.steps[-1]) if len(self.steps) else 0

    @property
    def wanted_steps(self) -> int | None:
        """How many steps the run was to have."""
        wanted = section(self.config, "training").get("train_iters")
        return wanted if isinstance(wanted, int) else None

    @property
    def is_whole(self) -> bool:
        """Whether the run has reached its last step."""
        return self.last_step > 0 and self.last_step >= (self.wanted_steps or 0)

    @property
    def seed(self) -> Any:
        """The seed, None where it is not known."""
        return self.config.get("seed", self.provenance.get("seed"))

    @property
    def world_size(self) -> int | None:
        """Devices of the last start, None where they are not known."""
        size = self.starts[-1].get("world_size") if self.starts else None
        return size if isinstance(size, int) and size > 0 else None

    @property
    def skipped(self) -> Floats:
        """Steps without an update: where their count rises, or in older files where the gradient has no norm."""
        count = self.columns.get("skipped_steps")
        if count is not None:
            before = count[0] if self.steps[0] > 1 else 0
            return self.steps[np.diff(count, prepend=before) > 0]
        norms = self.columns.get("grad_norm")
        if norms is None or not np.isfinite(norms).any():
            return np.empty(0)
        return self.steps[~np.isfinite(norms)]

    def segments(self) -> list[slice]:
        """Give the stretches of records between restarts."""
        cuts = [int(np.searchsorted(self.steps, step, side="right")) for step in self.restarts]
        edges = sorted({0, len(self.steps), *cuts})
        return [slice(begin, end) for begin, end in itertools.pairwise(edges)]

    def last(self, name: str) -> float | None:
        """Give the mean of a metric's values over the last steps, or of a validation the last; None without any."""
        column = self.columns.get(name)
        if column is None:
            return None
        if name.startswith("validation_"):
            values = column[np.isfinite(column)][-1:]
        else:
            values = column[-num_last_steps(len(column)) :]
            values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else None


def num_last_steps(num_steps: int) -> int:
    """Over how many steps a last value is averaged: one step alone is mostly noise."""
    return max(1, min(200, round(_SHARE_AT_THE_END * num_steps)))


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Give a section of a configuration, empty where there is none."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def find_runs(path: Path) -> list[Path]:
    """Give the log folders in `path`, itself included; UserError where there are none."""
    if path.is_file() and path.name == METRICS:
        return [path.parent]
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a --log-dir, a folder that holds some, or an experiment's")
    found = sorted(_folders_with(path, METRICS)) or sorted(_folders_with(path, RESULTS))
    if not found:
        raise UserError(f"{path}: holds no {METRICS}, no experiment.json and no {RESULTS}")
    return found


def _folders_with(path: Path, name: str) -> Iterable[Path]:
    """Walk down to folders that hold `name`; what a run has set aside, and what is hidden, is passed over."""
    if (path / name).is_file():
        yield path
        return
    try:
        inner = [each for each in path.iterdir() if each.is_dir() and not each.is_symlink()]
    except OSError:
        return
    for each in inner:
        if not each.name.startswith(".") and not re.fullmatch(r"earlier_\d+", each.name):
            yield from _folders_with(each, name)


def read_run(folder: Path, name: str) -> Run:
    """Read one log folder; UserError where its metrics cannot be read."""
    columns, nested, rollbacks, unread = _read_metrics(folder / METRICS)
    starts = read_json_lines(folder / STARTS)
    began = [start.get("step") for start in starts[1:]]
    after = {step for step in began if isinstance(step, int)} | rollbacks
    last = columns["step"][-1] if len(columns["step"]) else 0
    return Run(
        name=name,
        folder=folder,
        columns=columns,
        nested=nested,
        restarts=tuple(sorted(step for step in after if 0 < step < last)),
        unread=unread,
        config=_read_config(folder / RUN_YAML),
        starts=tuple(starts),
        summary=read_json_object(folder / SUMMARY) or {},
        scores=tuple(_read_scores(folder)),
    )


def run_of_curve(name: str, curve: Iterable[Mapping[str, Any]], **more: Any) -> Run:
    """Make a run of the points of a curve that an experiment has kept."""
    reader = _Records()
    for record in curve:
        reader.add(record)
    columns, nested = reader.columns()
    return Run(name=name, folder=None, columns=columns, nested=nested, **more)


class _Records:
    """Records on their way into columns; a step that comes again takes back itself and all after it."""

    def __init__(self) -> None:
        self._flat: dict[str, array[float]] = {"step": array("d")}
        self._nested: dict[str, dict[str, array[float]]] = {}
        self.rollbacks: set[int] = set()

    def add(self, record: Mapping[str, Any]) -> bool:
        """Take a record; False where it has no step."""
        step = record.get("step")
        if not isinstance(step, (int, float)) or isinstance(step, bool) or not math.isfinite(step):
            return False
        steps = self._flat["step"]
        if steps and step <= steps[-1]:
            self._roll_back(step)
        row = len(steps)
        for key, value in record.items():
            if isinstance(value, dict):
                columns = self._nested.setdefault(key, {})
                for label, number in value.items():
                    _put(columns, label, row, number)
            else:
                _put(self._flat, key, row, value)
        return True

    def _roll_back(self, step: float) -> None:
        steps = self._flat["step"]
        keep = int(np.searchsorted(np.array(steps), step))
        self.rollbacks = {each for each in self.rollbacks if each < step} | {int(step) - 1}
        for columns in (self._flat, *self._nested.values()):
            for column in columns.values():
                del column[keep:]

    def columns(self) -> tuple[dict[str, Floats], dict[str, dict[str, Floats]]]:
        """Give all columns, padded to the same length, without those that hold no number."""
        length = len(self._flat["step"])
        flat = {key: _padded(column, length) for key, column in self._flat.items()}
        if "time_s" not in flat and "step_time_s" in flat:
            flat["time_s"] = np.cumsum(np.nan_to_num(flat["step_time_s"]))
        nested = {
            key: {label: _padded(column, length) for label, column in columns.items()}
            for key, columns in self._nested.items()
        }
        return (
            {key: column for key, column in flat.items() if key == "step" or np.isfinite(column).any()},
            {key: columns for key, columns in nested.items() if any(np.isfinite(c).any() for c in columns.values())},
        )


def _put(columns: dict[str, array[float]], key: str, row: int, value: Any) -> None:
    if not isinstance(value, (int, float)):
        return
    column = columns.get(key)
    if column is None:
        column = columns[key] = array("d")
    if len(column) < row:
        column.extend([math.nan] * (row - len(column)))
    try:
        column.append(value)
    except OverflowError:  # an integer beyond all doubles
        column.append(math.nan)


def _padded(column: array[float], length: int) -> Floats:
    values = np.full(length, math.nan)
    values[: len(column)] = column
    values[~np.isfinite(values)] = math.nan
    return values


def _read_metrics(path: Path) -> tuple[dict[str, Floats], dict[str, dict[str, Floats]], set[int], int]:
    records, unread = _Records(), 0
    try:
        with path.open("rb") as file:
            for line in file:
                record = _parsed(line)
                if record is None or not records.add(record):
                    unread += bool(line.strip())
    except FileNotFoundError:
        pass  # a folder of scores alone
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return (*records.columns(), records.rollbacks, unread)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = yaml_text.load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_scores(folder: Path) -> list[Scores]:
    found = []
    paths = sorted(path for depth in range(_DEEPEST_RESULTS) for path in folder.glob("*/" * depth + RESULTS))
    for path in paths:
        content = read_json_object(path) or {}
        tasks = {name: task for name, task in section(content, "tasks").items() if isinstance(task, dict)}
        if tasks:
            where = f"{path.parent.relative_to(folder)} {content.get('model', '')}"
            named = re.search(r"step[_-]?0*(\d+)", where)
            found.append(Scores(path.parent.name, int(named[1]) if named else None, tasks))
    return found
