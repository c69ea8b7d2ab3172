"""What became of a run's time over all its starts, kept in summary.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from peer_scale.checkpoints.progress import Progress
from peer_scale.storage import read_json_object, write_atomically
from peer_scale.training.time_spent import PARTS, TimeSpent

_MARKS = 200
_STATE = "for_the_next_start"
_AS_TOLD = ("train", "validation", "save", "start", "load", "lost", "down")
_DONE_AGAIN = ("train", "validation", "save")


@dataclass(frozen=True)
class Mark:
    """What had been done up to a step, without what was lost: seconds, tokens, and FLOPs of one device."""

    step: int = 0
    train: float = 0.0
    validation: float = 0.0
    save: float = 0.0
    tokens: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class _State:
    """What the next start has to know: when the first one began, until when all is counted, and the marks."""

    began: float
    until: float
    parts: dict[str, float]
    marks: tuple[Mark, ...]


class Goodput:
    """Counts a run's time by what it was spent on, over all its starts (first rank only).

    `start`, `load`, `train`, `validation` and `save` are what they were spent on; `lost` is what had been done past the
    checkpoint that a start went on from, `down` what passed between two starts. They sum to the wall time.
    """

    def __init__(
        self,
        path: Path | None,
        spent: TimeSpent,
        *,
        began: float,
        progress: Progress,
        starts: int = 1,
        last_sign: float | None = None,
    ) -> None:
        """Go on with what an earlier start left in the file.

        Args:
            path: the file; None: nothing is kept.
            spent: what this process spends its time on.
            began: unix time from which `spent` counts.
            progress: what is done, on which this start goes on.
            starts: of the run, this one included.
            last_sign: unix time at which an earlier start was last known to train.
        """
        self._path, self._spent, self._starts = path, spent, starts
        self._progress, self._flops = progress, 0.0
        self._last: dict[str, Any] = {}
        earlier = None if path is None else _read_state(path)
        if earlier is None:
            earlier = _State(began, began, {}, ())
        self._first_began = earlier.began
        self._marks = tuple(mark for mark in earlier.marks if mark.step <= progress.step)
        self._base = self._marks[-1] if self._marks else Mark()
        until = min(max(earlier.until, last_sign or 0.0), began)
        self._before = _carried_over(earlier, self._base, until)
        self._before["down"] += began - until

    def count(self, metrics: dict[str, Any]) -> None:
        """Add a step."""
        self._last = metrics
        self._flops += 1e12 * metrics["tflops_per_device"] * metrics["step_time_s"]

    def mark(self) -> None:
        """Remember what has been done up to the last step counted: it has been saved."""
        self._marks = (*self._marks, self._done())[-_MARKS:]

    def go_back(self, step: int) -> None:
        """Count as lost what has been done after a step that was saved: the run goes on from there."""
        done = self._done()
        self._marks = tuple(mark for mark in self._marks if mark.step <= step)
        kept = self._marks[-1] if self._marks else Mark()
        for part in _DONE_AGAIN:
            seconds = getattr(done, part) - getattr(kept, part)
            self._before[part] -= seconds
            self._before["lost"] += seconds
        self._flops = kept.flops - self._base.flops

    def parts(self) -> dict[str, float]:
        """Give the seconds of each part, over all starts."""
        seconds = self._spent.seconds()
        own: dict[str, float] = {part: self._before[part] + seconds[part] for part in PARTS}
        return {**own, "lost": self._before["lost"], "down": self._before["down"]}

    def describe(self) -> str:
        """Give the parts in a line, by their share of the wall time."""
        parts = self.parts()
        wall = sum(parts.values()) or 1.0
        shares = [f"{name} {parts[name] / wall:.1%}" for name in _AS_TOLD if parts[name] >= wall / 1000]
        starts = "" if self._starts == 1 else f" since the first of {self._starts} starts"
        return f"{', '.join(shares)} of {wall:,.0f} s{starts}"

    def summary(self, peak: float | None, peak_memory: float | None) -> dict[str, Any]:
        """Give the content of summary.json; `peak` is the device's in FLOP/s, `peak_memory` in bytes."""
        parts, last, done = self.parts(), self._last, self._done()
        wall = sum(parts.values())
        train = parts["train"] or float("inf")
        return {
            "steps": last.get("step", self._progress.step),
            "samples": last.get("samples", self._progress.samples),
            "tokens": last.get("tokens", self._progress.tokens),
            "train_flops": last.get("train_flops", 0.0),
            "wall_s": wall,
            "parts_s": parts,
            "goodput": parts["train"] / wall if wall else 0.0,
            "restarts": self._starts - 1,
            "skipped_steps": last.get("skipped_steps", 0),
            "tokens_per_second": done.tokens / train,
            "tflops_per_device": done.flops / train / 1e12,
            "mfu": None if peak is None else done.flops / train / peak,
            "peak_memory_bytes": peak_memory,
            "last": last,
        }

    def write(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, if it is kept, with what the next start has to know; OSError where the disk fails."""
        if self._path is None:
            return
        state = _State(self._first_began, self._first_began + summary["wall_s"], summary["parts_s"], self._marks)
        content = {**summary, _STATE: dataclasses.asdict(state)}
        write_atomically(self._path, json.dumps(content).encode(), sync=False)

    def _done(self) -> Mark:
        parts = self.parts()
        tokens = self._last.get("tokens", self._progress.tokens) - self._progress.tokens
        return Mark(
            step=self._last.get("step", self._progress.step),
            train=parts["train"],
            validation=parts["validation"],
            save=parts["save"],
            tokens=self._base.tokens + tokens,
            flops=self._base.flops + self._flops,
        )


def _carried_over(earlier: _State, base: Mark, until: float) -> dict[str, float]:
    """Give the seconds of all parts, up to `until`, when the run goes on from a mark: what was done after it is lost.

    What an earlier start did not come to write down, since it was killed, is lost too.
    """
    parts = {name: earlier.parts.get(name, 0.0) for name in (*PARTS, "lost", "down")}
    kept = {part: getattr(base, part) for part in _DONE_AGAIN}
    again = sum(parts[part] - kept[part] for part in _DONE_AGAIN)
    return {**parts, **kept, "lost": parts["lost"] + again + until - earlier.until}


def _read_state(path: Path) -> _State | None:
    """Read what an earlier start left; None where there is nothing that can be gone on with."""
    content = (read_json_object(path) or {}).get(_STATE)
    try:
        return TypeAdapter(_State).validate_python(content)
    except ValidationError:
        return None
