"""Figures of the page: what plotly draws, over whichever axis the reader chooses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import plotly.graph_objects as go

from peer_scale.reporting import naming
from peer_scale.reporting.arms import Arm
from peer_scale.reporting.runs import AXES, Floats, Run
from peer_scale.reporting.thinning import bins, evenly, extremes, half_window, smoothed

_MOST_POINTS, _FEWEST_POINTS = 400, 24  # of a curve
_BYTES_PER_POINT = 42  # value and place of the raw and of the smoothed point, and four axes
_BYTES_OF_POINTS = 800_000
_MOST_STRETCHES = 60  # of label shares
_EXACT = ("lr", "loss_scale")  # no noise to smooth
_MARKED = ("loss", "grad_norm")  # skipped steps stand here
_SUM_OF_SHARES = 0.02  # within which of 1
_LABEL_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7")
_SHARES = {"range": [0, 1], "tickformat": ".0%"}
_UNKNOWN_LABEL, _UNKNOWN_COLOUR = "-1", "#8C8C8C"


@dataclass(frozen=True)
class Figure:
    """A figure with what the page says of it.

    Attributes:
        kind: "curve" where the reader chooses the x axis; "scores" where it is fixed.
        legend: (name, colour) of what the colours mean, where they are not the arms'.
    """

    title: str
    group: str
    plot: go.Figure
    kind: str = "curve"
    note: str = ""
    legend: tuple[tuple[str, str], ...] = ()


@dataclass
class AxisTable:
    """What the points of a run's curves may be drawn over: its rows are only those that a curve uses."""

    columns: Mapping[str, Floats]
    used: list[Any] = field(default_factory=list)

    def content(self) -> dict[str, Any]:
        """Give the values of each axis at the rows that are used, as what plotly's encoder makes small."""
        rows = self.rows()
        return {axis: self.columns[axis][rows].astype(np.float32) for axis in AXES if axis in self.columns}

    def rows(self) -> Any:
        """Give the rows that any curve uses, in order."""
        return np.unique(np.concatenate(self.used)) if self.used else np.empty(0, dtype=np.int64)


class Drawing:
    """Curves in the making: traces, and the axis tables that they share."""

    def __init__(self) -> None:
        self.tables: list[AxisTable] = []
        self._waiting: list[tuple[dict[str, Any], Any]] = []

    def table(self, columns: Mapping[str, Floats]) -> int:
        """Take up the axes of one run; gives their number."""
        self.tables.append(AxisTable(columns))
        return len(self.tables) - 1

    def trace(self, table: int, rows: Any, values: Floats, *, role: str, arm: Arm, **style: Any) -> dict[str, Any]:
        """Make a trace whose point `i` stands over row `rows[i]` of a table."""
        self.tables[table].used.append(rows)
        meta = {"table": table, "role": role, "arm": arm.number}
        made = {"type": "scatter", "y": values.astype(np.float32), "meta": meta, **style}
        self._waiting.append((meta, rows))
        return made

    def finish(self) -> None:
        """Write into each trace where its points stand in its table, now that all of the table's rows are known."""
        all_rows = [table.rows() for table in self.tables]
        for meta, rows in self._waiting:
            meta["at"] = np.searchsorted(all_rows[meta["table"]], rows).astype(np.uint32)


def curve_figures(arms: Sequence[Arm]) -> tuple[list[Figure], list[dict[str, Any]]]:
    """Draw every metric of the arms' runs over steps, tokens, FLOPs or time.

    Returns:
        The figures, whose traces have no x yet but say in `meta` which rows of which axis table it is; and the tables.
    """
    arms = [replace(arm, runs=tuple(run for run in arm.runs if run.last_step)) for arm in arms]
    arms = _with_speed_per_device([arm for arm in arms if arm.runs])
    names = _names(arms)
    curves = sum(name in run.columns for arm in arms for run in arm.runs for name in names)
    points = min(_MOST_POINTS, max(_FEWEST_POINTS, _BYTES_OF_POINTS // (_BYTES_PER_POINT * max(1, curves))))
    drawing = Drawing()
    pens = [_Pen(arm, drawing, points) for arm in arms]
    traces = [(name, [trace for pen in pens for trace in pen.draw(name)]) for name in names]
    shares = [made for pen in pens for made in pen.draw_nested()]
    drawing.finish()
    figures = [
        Figure(naming.title(name), naming.group(name), go.Figure({"data": drawn, "layout": _layout(name)}))
        for name, drawn in traces
    ]
    several = len(arms) > 1
    figures += [
        Figure(
            f"{naming.title(name)}{f': {arm.label}' if several else ''}",
            "speed" if naming.group(name) == "speed" else "labels",
            go.Figure({"data": drawn, "layout": {"yaxis": _SHARES if is_stacked else {"tickformat": "~g"}}}),
            note="Each value is the mean of its stretch of steps" + (", and over seeds." if len(arm.runs) > 1 else "."),
            legend=legend,
        )
        for name, arm, is_stacked, legend, drawn in shares
    ]
    return figures, [table.content() for table in drawing.tables]


class _Pen:
    """Draws one arm's curves."""

    def __init__(self, arm: Arm, drawing: Drawing, points: int) -> None:
        self._arm, self._drawing, self._points = arm, drawing, points
        self._tables = [drawing.table(run.columns) for run in arm.runs]
        self._mean_steps, self._mean_table = self._axes_of_mean()

    def _axes_of_mean(self) -> tuple[Floats, int | None]:
        """Take up the axes of the mean over seeds: at steps that all runs have had, with the mean tokens and time."""
        runs = self._arm.runs
        if len(runs) == 1:
            return np.empty(0), None
        begin, end = max(run.steps[0] for run in runs), min(run.last_step for run in runs)
        longest = max(runs, key=lambda run: len(run.steps)).steps
        grid = longest[(longest >= begin) & (longest <= end)]
        if len(grid) < 2:
            return np.empty(0), None
        grid = grid[np.unique(bins(len(grid) - 1, self._points // 2))]
        axes = {"step": grid}
        for axis in AXES[1:]:
            if all(axis in run.columns for run in runs):
                axes[axis] = np.mean([_between(grid, run.steps, run.columns[axis]) for run in runs], axis=0)
        return grid, self._drawing.table(axes)

    def draw(self, name: str) -> Iterable[dict[str, Any]]:
        """Give the traces of one metric, the faint ones first."""
        arm = self._arm
        is_exact = name in _EXACT
        smooth = {}
        for number, (run, table) in enumerate(zip(arm.runs, self._tables, strict=True)):
            values = run.columns.get(name)
            if values is None:
                continue
            is_sparse = 2 * np.isfinite(values).sum() < len(values)
            even = values if is_exact or is_sparse else smoothed(values, run.segments())
            smooth[number] = even
            if len(arm.runs) > 1:
                yield self._line(run, table, even, evenly(even, self._points // 2), "seed")
            elif is_sparse:
                yield self._line(run, table, values, extremes(values, self._points), "sparse")
            elif is_exact or half_window(len(values)) == 0:
                yield self._line(run, table, values, extremes(values, self._points), "only")
            else:
                yield self._line(run, table, values, extremes(values, self._points), "raw")
                yield self._line(run, table, even, evenly(even, self._points // 2), "smooth")
            yield from self._marks(run, table, name, even)
        if self._mean_table is not None and len(smooth) > 1:
            known = [(arm.runs[number].steps, values) for number, values in smooth.items()]
            mean = np.mean([_between(self._mean_steps, steps, values) for steps, values in known], axis=0)
            if np.isfinite(mean).any():
                yield self._drawing.trace(
                    self._mean_table, np.arange(len(mean)), mean, role="mean", arm=arm, **self._bold()
                )
        for run, table in zip(arm.runs, self._tables, strict=True):
            held_out = run.columns.get(f"validation_{name}")
            if held_out is not None:
                yield self._line(run, table, held_out, extremes(held_out, self._points), "held out")

    def _line(self, run: Run, table: int, values: Floats, rows: Any, role: str) -> dict[str, Any]:
        """Draw a line that is broken where the run was started again."""
        cuts = [part.start for part in run.segments()[1:]]
        gaps = [int(np.searchsorted(rows, cut)) for cut in cuts]
        gaps = [gap for gap in gaps if 0 < gap < len(rows)]
        drawn = np.insert(values[rows], gaps, math.nan)
        places = np.insert(rows, gaps, rows[[gap - 1 for gap in gaps]] if gaps else [])
        styles = {
            "raw": {"line": {"width": 1, "color": self._arm.colour}, "opacity": 0.28, "hoverinfo": "skip"},
            "seed": {"line": {"width": 1, "color": self._arm.colour}, "opacity": 0.35, "hoverinfo": "skip"},
            "sparse": {**self._bold(), "mode": "markers", "marker": {"size": 5, "color": self._arm.colour}},
            "held out": {
                **self._bold(),
                "mode": "lines+markers",
                "name": naming.plain(f"{self._arm.label}, held out"),
                "line": {"width": 1, "color": self._arm.colour, "dash": "dot"},
                "marker": {"symbol": "diamond", "size": 7, "color": self._arm.colour},
            },
        }
        style = styles.get(role, self._bold())
        return self._drawing.trace(table, places, drawn, role=role, arm=self._arm, **{"mode": "lines", **style})

    def _bold(self) -> dict[str, Any]:
        return {
            "mode": "lines",
            "name": naming.plain(self._arm.label),
            "line": {"width": 2.2, "color": self._arm.colour, "dash": self._arm.dash},
            "hovertemplate": "%{y:.4~g}",
        }

    def _marks(self, run: Run, table: int, name: str, values: Floats) -> Iterable[dict[str, Any]]:
        """Mark restarts at the first value after each, and skipped steps at the last value before them."""
        finite = np.flatnonzero(np.isfinite(values))
        if not len(finite):
            return
        begins = [part.start for part in run.segments()[1:]]
        begins = [finite[min(np.searchsorted(finite, begin), len(finite) - 1)] for begin in begins]
        marked = [("restart", "triangle-up", "started again", np.unique(np.array(begins, dtype=np.int64)))]
        if name in _MARKED and len(run.skipped):
            rows = np.flatnonzero(np.isin(run.steps, run.skipped))
            rows = rows[evenly(np.zeros(len(rows)), self._points // 2)]
            marked.append(("skipped", "x-thin", "step skipped", rows))
        for role, symbol, told, rows in marked:
            if len(rows):
                heights = values[finite[np.maximum(np.searchsorted(finite, rows, side="right") - 1, 0)]]
                size = {"size": 9, "symbol": symbol, "color": self._arm.colour}
                yield self._drawing.trace(
                    table,
                    rows,
                    heights,
                    role=role,
                    arm=self._arm,
                    mode="markers",
                    name=told,
                    marker={**size, "line": {"width": 1.5, "color": self._arm.colour}},
                    hovertemplate=f"{told}",
                )

    def draw_nested(self) -> Iterable[tuple[str, Arm, bool, tuple[tuple[str, str], ...], list[dict[str, Any]]]]:
        """Give each metric that has a value per label: stacked areas where they are shares of a whole, else lines."""
        first = self._arm.runs[0]
        for name, columns in first.nested.items():
            labels = sorted((label for label in columns if np.isfinite(columns[label]).any()), key=_place)
            totals = np.nansum([columns[label] for label in labels], axis=0)
            known = totals[totals > 0]
            is_stacked = bool(len(known)) and bool(np.abs(known - 1).max() < _SUM_OF_SHARES)
            edges = bins(len(first.steps), min(_MOST_STRETCHES, self._points // 2))
            rows = ((edges[:-1] + edges[1:] - 1) // 2).astype(np.int64)
            traces, legend = [], []
            for place, label in enumerate(labels):
                colour = _UNKNOWN_COLOUR if label == _UNKNOWN_LABEL else _LABEL_COLOURS[place % len(_LABEL_COLOURS)]
                shown = _label_name(label)
                means = self._means(name, label, edges)
                kept = np.isfinite(means)
                style: dict[str, Any] = {
                    "mode": "lines",
                    "name": naming.plain(shown),
                    "hovertemplate": "%{y:.1%}" if is_stacked else "%{y:.3~g}",
                }
                style["line"] = {"width": 0.5 if is_stacked else 2, "color": colour}
                if is_stacked:
                    style |= {"stackgroup": "one", "fillcolor": colour}
                if kept.any():
                    traces.append(
                        self._drawing.trace(
                            self._tables[0], rows[kept], means[kept], role="label", arm=self._arm, **style
                        )
                    )
                    legend.append((shown, colour))
            if traces:
                yield name, self._arm, is_stacked, tuple(legend), traces

    def _means(self, name: str, label: str, edges: Any) -> Floats:
        """Average a label's values in each stretch of steps, over the runs that have gone through it."""
        rows = []
        for run in self._arm.runs:
            column = run.nested.get(name, {}).get(label)
            if column is None:
                continue
            steps = self._arm.runs[0].steps
            places = np.searchsorted(run.steps, [*steps[edges[:-1]], steps[-1] + 1])
            rows.append([_mean(column[begin:end]) for begin, end in itertools.pairwise(places)])
        known = np.array(rows)
        counts = np.isfinite(known).sum(axis=0)
        return np.where(counts > 0, np.nansum(known, axis=0) / np.maximum(counts, 1), math.nan)


def _mean(values: Floats) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def _between(grid: Floats, steps: Floats, values: Floats) -> Floats:
    known = np.isfinite(values)
    if not known.any():
        return np.full(len(grid), math.nan)
    return np.interp(grid, steps[known], values[known], left=math.nan, right=math.nan)


def _label_name(label: str) -> str:
    if label == _UNKNOWN_LABEL:
        return "level unknown"
    return f"level {label}" if label.replace(".", "", 1).isdigit() else label


def _place(label: str) -> tuple[int, float, str]:
    """Sort labels by their number, the unknown one last."""
    try:
        return (1 if label == _UNKNOWN_LABEL else 0), float(label), label
    except ValueError:
        return 0, math.inf, label


def _names(arms: Sequence[Arm]) -> list[str]:
    """Give the metrics that are worth a figure, in order: not those that are one number all the time."""
    runs = [run for arm in arms for run in arm.runs]
    names = dict.fromkeys(name for run in runs for name in run.columns if not naming.is_count(name))
    drawn = []
    for name in names:
        if naming.base(name) != name and naming.base(name) in names:
            continue
        known = [run.columns[name][np.isfinite(run.columns[name])] for run in runs if name in run.columns]
        values = np.concatenate(known)
        if len(values) and values.min() < values.max():
            drawn.append(name)
    if "tokens_per_second_per_device" in drawn and "tokens_per_second" in drawn:
        drawn.remove("tokens_per_second")
    parts = list(naming.GROUPS)
    return sorted(drawn, key=lambda name: (parts.index(naming.group(name)), naming.order(name)))


def _with_speed_per_device(arms: Sequence[Arm]) -> list[Arm]:
    """Add the tokens per second of one device, where all runs say how many they had."""
    if not all(run.world_size and "tokens_per_second" in run.columns for arm in arms for run in arm.runs):
        return list(arms)

    def added(run: Run) -> Run:
        speed = run.columns["tokens_per_second"] / (run.world_size or 1)
        return replace(run, columns={**run.columns, "tokens_per_second_per_device": speed})

    return [replace(arm, runs=tuple(added(run) for run in arm.runs)) for arm in arms]


def _layout(name: str) -> dict[str, Any]:
    share = name in ("mfu", "fill") or name.endswith(("_accuracy", "_fraction", "_share"))
    is_large = name.endswith(("_bytes", "_per_second", "_per_device")) and not name.startswith("tflops")
    return {"yaxis": {"tickformat": ".3~%" if share else "~s" if is_large else "~g"}}
