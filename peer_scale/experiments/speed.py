"""How long the runs of an experiment take: from finished runs, from given rates, or from a few steps of each arm."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from peer_scale.errors import UserError
from peer_scale.experiments.config import RANDOM, TFIDF, merged
from peer_scale.experiments.curves import read_curve
from peer_scale.experiments.plan import ArmPlan, Plan, RunName
from peer_scale.experiments.pretraining import TRAINER, RunFolder, trainer_flags
from peer_scale.experiments.processes import Programs
from peer_scale.experiments.results import RunResult
from peer_scale.settings.names import hint


def trained_arms(plan: Plan) -> dict[str, ArmPlan]:
    """Give the arms that take time to pre-train."""
    return {name: arm for name, arm in plan.arms.items() if arm.arm.kind not in (RANDOM, TFIDF)}


def from_results(results: Mapping[RunName, RunResult]) -> dict[str, float]:
    """Give seconds per step of each arm of which a run is finished."""
    found: dict[str, list[float]] = {}
    for run, result in results.items():
        if result.steps:
            found.setdefault(run.arm, []).append(result.wall_s / result.steps)
    return {arm: statistics.median(seconds) for arm, seconds in found.items()}


def from_rates(plan: Plan, rates: Sequence[str]) -> dict[str, float]:
    """Give seconds per step from tokens per second: `20000` for all arms, or `peer=18000` for one; the last wins."""
    arms = trained_arms(plan)
    found: dict[str, float] = {}
    for text in rates:
        name, equals, number = text.rpartition("=")
        if equals and name not in arms:
            raise UserError(f"--tokens-per-second {text}: no pre-trained arm {name}{hint(name, arms)}")
        try:
            rate = float(number)
        except ValueError:
            rate = 0.0
        if not rate > 0:
            raise UserError(f"--tokens-per-second {text}: must be a number above 0, or ARM=number")
        for arm in [name] if equals else arms:
            costs = arms[arm].costs
            assert costs is not None
            found[arm] = costs.tokens / rate
    return found


def measured(plan: Plan, programs: Programs, launcher: Sequence[str], steps: int) -> dict[str, float]:
    """Train each arm for a few steps, one after the other; give the median seconds of the later half of them."""
    found = {}
    for name, arm in trained_arms(plan).items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = RunFolder(Path(temporary))
            few = {"training": {"train_iters": steps}, "output": {"save_interval": None, "eval_interval": None}}
            short = replace(arm, settings=merged(arm.settings, few))
            flags = trainer_flags(folder, short, arm.seeds[0])
            programs.check([*(launcher or (sys.executable,)), TRAINER, *flags], folder.output)
            curve = read_curve(folder.log_dir / "metrics.jsonl", 1)
            found[name] = statistics.median(point["step_time_s"] for point in curve.points[len(curve.points) // 2 :])
    return found
