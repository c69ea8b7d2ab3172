"""Metrics on disk: metrics.jsonl and TensorBoard. A disk that fails is told of and never ends a run."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import time
from collections import deque
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from peer_scale.errors import UserError
from peer_scale.storage import write_atomically
from peer_scale.training.complaints import RareComplaint
from peer_scale.training.run_folders import DROPPED, TENSORBOARD
from peer_scale.training.trainer import Callback, Trainer

_MAX_EVENTS_KEPT = 10_000  # steps


class MetricsFile(Callback):
    """Appends one JSON object per step to metrics.jsonl (first rank only), at once.

    What cannot be written, because the disk is full, read-only or gone, is kept and written as soon as it can be.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        """Go on after `resume_step`; OSError where the file cannot be opened."""
        self._path = path
        _keep_steps_up_to(path, resume_step)
        self._file = _Appender(path)
        self._warning = RareComplaint()

    def on_metrics(self, metrics: dict[str, Any]) -> None:
        line = json.dumps(without_nan(metrics), allow_nan=False) + "\n"
        try:
            self._file.append(line.encode())
        except OSError as error:
            waiting = f"{self._file.num_waiting} lines are kept until it can be"
            self._warning.say(f"{self._path}: cannot be written ({error.strerror}); training goes on, {waiting}")

    def on_went_back(self, step: int) -> None:
        try:
            self._file.append(b"")
            _keep_steps_up_to(self._path, step)
            self._file = _Appender(self._path)
        except OSError as error:
            self._warning.say(f"{self._path}: steps after {step} stand there twice ({error.strerror})", at_once=True)

    def on_train_end(self, trainer: Trainer) -> None:
        try:
            self._file.append(b"")
        except OSError as error:
            lost = f"the last {self._file.num_waiting} lines are lost"
            self._warning.say(f"{self._path}: cannot be written ({error.strerror}); {lost}", at_once=True)


class _Appender:
    """A file that grows by whole lines, and by those of a failed call at the next one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[bytes] = []
        self._open()

    @property
    def num_waiting(self) -> int:
        """How many lines could not be written yet."""
        return len(self._waiting)

    def append(self, line: bytes) -> None:
        """Write what waits and then `line`; raise OSError where the disk does, with nothing lost."""
        if line:
            self._waiting.append(line)
        if not self._is_in_place():
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._open()
        rest = b"".join(self._waiting)
        try:
            os.ftruncate(self._descriptor, self._size)  # a failed call may have left part of a line
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise
        self._size += sum(map(len, self._waiting))
        self._waiting.clear()

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._size = os.fstat(self._descriptor).st_size

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno in (errno.ESTALE, errno.ENOTDIR, errno.EBADF):
                return False
            raise


def _keep_steps_up_to(path: Path, step: int) -> None:
    """Move what a stopped run wrote after the checkpoint that is resumed from, and a line it did not finish, aside."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = 0
        for line in file:
            if not _is_of_step_up_to(line, step):
                break
            end += len(line)
        file.seek(end)
        dropped = file.read()
        if not dropped:
            return
        with path.with_name(DROPPED).open("ab") as others:
            others.write(dropped if dropped.endswith(b"\n") else dropped + b"\n")
            others.flush()
            os.fsync(others.fileno())
        file.truncate(end)


def _is_of_step_up_to(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def without_nan(value: Any) -> Any:
    """Put None in place of numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MonitorEvents(Callback):
    """Sends every number to DeepSpeed's monitor: TensorBoard under the log folder, and what the ds_config enables.

    Where a monitor fails, a new one is started `retry_after` seconds later and gets what the failed one did not take.
    """

    def __init__(
        self,
        log_dir: Path | None,
        ds_config: dict[str, Any],
        *,
        run: str = "",
        step: int = 0,
        retry_after: float = 30.0,
    ) -> None:
        """Start the monitors of the run of that name, which goes on after `step`; UserError where one cannot be."""
        self._retry_after = retry_after
        self._blocks = going_on_with(run, ds_config, os.environ)
        if log_dir is not None:
            here = {"enabled": True, "output_path": str(log_dir), "job_name": TENSORBOARD}
            self._blocks.setdefault("tensorboard", here)
        try:
            self._monitor: Any = self._start()
            if step:
                forget_after(self._monitor, step)
        except (ImportError, ValueError, OSError) as error:
            raise UserError(f"the ds_config's monitor cannot be started: {error}") from error
        self._enabled = self._monitor.enabled
        self._waiting: deque[list[tuple[str, float, int]]] = deque(maxlen=_MAX_EVENTS_KEPT)
        self._warning, self._next_start = RareComplaint(), 0.0

    def on_metrics(self, metrics: dict[str, Any]) -> None:
        if not self._enabled:
            return
        self._waiting.append([(f"train/{key}", value, metrics["step"]) for key, value in _flat(metrics)])
        if self._monitor is None and time.monotonic() < self._next_start:
            return
        try:
            if self._monitor is None:
                self._monitor = self._start()
            while self._waiting:
                self._monitor.write_events(self._waiting[0])
                self._waiting.popleft()
        except Exception as error:  # whatever the library behind it raises
            self._monitor, self._next_start = None, time.monotonic() + self._retry_after
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            self._warning.say(f"the monitor cannot be written to ({why}); training goes on")

    def on_went_back(self, step: int) -> None:
        self._waiting = deque((events for events in self._waiting if events[0][2] <= step), self._waiting.maxlen)
        if self._monitor is not None:
            try:
                forget_after(self._monitor, step)
            except OSError as error:
                self._warning.say(f"the monitor has steps after {step} twice ({error.strerror})", at_once=True)

    def _start(self) -> Any:
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        return MonitorMaster(get_monitor_config(self._blocks))


def going_on_with(run: str, ds_config: dict[str, Any], environ: MutableMapping[str, str]) -> dict[str, Any]:
    """Give the ds_config with what has the services on the net go on with a run that they know.

    Weights & Biases reads the name from the environment, where one that the user has set stays.
    """
    blocks = dict(ds_config)
    if run and blocks.get("wandb", {}).get("enabled"):
        environ.setdefault("WANDB_RUN_ID", run)
        environ.setdefault("WANDB_RESUME", "allow")
    if run and blocks.get("comet", {}).get("enabled"):
        blocks["comet"] = {"experiment_key": hashlib.sha256(run.encode()).hexdigest()[:40]} | blocks["comet"]
    return blocks


def forget_after(monitor: Any, step: int) -> None:
    """Take back what an earlier start told TensorBoard and CSV files of steps after `step`; OSError for the disk's."""
    writer = getattr(monitor.tb_monitor, "summary_writer", None)
    if writer is not None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # what readers take for a restart: all later steps of older files are void
        writer.file_writer.add_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
    tables = monitor.csv_monitor
    if tables is not None and tables.enabled:
        for path in sorted(Path(tables.log_dir).glob("train_*.csv")):
            header, *rows = path.read_text().splitlines() or [""]
            kept = [row for row in rows if _step_of_row(row) <= step]
            write_atomically(path, "".join(f"{line}\n" for line in (header, *kept)).encode())
            tables.filenames.append(path.stem)  # has its header


def _step_of_row(row: str) -> float:
    step = row.partition(",")[0]
    return int(step) if step.isdecimal() else math.inf


def _flat(metrics: dict[str, Any]) -> list[tuple[str, float]]:
    numbers = []
    for key, value in metrics.items():
        if isinstance(value, dict):
            numbers += [(f"{key}/{inner}", number) for inner, number in value.items() if number is not None]
        elif value is not None and key != "step":
            numbers.append((key, value))
    return numbers
