"""Experiments: their arms and runs, scores with their uncertainty, and the paper's numbers beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peer_scale.errors import UserError
from peer_scale.reporting import naming
from peer_scale.reporting.arms import Arm, shown
from peer_scale.reporting.runs import METRICS, Floats, Run, read_run, run_of_curve
from peer_scale.reporting.tables import LONG, Table, mean_and_deviation
from peer_scale.storage import read_json_object

EXPERIMENT = "experiment.json"
_CONFIDENCE = 0.95
COSTS = {
    "flops_paper": "FLOPs, the paper's accounting",
    "flops_actual": "FLOPs that were done",
    "wall_s": "hours of training",
}
_KINDS = {"held-out": "Held-out text", "probe": "Linear probe", "finetune": "Fine-tuning"}
_PER_CENT = 100.0


@dataclass(frozen=True)
class Measure:
    """What arms are compared by."""

    name: str
    label: str
    group: str
    higher_is_better: bool
    metric: str

    @property
    def factor(self) -> float:
        """What its numbers are multiplied with: scores of tasks are written as papers do, times 100."""
        return 1.0 if self.group == "held-out" else _PER_CENT

    @property
    def is_share(self) -> bool:
        """Whether it lies between -1 and 1 and can stand on one axis with others; losses do not."""
        return self.higher_is_better


@dataclass(frozen=True)
class Experiment:
    """A whole comparison. `scores` has, per measure and arm's name, a score per seed, NaN where there is none yet."""

    name: str
    title: str
    sentence: str
    budget: Mapping[str, Any]
    arms: tuple[Arm, ...]
    names: tuple[str, ...]  # of the arms, as scores have them
    costs: tuple[Mapping[str, Floats], ...]  # of the arms: per kind of cost, one number per seed
    checkpoints: tuple[tuple[Sequence[Mapping[str, Any]], ...], ...]  # of the arms' runs: their scores on the way
    changes: tuple[Mapping[str, Any], ...]
    measures: tuple[Measure, ...]
    scores: Mapping[str, Mapping[str, Floats]]
    tests: tuple[Mapping[str, Any], ...]
    paper: Mapping[str, Any]
    missing: tuple[str, ...] = field(default=())

    def label(self, name: str) -> str:
        """Give an arm's label by its name."""
        return next((arm.label for arm, own in zip(self.arms, self.names, strict=True) if own == name), name)


def read_experiment(folder: Path) -> Experiment:
    """Read an experiment's folder; UserError where experiment.json is not what it must be."""
    path = folder / EXPERIMENT
    content = read_json_object(path)
    if content is None:
        raise UserError(f"{path}: cannot be read as a JSON object")
    try:
        return _experiment(folder, content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is not an experiment's: {type(error).__name__}: {error}") from None


def _experiment(folder: Path, content: Mapping[str, Any]) -> Experiment:
    arms = content["arms"]
    measures = tuple(
        Measure(
            each["name"],
            each.get("label") or each["name"],
            each.get("group") or "",
            bool(each["higher_is_better"]),
            str(each.get("metric", "")),
        )
        for each in content["measures"]
    )
    return Experiment(
        name=str(content["name"]),
        title=str(content.get("title") or content["name"]),
        sentence=str(content.get("sentence") or ""),
        budget=content.get("budget") or {},
        arms=tuple(
            Arm(
                str(arm.get("label") or arm["name"]),
                number,
                tuple(_run(folder, arm["name"], run) for run in arm["runs"]),
            )
            for number, arm in enumerate(arms)
        ),
        names=tuple(arm["name"] for arm in arms),
        costs=tuple({cost: _costs(arm, cost) for cost in COSTS} for arm in arms),
        checkpoints=tuple(tuple(run.get("checkpoints") or () for run in arm["runs"]) for arm in arms),
        changes=tuple(arm.get("changes") or {} for arm in arms),
        measures=measures,
        scores={
            measure.name: {
                arm: measure.factor * _numbers(values)
                for arm, values in content["scores"].get(measure.name, {}).items()
            }
            for measure in measures
        },
        tests=tuple(_scaled(test, measures) for test in content.get("tests") or ()),
        paper=content.get("paper") or {},
        missing=tuple(map(str, content.get("missing") or ())),
    )


def _run(folder: Path, arm: str, content: Mapping[str, Any]) -> Run:
    """Read a run's log folder where it is here, or else take the curve that the experiment has kept of it."""
    name = f"{arm}-s{content['seed']}"
    kept = read_json_object(folder / "results" / f"{name}.json") or {}
    provenance = {**(kept.get("provenance") or {}), "seed": content["seed"]}
    if content.get("log_dir"):
        log_dir = folder / content["log_dir"]
        if (log_dir / METRICS).is_file():
            return read_run(log_dir, name)
    return run_of_curve(name, content.get("curve") or (), provenance=provenance)


def _numbers(values: Any) -> Floats:
    return np.array([math.nan if value is None else float(value) for value in values], dtype=np.float64)


def _costs(arm: Mapping[str, Any], cost: str) -> Floats:
    """Give a cost for each of the arm's seeds, NaN for runs that are not there."""
    of_seeds = {run["seed"]: run.get(cost) for run in arm["runs"]}
    return _numbers(of_seeds.get(seed) for seed in arm["seeds"])


def _scaled(test: Mapping[str, Any], measures: Sequence[Measure]) -> Mapping[str, Any]:
    """Give a test with its difference in what the measure is written in."""
    factor = next((measure.factor for measure in measures if measure.name == test["measure"]), 1.0)
    difference = as_float(test.get("difference"))
    return {**test, "difference": None if difference is None else factor * difference}


def group_title(group: str) -> str:
    """Give a group of measures in words: finetune-1000 is fine-tuning with 1,000 examples."""
    kind, _, size = group.partition("-")
    if group in _KINDS or kind not in _KINDS:
        return _KINDS.get(group, group)
    return f"{_KINDS[kind]}, {f'{int(size):,}' if size.isdigit() else size} examples"


def score_table(experiment: Experiment) -> Table | None:
    """Tabulate mean ± deviation over seeds of every measure; None where there is none."""
    if not experiment.measures:
        return None
    rows = []
    for arm, name in zip(experiment.arms, experiment.names, strict=True):
        cells = []
        for measure in experiment.measures:
            values = experiment.scores.get(measure.name, {}).get(name, np.empty(0))
            known = values[np.isfinite(values)]
            failed = len(values) - len(known)
            told = f" ({len(known)}{f', {failed} missing' if failed else ''})" if len(known) else ""
            cells.append(mean_and_deviation(known, digits=3) + told)
        rows.append((arm.label, *cells))
    header = (_with_group(measure) for measure in experiment.measures)
    note = "Mean ± standard deviation over pre-training seeds (how many). Scores of tasks are times 100."
    if experiment.missing:
        note += f" Not there yet: {', '.join(experiment.missing)}."
    colours = tuple(arm.colour for arm in experiment.arms)
    return Table("Scores", ("", *header), tuple(rows), "scores", note, colours).turned_if_wide()


def _with_group(measure: Measure) -> str:
    group = group_title(measure.group)
    # the label of a figure of pre-training says it all, and a mean over tasks has no metric
    is_told = measure.group == "held-out" or measure.metric in ("", "score")
    metric = "" if is_told or measure.metric.lower() in measure.label.lower() else f", {measure.metric}"
    return f"{measure.label}{metric} ({group.lower()})" if group else f"{measure.label}{metric}"


def change_table(experiment: Experiment) -> Table | None:
    """Tabulate what is different about each arm."""
    keys = dict.fromkeys(key for changes in experiment.changes for key in changes)
    if not keys:
        return None
    rows = tuple(
        (key, *(shown(changes[key]) if key in changes else "–" for changes in experiment.changes)) for key in keys
    )
    return Table(
        "What differs",
        ("setting", *(arm.label for arm in experiment.arms)),
        rows,
        "differences",
        _budget_told(experiment),
    )


def _budget_told(experiment: Experiment) -> str:
    flops = experiment.budget.get("flops")
    if not isinstance(flops, (int, float)):
        return ""
    accounting = experiment.budget.get("accounting", "paper")
    by = "the paper's accounting" if accounting == "paper" else "what is really done"
    return f"Each run has {naming.number(flops)} FLOPs by {by}. All other settings are the same."


def cost_table(experiment: Experiment) -> Table:
    """Tabulate what each arm's runs have cost, mean over seeds."""
    rows = []
    for arm, costs in zip(experiment.arms, experiment.costs, strict=True):
        cells = [
            naming.number(float(np.nanmean(values))) if np.isfinite(values).any() else "–" for values in costs.values()
        ]
        wall = costs["wall_s"]
        cells[-1] = naming.span(float(np.nanmean(wall))) if np.isfinite(wall).any() else "–"
        rows.append((arm.label, str(len(arm.runs)), *cells))
    return Table(
        "Cost of a run",
        ("", "runs", "FLOPs (paper's accounting)", "FLOPs done", "time"),
        tuple(rows),
        "cost",
        "Mean over seeds.",
        tuple(arm.colour for arm in experiment.arms),
    )


def test_tables(experiment: Experiment) -> list[Table]:
    """Tabulate the differences between arms with their intervals and tests; of many, those of means first."""
    if not experiment.tests:
        return []
    whole = _test_table(experiment, experiment.tests, "Differences between arms", "tests")
    means = [test for test in experiment.tests if str(test["measure"]).endswith("/average")]
    if len(whole.rows) <= LONG or not means:
        return [whole]
    return [_test_table(experiment, means, "Differences between arms, means over tasks", "tests_of_means"), whole]


def _test_table(experiment: Experiment, tests: Sequence[Mapping[str, Any]], caption: str, name: str) -> Table:
    labels = {measure.name: _with_group(measure) for measure in experiment.measures}
    rows = []
    for test in tests:
        interval = confidence_interval(experiment, test)
        rows.append(
            (
                f"{experiment.label(test['a'])} − {experiment.label(test['b'])}",
                labels.get(test["measure"], str(test["measure"])),
                naming.number(as_float(test.get("difference"))),
                "–" if interval is None else f"{naming.number(interval[0], 3)} to {naming.number(interval[1], 3)}",
                naming.number(as_float(test.get("t")), 3),
                naming.number(as_float(test.get("df")), 3),
                naming.number(as_float(test.get("p")), 2),
                naming.number(as_float(test.get("p_holm")), 2),
                "yes" if test.get("significant") else "no",
            )
        )
    header = ("difference", "measure", "mean", "95 % interval", "t", "df", "p", "p (Holm)", "significant")
    note = (
        "Welch's t over pre-training seeds; p corrected by Holm's method for the number of tests. "
        "Intervals are not corrected."
    )
    return Table(caption, header, tuple(rows), name, note)


def as_float(value: Any) -> float | None:
    """Give a number of a file, None for what is none."""
    return float(value) if isinstance(value, (int, float)) else None


def confidence_interval(experiment: Experiment, test: Mapping[str, Any]) -> tuple[float, float] | None:
    """Give Welch's interval of a difference; None where an arm has fewer than two scores."""
    by_arm = experiment.scores.get(test["measure"], {})
    samples = [by_arm.get(test[side], np.empty(0)) for side in ("a", "b")]
    a, b = (values[np.isfinite(values)] for values in samples)
    if min(len(a), len(b)) < 2:
        return None
    of_a, of_b = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    difference, error = float(a.mean() - b.mean()), math.sqrt(of_a + of_b)
    if error == 0:
        return difference, difference
    freedom = (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
    half = _t_quantile(freedom) * error
    return difference - half, difference + half


def _t_quantile(freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + _CONFIDENCE / 2))


def interval_of_mean(values: Floats) -> float:
    """Give half the length of the confidence interval of a mean; 0 where there are fewer than two values."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return 0.0
    return _t_quantile(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))


def paper_table(experiment: Experiment) -> Table | None:
    """Put the paper's numbers beside ours; None where the experiment is none of the paper's."""
    published = experiment.paper.get("rows")
    if not isinstance(published, dict) or not published:
        return None
    rows = []
    for name, numbers in published.items():
        for measure in experiment.measures:
            printed = as_float(numbers.get(measure.name))
            if printed is None:
                continue
            values = experiment.scores[measure.name].get(name, np.empty(0))
            ours = mean_and_deviation(values[np.isfinite(values)])
            deviation = as_float(numbers.get(f"{measure.name}/std"))
            theirs = naming.spread(measure.factor * printed, None if deviation is None else measure.factor * deviation)
            rows.append((experiment.label(name), _with_group(measure), ours, theirs))
    return Table(
        f"Beside the paper: {experiment.paper.get('table', '')}", ("", "measure", "here", "paper"), tuple(rows), "paper"
    )
