"""The plan as people read it: a line for each arm."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from peer_scale.experiments.comparison import columns
from peer_scale.experiments.config import TFIDF
from peer_scale.experiments.measures import measurements
from peer_scale.experiments.plan import ArmPlan, Plan, RunName

_HEADER = ("arm", "model", "seeds", "steps", "tokens", "FLOPs (paper)", "FLOPs (actual)", "time a run", "finished")


def plan_table(plan: Plan, seconds: Mapping[str, float], *, finished: Collection[RunName], jobs: int) -> str:
    """Show each arm's steps, tokens, FLOPs and time, and what all of it takes.

    Args:
        plan: what is to be run.
        seconds: per step, of the arms of which it is known.
        finished: runs that need not be run.
        jobs: runs at once.
    """
    rows = [list(_HEADER)]
    rows += [_row(name, arm, seconds.get(name), finished) for name, arm in plan.arms.items()]
    lines = [columns(rows), *_notes(plan)]
    to_do = [run for run in plan.runs if run not in finished]
    known = [seconds[run.arm] * plan.arms[run.arm].steps for run in to_do if run.arm in seconds]
    unknown = sum(run.arm not in seconds and plan.arms[run.arm].steps > 0 for run in to_do)
    if known:
        at_once = f", {jobs} at once: {duration(sum(known) / jobs)}" if jobs > 1 else ""
        lines.append(f"pre-training still to do: {duration(sum(known))}{at_once}")
    if unknown:
        lines.append(
            f"the time of {unknown} runs is not known: --measure-speed 20 measures it, --tokens-per-second says it"
        )
    number = len(measurements(plan.config)) * plan.config.checkpoints
    lines.append(f"{len(to_do)} of {len(plan.runs)} runs to do, {number} measurements each")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Show a time in the unit that fits."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _row(name: str, arm: ArmPlan, seconds: float | None, finished: Collection[RunName]) -> list[str]:
    done = sum(RunName(name, seed) in finished for seed in arm.seeds)
    start = [name, arm.arm.model or "-", str(len(arm.seeds))]
    end = [f"{done} of {len(arm.seeds)}"]
    if arm.arm.kind == TFIDF or not arm.steps or arm.costs is None:
        return [*start, "0", *["-"] * 4, *end]
    costs = [f"{value * arm.steps:.3g}" for value in (arm.costs.tokens, arm.costs.paper, arm.costs.actual)]
    time = "-" if seconds is None else duration(seconds * arm.steps)
    return [*start, f"{arm.steps:,}", *costs, time, *end]


def _notes(plan: Plan) -> list[str]:
    budget = plan.config.budget
    if budget is None:
        return []
    own = [arm.name for arm in plan.config.all_arms if arm.steps is not None]
    text = f"budget: {budget.flops:.4g} FLOPs ({budget.accounting} accounting) for each run"
    return [f"{text}; with steps of their own: {', '.join(own)}" if own else text]
