"""Figures of an experiment: scores with their intervals, differences between arms, scores against what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from peer_scale.reporting import naming
from peer_scale.reporting.arms import Arm
from peer_scale.reporting.experiments import (
    COSTS,
    Experiment,
    Measure,
    as_float,
    confidence_interval,
    group_title,
    interval_of_mean,
)
from peer_scale.reporting.figures import Figure
from peer_scale.reporting.runs import Floats

_NOTE = "Faint: seeds. Large: their mean with its 95 % interval."


def score_figures(experiment: Experiment) -> list[Figure]:
    """Draw scores per measure, differences per pair of arms, and scores against what they have cost."""
    return [*_dots(experiment), *_differences(experiment), *_against_cost(experiment)]


def _sets(experiment: Experiment) -> list[tuple[str, list[Measure]]]:
    """Give the measures that stand on one axis: of one group, and each loss alone."""
    sets: dict[str, list[Measure]] = {}
    for measure in experiment.measures:
        group = group_title(measure.group) or "Scores"
        sets.setdefault(group if measure.is_share else f"{group}: {measure.label}", []).append(measure)
    return list(sets.items())


def _dots(experiment: Experiment) -> list[Figure]:
    figures = []
    for title, measures in _sets(experiment):
        traces, num_arms = [], len(experiment.arms)
        for place, (arm, name) in enumerate(zip(experiment.arms, experiment.names, strict=True)):
            offset = (place - (num_arms - 1) / 2) * 0.7 / max(1, num_arms)
            seeds_x: list[float] = []
            seeds_y: list[float] = []
            means: list[tuple[float, float, float]] = []
            for row, measure in enumerate(measures):
                values = experiment.scores.get(measure.name, {}).get(name, np.empty(0))
                known = values[np.isfinite(values)]
                if not len(known):
                    continue
                seeds_x += known.tolist()
                seeds_y += [row + offset] * len(known)
                means.append((float(known.mean()), row + offset, interval_of_mean(known)))
            if not means:
                continue
            meta = {"arm": arm.number, "role": "score"}
            traces.append(
                {
                    **{"type": "scatter", "mode": "markers", "x": seeds_x, "y": seeds_y, "meta": meta},
                    **{"hoverinfo": "skip", "marker": {"size": 6, "color": arm.colour, "opacity": 0.35}},
                }
            )
            x, y, half = (list(column) for column in zip(*means, strict=True))
            traces.append(
                {
                    **{
                        "type": "scatter",
                        "mode": "markers",
                        "x": x,
                        "y": y,
                        "name": naming.plain(arm.label),
                        "meta": meta,
                    },
                    "error_x": {"type": "data", "array": half, "color": arm.colour, "thickness": 1.5, "width": 3},
                    "marker": {"size": 9, "color": arm.colour, "symbol": _symbol(arm)},
                    "hovertemplate": "%{x:.4~g}",
                }
            )
        if traces:
            layout = _rows_layout([measure.label for measure in measures], len(experiment.arms))
            figures.append(Figure(title, "scores", go.Figure({"data": traces, "layout": layout}), "scores", _NOTE))
    return figures


def _symbol(arm: Arm) -> str:
    return ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon")[arm.number % 7]


def _rows_layout(labels: Sequence[str], lines: int) -> dict[str, Any]:
    """Give an axis of named rows from top to bottom, and the height that they need."""
    height = max(170, 70 + len(labels) * max(34, 15 * lines))
    ticks = [_wrapped(label) for label in labels]
    return {
        "height": height,
        "hovermode": "closest",
        "yaxis": {
            **{"tickmode": "array", "tickvals": list(range(len(labels))), "ticktext": ticks},
            **{"range": [len(labels) - 0.5, -0.5], "fixedrange": True},
        },
    }


def _wrapped(label: str, width: int = 18) -> str:
    """Break a label at spaces; plotly reads a little HTML in labels, so its characters are escaped."""
    lines = [""]
    for word in label.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "<br>".join(naming.plain(line) for line in lines)


def _differences(experiment: Experiment) -> list[Figure]:
    pairs: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    measures = {measure.name: measure for measure in experiment.measures}
    for test in experiment.tests:
        if test["measure"] in measures and as_float(test.get("difference")) is not None:
            pairs.setdefault((test["a"], test["b"]), []).append(test)
    figures = []
    for (a, b), tests in pairs.items():
        for kind in (True, False):  # losses have an axis of their own
            chosen = [test for test in tests if measures[test["measure"]].is_share == kind]
            if not chosen:
                continue
            intervals = [confidence_interval(experiment, test) for test in chosen]
            halves = [0.0 if each is None else (each[1] - each[0]) / 2 for each in intervals]
            colours = ["#0072B2" if test.get("significant") else "#8C8C8C" for test in chosen]
            trace = {
                **{"type": "scatter", "mode": "markers", "x": [float(test["difference"]) for test in chosen]},
                **{"y": list(range(len(chosen))), "hovertemplate": "%{x:.3~g} ± %{error_x.array:.2~g}<extra></extra>"},
                "meta": {"arm": None, "role": "difference"},
                "error_x": {"type": "data", "array": halves, "thickness": 1.5, "width": 4, "color": "#8C8C8C"},
                "marker": {
                    **{"size": 10, "color": colours},
                    "symbol": ["circle" if test.get("significant") else "circle-open" for test in chosen],
                },
            }
            layout = _rows_layout([_short(measures[test["measure"]]) for test in chosen], 1)
            layout["xaxis"] = {"zeroline": True, "zerolinewidth": 2, "rangemode": "tozero"}
            better = "higher" if kind else "lower"
            first, second = experiment.label(a), experiment.label(b)
            title = f"{first} minus {second}" + ("" if kind else ", losses")
            note = f"With 95 % intervals; {better} is better for {first}. Filled: significant by Holm's correction."
            figures.append(Figure(title, "differences", go.Figure({"data": [trace], "layout": layout}), "scores", note))
    return figures


def _short(measure: Measure) -> str:
    kind, _, size = measure.group.partition("-")
    if kind not in ("probe", "finetune"):
        return measure.label
    told = [*(["probe"] if kind == "probe" else []), *([f"{int(size):,}" if size.isdigit() else size] if size else [])]
    return ", ".join([measure.label, *told])


def _against_cost(experiment: Experiment) -> list[Figure]:
    """Draw a set's mean score against FLOPs and time, as the paper's Figures 2 and 3 do."""
    figures = []
    for title, measures in _sets(experiment):
        averages = [measure for measure in measures if measure.name.endswith("/average")]
        drawn = averages or measures
        if len(drawn) > 1 and drawn[0].group == "held-out":
            continue  # an accuracy and an AUC have no mean
        for cost, axis in COSTS.items():
            traces = _on_the_way(experiment, drawn) if cost == "flops_paper" else []
            traces = traces or _at_the_end(experiment, drawn, cost)
            if traces:
                x = {"title": {"text": axis, "font": {"size": 11}}, "tickformat": "~g" if cost == "wall_s" else "~s"}
                layout = {"xaxis": {**x, "nticks": 6}, "yaxis": {"tickformat": "~g"}, "hovermode": "closest"}
                told = f"{title}{', mean' if len(measures) > 1 else ''} against {'time' if cost == 'wall_s' else axis}"
                plot = go.Figure({"data": traces, "layout": layout})
                figures.append(Figure(told, "cost", plot, "scores", _NOTE))
    return figures


def _on_the_way(experiment: Experiment, measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """Draw lines through the scores of several checkpoints; nothing where only the last ones were measured."""
    traces: list[dict[str, Any]] = []
    for arm, runs in zip(experiment.arms, experiment.checkpoints, strict=True):
        lines = [_line_of(run, measures) for run in runs]
        lines = [line for line in lines if len(line) > 1]
        if not lines:
            continue
        meta = {"arm": arm.number, "role": "cost"}
        for line in lines if len(lines) > 1 else ():
            faint = {"type": "scatter", "mode": "lines", "meta": meta, "opacity": 0.35, "hoverinfo": "skip"}
            traces.append({**faint, "x": line[:, 0], "y": line[:, 1], "line": {"width": 1, "color": arm.colour}})
        shortest = min(map(len, lines))
        mean = np.mean([line[:shortest] for line in lines], axis=0)
        halves = [interval_of_mean(np.array([line[point, 1] for line in lines])) for point in range(shortest)]
        traces.append(
            {
                **{"type": "scatter", "mode": "lines+markers", "meta": meta, "name": naming.plain(arm.label)},
                **{"x": mean[:, 0], "y": mean[:, 1], "hovertemplate": "%{y:.4~g} at %{x:.3~s}"},
                "error_y": {"type": "data", "array": halves, "color": arm.colour, "width": 3, "thickness": 1},
                "line": {"width": 2.2, "color": arm.colour, "dash": arm.dash},
                "marker": {"size": 8, "color": arm.colour, "symbol": _symbol(arm)},
            }
        )
    return traces


def _line_of(checkpoints: Sequence[Mapping[str, Any]], measures: Sequence[Measure]) -> Floats:
    """Give FLOPs and mean score of each checkpoint that has all scores, shape [checkpoints, 2]."""
    points = []
    for each in checkpoints:
        scores = [as_float(each["scores"].get(measure.name)) for measure in measures]
        known = [score * m.factor for score, m in zip(scores, measures, strict=True) if score is not None]
        flops = as_float(each.get("train_flops"))
        if flops is not None and len(known) == len(measures):
            points.append((flops, float(np.mean(known))))
    return np.array(points, dtype=np.float64).reshape(-1, 2)


def _at_the_end(experiment: Experiment, measures: Sequence[Measure], cost: str) -> list[dict[str, Any]]:
    """Draw a point per seed, and their mean."""
    traces: list[dict[str, Any]] = []
    for arm, name, costs in zip(experiment.arms, experiment.names, experiment.costs, strict=True):
        rows = [experiment.scores.get(measure.name, {}).get(name, np.empty(0)) for measure in measures]
        paid = costs[cost] / (3600 if cost == "wall_s" else 1)
        if any(len(row) != len(paid) for row in rows):
            continue
        mean = np.mean(rows, axis=0)
        known = np.isfinite(mean) & np.isfinite(paid)
        if not known.any():
            continue
        style = {"type": "scatter", "mode": "markers", "meta": {"arm": arm.number, "role": "cost"}}
        faint = {"size": 6, "color": arm.colour, "opacity": 0.35}
        half = interval_of_mean(mean[known])
        traces.append({**style, "x": paid[known], "y": mean[known], "marker": faint, "hoverinfo": "skip"})
        traces.append(
            {
                **{**style, "name": naming.plain(arm.label)},
                **{"x": [float(paid[known].mean())], "y": [float(mean[known].mean())]},
                "error_y": {"type": "data", "array": [half], "color": arm.colour, "width": 4},
                "marker": {"size": 10, "color": arm.colour, "symbol": _symbol(arm)},
                "hovertemplate": "%{y:.4~g} at %{x:.3~s}",
            }
        )
    return traces
