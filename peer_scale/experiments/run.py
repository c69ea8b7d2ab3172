"""Carries an experiment out: pre-trains, converts and measures each run that has no result yet."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from peer_scale.errors import StoppedEarly, UserError
from peer_scale.experiments.comparison import Comparison, compare, is_incomplete, write_comparison
from peer_scale.experiments.config import RANDOM, TFIDF
from peer_scale.experiments.curves import held_out
from peer_scale.experiments.measures import held_out_scores, measurements, with_averages
from peer_scale.experiments.measuring import measure
from peer_scale.experiments.plan import ArmPlan, Plan, RunName
from peer_scale.experiments.pretraining import (
    RunFolder,
    convert,
    curve_of,
    is_pretrained,
    pretrain,
    provenance_of,
)
from peer_scale.experiments.processes import ProgramError, Programs
from peer_scale.experiments.results import RunResult, read_results, write_result
from peer_scale.folder_lock import FolderLock
from peer_scale.storage import require_writable_folder

RUNS = "runs"


@dataclass(frozen=True)
class Conductor:
    """Carries the runs of one plan out in one folder.

    Attributes:
        plan: what is to be run.
        folder: of the experiment.
        programs: starts the processes.
        launcher: what the trainer is started with: `torchrun --nproc-per-node 8`; empty: one process.
        say: is told what is going on, in lines.
    """

    plan: Plan
    folder: Path
    programs: Programs
    launcher: Sequence[str] = ()
    say: Callable[[str], None] = print

    def run_all(self, wanted: Sequence[RunName], jobs: int) -> dict[RunName, str]:
        """Carry runs out, `jobs` at once; give those that failed, each with the reason.

        Whatever happens to one run, the others go on. experiment.json is made anew after each.

        Raises:
            StoppedEarly: SIGTERM came; what was running has been saved.
        """
        self.collect()
        failures: dict[RunName, str] = {}
        to_do = [run for run in wanted if not self.is_done(run)]
        with ThreadPoolExecutor(jobs) as pool, self._stopping_at_signals():
            futures = {pool.submit(self._run, run): run for run in to_do}
            try:
                for future in as_completed(futures):
                    failure = future.result()
                    if failure is not None:
                        failures[futures[future]] = failure
                        self.say(f"{futures[future]}: {failure}")
                    self.collect()
            except BaseException:
                self.programs.stop()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return failures

    def collect(self) -> Comparison:
        """Make experiment.json anew of the results that are there."""
        comparison = compare(self.plan, read_results(self.folder, self.plan))
        write_comparison(self.folder, comparison)
        return comparison

    def is_done(self, run: RunName) -> bool:
        """Say whether there is nothing left to do here for a run."""
        result = self._result(run)
        if result is None:
            return False
        can_measure = self.plan.arms[run.arm].arm.kind == TFIDF or is_pretrained(
            self.run_folder(run), self.plan.arms[run.arm]
        )
        return not (is_incomplete(self.plan, result) and can_measure)

    def run_folder(self, run: RunName) -> RunFolder:
        """Give the place of a run's files."""
        return RunFolder(self.folder / RUNS / str(run))

    def _result(self, run: RunName) -> RunResult | None:
        return read_results(self.folder, self.plan).get(run)

    def _run(self, run: RunName) -> str | None:
        """Carry one run out; give the reason where it fails."""
        folder = self.run_folder(run)
        lock = FolderLock(folder.path, "--output")
        try:
            require_writable_folder(folder.path, "--output")
            lock.acquire()
        except UserError as error:
            return f"left alone: {error}"
        try:
            if not self.is_done(run):  # another process may have finished it in between
                self._finish(run, folder)
        except (ProgramError, UserError) as error:
            return f"failed: {error}"
        except Exception:
            return f"broke down: {traceback.format_exc()}"
        finally:
            lock.release()
        return None

    def _finish(self, run: RunName, folder: RunFolder) -> None:
        plan = self.plan.arms[run.arm]
        before = self._result(run)
        if plan.arm.kind == TFIDF:
            result = RunResult(self.plan.config.name, run.arm, run.seed, plan.fingerprint)
        elif before is not None:
            result = before
        else:
            steps = f"{plan.steps:,} step{'s' if plan.steps != 1 else ''}"
            self.say(f"{run}: {f'pre-training, {steps}' if plan.arm.kind != RANDOM else 'initialising'}")
            pretrain(folder, plan, run.seed, self.programs, self.launcher)
            result = self._pretrained(run, folder, plan)
        scores, details = self._measured(run, folder, plan)
        held = {} if plan.arm.kind == TFIDF else held_out_scores(self.plan.config, curve_of(folder).last)
        result = replace(
            result,
            scores={**result.scores, **scores, **held},
            details={**result.details, **details},
        )
        write_result(self.folder, result)
        self.say(f"{run}: done")

    def _pretrained(self, run: RunName, folder: RunFolder, plan: ArmPlan) -> RunResult:
        curve, provenance = curve_of(folder), provenance_of(folder)
        result = RunResult(self.plan.config.name, run.arm, run.seed, plan.fingerprint, provenance=provenance)
        if plan.arm.kind == RANDOM:
            return replace(result, held_out=held_out(curve.last))
        return replace(
            result,
            steps=curve.steps,
            tokens=curve.tokens,
            flops_paper=curve.flops_paper,
            flops_actual=curve.flops_actual,
            wall_s=curve.wall_s,
            curve=curve.points,
            held_out=held_out(curve.last),
        )

    def _measured(
        self, run: RunName, folder: RunFolder, plan: ArmPlan
    ) -> tuple[dict[str, float | None], dict[str, Any]]:
        """Measure each checkpoint that is to be; give the last one's scores, and details with those of the others."""
        checkpoints: list[dict[str, Any]] = []
        scores: dict[str, float | None] = {}
        found: dict[str, Any] = {}
        for step in plan.measured_steps:
            found = self._measured_at(run, folder, plan, step)
            scores = with_averages(self.plan.config, {name: each["mean"] for name, each in found.items()})
            flops = 0.0 if plan.costs is None else plan.costs.paper * min(step, plan.steps)
            checkpoints.append({"step": min(step, plan.steps), "train_flops": flops, "scores": scores})
        return scores, {"measures": found, "checkpoints": checkpoints}

    def _measured_at(self, run: RunName, folder: RunFolder, plan: ArmPlan, step: int) -> dict[str, Any]:
        wanted = measurements(self.plan.config)
        if not wanted:
            return {}
        if plan.arm.kind == TFIDF:
            from peer_scale.experiments.tfidf import tfidf_score

            return {each.measure: tfidf_score(each) for each in wanted}
        model = convert(folder, step, plan.arm.branch, self.programs)
        self.say(f"{run}: measured after step {step:,}" if plan.steps else f"{run}: measured")
        return measure(model, wanted, folder.measures(step), self.programs, folder.output)

    @contextmanager
    def _stopping_at_signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            raise StoppedEarly("stopped; what was running has been saved: the same command goes on")

        before: Mapping[signal.Signals, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM,)}
        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
