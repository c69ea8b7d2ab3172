"""A run that does not get on ends, and says where every rank was, instead of holding its machines in silence."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from peer_scale.errors import STOPPED_EXIT_CODE
from peer_scale.training.metering import StepRecord
from peer_scale.training.run_folders import BEATS, STACKS
from peer_scale.training.trainer import Callback, Trainer

_SECONDS_BETWEEN_BEATS = 2.0
_PATIENCE = 30 * 60.0
_SLOWEST_OF = 50
_TIMES_THE_SLOWEST = 10
_SHORTEST_LIMIT = 60.0


@dataclass
class _Section:
    """What a rank is doing, and for how long, in seconds in which the process could run."""

    doing: str
    is_step: bool
    waited: float = 0.0
    begun: float = field(default_factory=time.monotonic)


class Watchdog:
    """Watches this rank from a thread while it trains; a context around the training.

    The limit is ten times the slowest of the last fifty steps, at least a minute, while a step is under way; half an
    hour in the first step and between steps, where runs are validated and saved. At the limit the stacks of all threads
    go to `stacks/rank_N.txt`, one line names the ranks that do not answer, and the process ends with exit code 75.

    Only time in which this process could run counts: one that was stopped and goes on is not to blame. Every two
    seconds the thread renews `heartbeats/rank_N.json`, by which ranks know of each other, and operators of them.
    """

    def __init__(
        self,
        folder: Path | None,
        rank: int,
        world_size: int,
        *,
        limit: float | None = None,
        interval: float = _SECONDS_BETWEEN_BEATS,
    ) -> None:
        """Watch one rank.

        Args:
            folder: what all ranks see, for signs of life and stacks; None: there is no such folder.
            rank: this one's number.
            world_size: ranks of the run.
            limit: in seconds, in place of all limits; 0 for none.
            interval: seconds between two signs of life, and between two looks.
        """
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._limit, self._interval = limit, interval
        self._steps: deque[float] = deque(maxlen=_SLOWEST_OF)
        self._section = _Section("the first step", is_step=True)
        self._end = threading.Event()
        # a disk that hangs must hold up the beats alone
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._watch, self._beat)]
        self.first, self.last = _StepEnds(self), _StepBegins(self)
        """Callbacks to stand before and after all others."""

    def __enter__(self) -> Watchdog:
        if self._folder is not None:
            with contextlib.suppress(OSError):
                (self._folder / BEATS).mkdir(parents=True, exist_ok=True)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def begin_step(self, step: int) -> None:
        """Note that a step is under way."""
        self._section = _Section(f"step {step}", is_step=True)

    def end_step(self, record: StepRecord) -> None:
        """Note that a step is done and what follows it is under way."""
        self._steps.append(time.monotonic() - self._section.begun)
        self._section = _Section(f"what follows step {record.step}", is_step=False)

    def end_training(self) -> None:
        """Note that the last step is done, and that what is left is to save."""
        self._section = _Section("the end of the run", is_step=False)

    def limit(self, is_step: bool) -> float:
        """Give the seconds that a step, or what is between two steps, may take."""
        if self._limit is not None:
            return self._limit or float("inf")
        if not is_step or not self._steps:
            return _PATIENCE
        return max(_SHORTEST_LIMIT, _TIMES_THE_SLOWEST * max(self._steps))

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._end.wait(self._interval):
            now = time.monotonic()
            section = self._section  # the main thread puts another one in its place
            section.waited += min(now - before, 2 * self._interval)
            before = now
            if section.waited > self.limit(section.is_step):
                self._give_up(section)

    def _beat(self) -> None:
        while self._folder is not None:
            with contextlib.suppress(OSError):
                self._beat_once()
            if self._end.wait(self._interval):
                break

    def _beat_once(self) -> None:
        section = self._section
        content = {"rank": self._rank, "doing": section.doing, "for_s": round(section.waited)}
        self._beat_of(self._rank).write_text(json.dumps(content))

    def _beat_of(self, rank: int) -> Path:
        assert self._folder is not None
        return self._folder / BEATS / f"rank_{rank:05d}.json"

    def _give_up(self, section: _Section) -> None:
        threading.Thread(target=self._say_where, args=(section,), daemon=True).start()
        time.sleep(self._interval)
        os._exit(STOPPED_EXIT_CODE)

    def _say_where(self, section: _Section) -> None:
        silent = self._silent_ranks()
        where = self._write_stacks()
        # one of those that are left speaks; all, where they do not know of each other
        if self._folder is None or all(rank in silent for rank in range(self._rank)):
            named = ", ".join(map(str, silent))
            who = f"no sign of life from rank {named}" if silent else "all ranks show signs of life"
            limit = self.limit(section.is_step)
            line = f"{section.doing} has taken more than {limit:.0f} s on rank {self._rank}; {who}; stacks are {where}"
            print(f"error: {line}", file=sys.stderr, flush=True)
            logging.getLogger("peer_scale").error(line)

    def _silent_ranks(self) -> list[int]:
        """List the ranks whose last sign of life is much older than this one's, as the disk's clock has it."""
        if self._folder is None:
            return []
        try:
            self._beat_once()
            own = self._beat_of(self._rank).stat().st_mtime
            beats = {rank: self._beat_of(rank) for rank in range(self._world_size)}
            oldest = own - 2.5 * self._interval
            # one that was never seen may write to a disk of its own
            return [rank for rank, beat in beats.items() if beat.exists() and beat.stat().st_mtime < oldest]
        except OSError:
            return []

    def _write_stacks(self) -> str:
        """Write where all threads of this process are; give the words that say where."""
        if self._folder is not None:
            path = self._folder / STACKS / f"rank_{self._rank:05d}.txt"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("w") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
                return f"in {path.parent}"
            except OSError:
                pass
        faulthandler.dump_traceback(all_threads=True)
        return "above"


class _StepEnds(Callback):
    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self._watchdog.end_step(record)

    def on_train_end(self, trainer: Trainer) -> None:
        self._watchdog.end_training()


class _StepBegins(Callback):
    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self._watchdog.begin_step(record.step + 1)

    def on_went_back(self, step: int) -> None:
        self._watchdog.begin_step(step + 1)
