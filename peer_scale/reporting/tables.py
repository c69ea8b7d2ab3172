"""Tables of the page: results over seeds, differences of configuration, where the numbers come from."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import numpy as np

from peer_scale.reporting import naming
from peer_scale.reporting.arms import Arm, differences
from peer_scale.reporting.runs import Run, section

_OF_RESULT = ("_loss", "_accuracy", "_auc")
_SEEDS = (
    "Mean ± standard deviation over seeds. Runs that did not reach their last step are counted, and left out of the "
    "mean where others did."
)
_LAST = "A value is the last validation, or the mean of the last 2 % of the steps (at most 200)."
_MOST_COLUMNS = 10
_MOST_COLUMNS_OF_TURNED = 6
LONG = 24
"""More rows than these are folded up."""
_PARTS = {
    "start": "starting",
    "load": "loading",
    "train": "training",
    "validation": "validation",
    "save": "saving",
    "lost": "steps done again",
    "down": "between starts",
}


@dataclass(frozen=True)
class Table:
    """A table with a header for each column and each row; cells are text, and not yet escaped."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    name: str  # of the file in which it is downloaded
    note: str = ""
    colours: tuple[str, ...] = ()  # of the rows, where these are arms
    is_turned: bool = False  # rows are columns, and `colours` theirs

    @property
    def is_long(self) -> bool:
        """Whether it is folded up until the reader asks for it."""
        return len(self.rows) > LONG

    def turned_if_wide(self) -> Table:
        """Give the table with rows and columns changed, where it has so few rows that it is easier to read then."""
        if len(self.rows) > _MOST_COLUMNS_OF_TURNED or len(self.rows) >= len(self.header) - 1:
            return self
        header, *rows = zip(self.header, *self.rows, strict=True)
        return replace(self, header=tuple(header), rows=tuple(rows), is_turned=True)


def is_result(name: str) -> bool:
    """Say whether a metric's last value belongs into the table of results."""
    return naming.base(name) == "loss" or name.endswith(_OF_RESULT)


def results(arms: Sequence[Arm]) -> Table:
    """Tabulate each arm's last values, mean and deviation over its runs."""
    runs = [run for arm in arms for run in arm.runs]
    found = dict.fromkeys(name for run in runs for name in run.columns if is_result(name))
    names = sorted(found, key=lambda name: naming.order(naming.base(name)))
    if len(arms) == 1:
        return _result_of_one(arms[0], names)
    names = sorted(names, key=lambda name: name == naming.base(name))[:_MOST_COLUMNS]
    rows = tuple(
        (
            *(arm.label, _runs_told(arm)),
            *(mean_and_deviation(arm.values(name)) for name in names),
            *(cost for _, cost in _costs(arm)),
        )
        for arm in arms
    )
    header = ("", "runs", *map(naming.title, names), *(label for label, _ in _costs(arms[0]))) if arms else ("",)
    colours = tuple(arm.colour for arm in arms)
    return Table("Results", header, rows, "results", f"{_SEEDS} {_LAST}", colours).turned_if_wide()


def _result_of_one(arm: Arm, names: Sequence[str]) -> Table:
    """Tabulate one arm's last values in training beside those on held-out text."""
    bases = dict.fromkeys(map(naming.base, names))
    rows = [(naming.title(base), *(_value(arm, name) for name in (base, f"validation_{base}"))) for base in bases]
    if len(arm.runs) > 1:
        rows += [("Runs", _runs_told(arm), ""), *((label, cost, "") for label, cost in _costs(arm))]
    if all(held_out in ("–", "") for _, _, held_out in rows):
        return Table("Result", ("", "training"), tuple(row[:2] for row in rows), "results", _LAST)
    note = _LAST if len(arm.runs) == 1 else f"{_SEEDS} {_LAST}"
    return Table("Result", ("", "training", "held out"), tuple(rows), "results", note)


def _value(arm: Arm, name: str) -> str:
    return mean_and_deviation(arm.values(name))


def _costs(arm: Arm) -> tuple[tuple[str, str], ...]:
    return (
        ("tokens", _mean_count(arm, "tokens", naming.scaled)),
        ("FLOPs (paper's accounting)", _mean_count(arm, "train_flops", naming.number)),
        ("training time", _mean_count(arm, "time_s", naming.span)),
    )


def mean_and_deviation(values: Any, digits: int = 4) -> str:
    """Write a mean and the deviation of the sample, the latter where there are several values."""
    if not len(values):
        return "–"
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return naming.spread(float(np.mean(values)), deviation, digits)


def _runs_told(arm: Arm) -> str:
    if len(arm.runs) == 1:
        run = arm.runs[0]
        return "1" if run.is_whole else f"1, stopped at step {run.last_step:,} of {run.wanted_steps or 0:,}"
    return f"{len(arm.runs)}" + (f", {arm.num_unfinished} not finished" if arm.num_unfinished else "")


def _lasts(arm: Arm, name: str) -> list[float]:
    columns = (run.columns.get(name) for run in arm.counted)
    return [float(np.nanmax(column)) for column in columns if column is not None and np.isfinite(column).any()]


def _mean_count(arm: Arm, name: str, written: Callable[[float], str]) -> str:
    values = _lasts(arm, name)
    return written(float(np.mean(values))) if values else "–"


def configuration_differences(arms: Sequence[Arm]) -> Table | None:
    """Tabulate only the keys in which the arms differ; None where there is one arm."""
    if len(arms) < 2:
        return None
    rows = tuple((each.key, *each.values) for each in differences(arms))
    note = "All other settings are the same." if rows else "The runs' configurations are the same, or not recorded."
    return Table("What differs", ("setting", *(arm.label for arm in arms)), rows, "differences", note)


def provenance(runs: Sequence[Run]) -> Table:
    """Tabulate what each run was made of and on."""
    rows = [_provenance_of(run) for run in runs]
    keys = dict.fromkeys(key for row in rows for key in row)
    return Table(
        "Where the numbers come from",
        ("run", *keys),
        tuple((run.name, *(row.get(key, "–") for key in keys)) for run, row in zip(runs, rows, strict=True)),
        "provenance",
    ).turned_if_wide()


def _provenance_of(run: Run) -> dict[str, str]:
    start = run.starts[-1] if run.starts else run.provenance
    versions = section(start, "versions")
    told = {
        "seed": "–" if run.seed is None else str(run.seed),
        "steps": f"{run.last_step:,}" + ("" if run.is_whole else f" of {run.wanted_steps or 0:,}"),
        "starts": str(max(len(run.starts), len(run.restarts) + 1)),
        "skipped steps": str(len(run.skipped)),
    }
    if run.unread:
        told["unreadable lines"] = str(run.unread)
    if isinstance(begun := (run.starts[0] if run.starts else {}).get("unix_time"), (int, float)):
        told["begun"] = datetime.datetime.fromtimestamp(begun, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    if start.get("commit"):
        told["commit"] = f"{str(start['commit'])[:12]}{' with changes' if start.get('dirty') else ''}"
    devices = start.get("devices") or start.get("device")
    if devices:
        names = dict.fromkeys(map(str, devices if isinstance(devices, list) else [devices]))
        told["devices"] = f"{run.world_size} × {', '.join(names)}" if run.world_size else ", ".join(names)
    if hosts := start.get("hosts") or start.get("host"):
        told["hosts"] = ", ".join(map(str, hosts)) if isinstance(hosts, list) else str(hosts)
    if known := {name: version for name, version in versions.items() if version}:
        told["versions"] = ", ".join(f"{name} {version}" for name, version in known.items())
    return told


def time_spent(runs: Sequence[Run]) -> Table | None:
    """Tabulate what the runs' time went to; None where no run has recorded it."""
    told = [run for run in runs if section(run.summary, "parts_s")]
    if not told:
        return None
    rows = []
    for run in told:
        parts, goodput = section(run.summary, "parts_s"), run.summary.get("goodput")
        cells = [naming.span(parts[key]) if _is_number(parts.get(key)) else "–" for key in _PARTS]
        wall = run.summary.get("wall_s")
        rows.append(
            (
                run.name,
                f"{goodput:.1%}" if _is_number(goodput) else "–",
                naming.span(wall) if _is_number(wall) else "–",
                *cells,
            )
        )
    return Table(
        "Where the time went",
        ("run", "goodput", "in all", *_PARTS.values()),
        tuple(rows),
        "time",
        "Goodput: share of training.",
    )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def fine_tunings(runs: Sequence[Run]) -> Table | None:
    """Tabulate the scores of the runs' checkpoints: mean ± deviation (n, failed); None where there are none."""
    found = [(run, scores) for run in runs for scores in run.scores]
    if not found:
        return None
    tasks = dict.fromkeys(task for _, scores in found for task in scores.tasks)
    rows = []
    for run, scores in found:
        name = run.name if scores.name == run.name else f"{run.name}: {scores.name}"
        rows.append((name, *(task_score(scores.tasks.get(task)) for task in tasks)))
    return Table(
        "Fine-tuning",
        ("checkpoint", *tasks),
        tuple(rows),
        "fine_tuning",
        "Mean ± standard deviation over fine-tunings (how many; failed ones are in the mean).",
    )


def task_score(task: Mapping[str, Any] | None) -> str:
    """Write a task's mean score with its deviation, the number of fine-tunings, and how many failed."""
    if task is None or not _is_number(task.get("mean")):
        return "–"
    deviation = task.get("std") if _is_number(task.get("std")) and (task.get("n") or 0) > 1 else None
    failed = f", {task['failed']} failed" if task.get("failed") else ""
    return f"{naming.spread(task['mean'], deviation)} ({task.get('n', 1)}{failed})"
