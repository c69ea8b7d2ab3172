"""The comparison as a whole, made anew of whatever results are there: scores, tests, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peer_scale.experiments.config import RANDOM, ExperimentConfig
from peer_scale.experiments.measures import Measure, measures
from peer_scale.experiments.plan import ArmPlan, Plan, RunName
from peer_scale.experiments.results import RunResult
from peer_scale.experiments.statistics import PairTest, compare_pairs, summarise
from peer_scale.storage import write_atomically

FILE = "experiment.json"
_PER_CENT = 100


@dataclass(frozen=True)
class Comparison:
    """Scores of all runs and the tests between arms.

    Attributes:
        plan: what was to be run.
        results: of the runs that are finished.
        scores: measure, arm, a value for each of the arm's seeds; None where there is none.
        tests: of all pairs of each family of arms, measure by measure.
    """

    plan: Plan
    results: Mapping[RunName, RunResult]
    scores: Mapping[str, Mapping[str, Sequence[float | None]]]
    tests: Sequence[PairTest]

    @property
    def missing(self) -> tuple[RunName, ...]:
        """Runs without a result."""
        return tuple(run for run in self.plan.runs if run not in self.results)

    @property
    def incomplete(self) -> tuple[RunName, ...]:
        """Runs with a result that lacks a measure, since one was added to the file later."""
        return tuple(run for run, result in self.results.items() if is_incomplete(self.plan, result))


def compare(plan: Plan, results: Mapping[RunName, RunResult]) -> Comparison:
    """Collect the scores and test all pairs."""
    config = plan.config
    scores: dict[str, dict[str, list[float | None]]] = {}
    tests: list[PairTest] = []
    for measure in measures(config):
        of_arms = {
            name: [_score(results.get(RunName(name, seed)), measure.name) for seed in arm.seeds]
            for name, arm in plan.arms.items()
        }
        scores[measure.name] = of_arms
        for family, arms in config.families.items():
            here = {arm: of_arms[arm] for arm in arms if any(value is not None for value in of_arms[arm])}
            tests += compare_pairs(measure.name, family, here, alpha=config.alpha)
    return Comparison(plan, results, scores, tests)


def is_incomplete(plan: Plan, result: RunResult) -> bool:
    """Say whether a result lacks a measure that its arm could have."""
    has_model = plan.arms[result.arm].settings is not None
    wanted = [measure for measure in measures(plan.config) if has_model or measure.is_of_tasks]
    return any(measure.name not in result.scores for measure in wanted)


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Write experiment.json, whole or not at all."""
    content = json.dumps(as_json(folder, comparison), indent=1, allow_nan=False)
    write_atomically(folder / FILE, content.encode())


def as_json(folder: Path, comparison: Comparison) -> dict[str, Any]:
    """Give the content of experiment.json."""
    plan, config = comparison.plan, comparison.plan.config
    return {
        "name": config.name,
        "title": config.title or config.name,
        "sentence": sentence(comparison),
        "budget": None if config.budget is None else asdict(config.budget),
        "arms": [_arm_json(folder, comparison, arm) for arm in plan.arms.values()],
        "measures": [_measure_json(comparison, measure) for measure in measures(config)],
        "scores": comparison.scores,
        "tests": [asdict(test) for test in comparison.tests],
        "alpha": config.alpha,
        "paper": _paper_json(config),
        "missing": [str(run) for run in comparison.missing],
        "incomplete": [str(run) for run in comparison.incomplete],
    }


def sentence(comparison: Comparison) -> str:
    """Say the result in one sentence, of the primary measure, whoever is best."""
    config = comparison.plan.config
    measure = primary_measure(config)
    if measure is None:
        return f"{len(comparison.results)} of {len(comparison.plan.runs)} runs are finished."
    labels = {arm.name: arm.shown_name for arm in config.all_arms}
    found = {arm: summarise(comparison.scores[measure.name][arm]) for arm in config.families["arms"]}
    means = {arm: summary.mean for arm, summary in found.items() if summary.mean is not None}
    if not means:
        return f"No run has a value of {_shown(measure)} yet."
    order = sorted(means, key=lambda arm: means[arm], reverse=measure.higher_is_better)
    best, *others = order
    summary = found[best]
    value = _number(measure, summary.mean)
    if summary.std is not None:
        value += f" ± {_number(measure, summary.std)}"
    number = f"{summary.n} pre-training seed{'s' if summary.n != 1 else ''}"
    text = f"{labels[best]} has the best {_shown(measure)}, {value} over {number}"
    if others:
        text += f", {_against(comparison, measure, best, others, labels)}"
    missing = len(comparison.missing)
    return f"{text}{f' ({missing} runs are missing)' if missing else ''}."


def primary_measure(config: ExperimentConfig) -> Measure | None:
    """Give the measure that the sentence is about: the one named, or the mean over the dearest group of tasks."""
    found = measures(config)
    if config.primary is not None:
        return next(measure for measure in found if measure.name == config.primary)
    of_tasks = [measure for measure in found if measure.is_of_tasks]
    return of_tasks[-1] if of_tasks else found[0] if found else None


def table(comparison: Comparison) -> str:
    """Show mean and deviation of each measure and arm, those of the paper beside them."""
    config = comparison.plan.config
    rows = [["", *(arm.shown_name for arm in config.all_arms)]]
    for measure in measures(config):
        row = [f"{measure.group}: {measure.label}" if measure.is_of_tasks else measure.label]
        for arm in config.all_arms:
            summary = summarise(comparison.scores[measure.name][arm.name])
            cell = "-" if summary.mean is None else _number(measure, summary.mean)
            cell += "" if summary.std is None else f" ± {_number(measure, summary.std)}"
            printed = (config.paper.rows if config.paper else {}).get(arm.name, {}).get(measure.name)
            row.append(cell if printed is None else f"{cell} (paper {printed:g})")
        rows.append(row)
    return columns(rows)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out in columns, the first flush left and the others flush right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _against(
    comparison: Comparison, measure: Measure, best: str, others: Sequence[str], labels: Mapping[str, str]
) -> str:
    tests = [test for test in comparison.tests if test.measure == measure.name and test.family == "arms"]
    apart = [arm for arm in others if any({test.a, test.b} == {best, arm} and test.significant for test in tests)]
    tested = [arm for arm in others if any({test.a, test.b} == {best, arm} and test.p is not None for test in tests)]
    same = [arm for arm in tested if arm not in apart]
    untested = [arm for arm in others if arm not in tested]
    level = f"at the {comparison.plan.config.alpha:.0%} level (Welch's t, Holm)"
    parts = []
    if apart:
        parts.append(f"significantly different from {_listed(apart, labels)} {level}")
        parts += [f"not from {_listed(same, labels)}"] if same else []
    elif same:
        parts.append(f"which is no significant difference from {_listed(same, labels)} {level}")
    if untested:
        parts.append(f"not tested against {_listed(untested, labels)}: that takes two seeds of each that differ")
    return ", ".join(parts)


def _listed(arms: Sequence[str], labels: Mapping[str, str]) -> str:
    *first, last = [labels[arm] for arm in arms]
    return f"{', '.join(first)} or {last}" if first else last


def _shown(measure: Measure) -> str:
    return f"{measure.label} ({measure.group})"


def _number(measure: Measure, value: float | None) -> str:
    assert value is not None
    return f"{_PER_CENT * value:.2f}" if measure.is_of_tasks else f"{value:.4g}"


def _score(result: RunResult | None, measure: str) -> float | None:
    return None if result is None else result.scores.get(measure)


def _arm_json(folder: Path, comparison: Comparison, arm: ArmPlan) -> dict[str, Any]:
    runs = []
    for seed in arm.seeds:
        result = comparison.results.get(RunName(arm.arm.name, seed))
        if result is not None:
            log_dir = Path("runs") / str(result.name) / "log"
            kept = ("steps", "tokens", "flops_paper", "flops_actual", "wall_s", "curve", "held_out")
            runs.append(
                {
                    "seed": seed,
                    "log_dir": str(log_dir) if (folder / log_dir).is_dir() else None,
                    **{name: getattr(result, name) for name in kept},
                    "checkpoints": result.details.get("checkpoints", []),
                }
            )
    return {
        "name": arm.arm.name,
        "label": arm.arm.shown_name,
        "kind": arm.arm.kind,
        "changes": arm.changes,
        "seeds": list(arm.seeds),
        "planned": {"steps": arm.steps, **({} if arm.costs is None or arm.arm.kind == RANDOM else _planned(arm))},
        "runs": runs,
    }


def _planned(arm: ArmPlan) -> dict[str, float]:
    assert arm.costs is not None
    return {
        "tokens": arm.costs.tokens * arm.steps,
        "flops_paper": arm.costs.paper * arm.steps,
        "flops_actual": arm.costs.actual * arm.steps,
    }


def _measure_json(comparison: Comparison, measure: Measure) -> dict[str, Any]:
    metric = measure.of
    if measure.is_of_tasks:
        details = (result.details.get("measures", {}).get(measure.name, {}) for result in comparison.results.values())
        metric = next((each["metric"] for each in details if "metric" in each), "score")
    return {
        "name": measure.name,
        "label": measure.label,
        "metric": metric,
        "higher_is_better": measure.higher_is_better,
        "group": measure.group,
    }


def _paper_json(config: ExperimentConfig) -> dict[str, Any] | None:
    if config.paper is None:
        return None
    of_tasks = {measure.name for measure in measures(config) if measure.is_of_tasks}
    rows = {
        arm: {
            name: value / _PER_CENT if name.removesuffix("/std") in of_tasks else value for name, value in row.items()
        }
        for arm, row in config.paper.rows.items()
    }
    return {"table": config.paper.table, "rows": rows, "remarks": config.paper.remarks}
