"""What becomes of a step whose loss or gradient is not finite or far too great, and of fp16's overflows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_scale.errors import TrainingError
from peer_scale.parallel.coordination import RankCoordinator
from peer_scale.samples.examples import Batch
from peer_scale.samples.shares import BatchPlan
from peer_scale.settings.run import RunConfig
from peer_scale.storage import write_atomically
from peer_scale.training.complaints import complain
from peer_scale.training.culprit import find_culprits
from peer_scale.training.metering import StepRecord
from peer_scale.training.spikes import SpikeWatch
from peer_scale.training.trainer import Callback, Trainer, WentBack
from peer_scale.training.update_guard import UpdateGuard
from peer_scale.training.way_back import WayBack


class BadSteps(Callback):
    """Ends the run at a bad step, leaves its update out, or goes back and around it; the first of the callbacks.

    The update of a bad step has not happened (`UpdateGuard`) when the host learns of it, one step late. To skip is to
    count it. To roll back is to load the newest checkpoint and to do all again but the bad step's update: to the same
    checkpoint once, since a second bad step after it is skipped where it is. So the state after any step is that of a
    run whose bad steps had no update, and one that is started again in between finds the same steps bad.

    A spike, a loss or gradient norm far above those of the steps before, is told, or skipped.

    Each bad step is described in `bad_steps/step_N.json`. With fp16, overflows are left out by DeepSpeed, and the run
    ends after too many in a row.
    """

    def __init__(
        self,
        run: RunConfig,
        guard: UpdateGuard | None,
        spikes: SpikeWatch,
        plan: BatchPlan,
        batches_of: Callable[[int], list[Batch]],
        coordinator: RankCoordinator,
        *,
        folder: Path | None,
        way_back: WayBack | None = None,
        skipped_steps: int = 0,
    ) -> None:
        """Judge the steps of one run.

        Args:
            run: says what to do.
            guard: of its engine; None with fp16.
            spikes: says what is one.
            plan: says which samples a step has.
            batches_of: makes a step's micro-batches of this rank again.
            coordinator: of all ranks.
            folder: where to describe bad steps; None: nowhere, and on all ranks but the first.
            way_back: to the newest checkpoint.
            skipped_steps: before this run, of which fp16 knows.
        """
        self._training, self._guard, self._spikes, self._plan = run.training, guard, spikes, plan
        self._loss_names = [loss.name for loss in run.objective.losses]
        self._batches_of, self._coordinator, self._folder = batches_of, coordinator, folder
        self._way_back = way_back
        self._skipped_before, self._in_a_row = skipped_steps, 0
        self._left_out: set[int] = set()

    def on_step_begin(self, trainer: Trainer, step: int) -> None:
        if self._guard is not None:
            limits = self._spikes.limits(step) if self._training.on_spike == "skip" else None
            largest_norm = None if limits is None else limits[1]
            self._guard.prepare(hold=step in self._left_out, largest_norm=largest_norm)

    def on_step_known(self, trainer: Trainer, record: StepRecord, metrics: dict[str, Any]) -> None:
        is_left_out = record.step in self._left_out
        wrong = self._fault(record, metrics)
        if self._guard is None:
            self._count_overflow(record, metrics)
        elif wrong is not None and not is_left_out:
            self._decide(trainer, record, metrics, wrong)
        is_spike = wrong is None and not is_left_out and self._is_skipped_spike(record, metrics)
        if self._guard is None:
            return
        if wrong is not None or is_left_out or is_spike:
            trainer.engine.skipped_steps += 1
            self._in_a_row += 1
            if self._in_a_row >= self._training.max_skipped_steps:
                why = f"{self._in_a_row} steps in a row were skipped; a lower --lr may help"
                raise TrainingError(f"step {record.step}: {why}")
        else:
            self._in_a_row = 0
        metrics["skipped_steps"] = trainer.engine.skipped_steps

    def _fault(self, record: StepRecord, metrics: dict[str, Any]) -> str | None:
        """Say what is not finite in a step."""
        for name in self._loss_names:
            if not math.isfinite(metrics[name]):
                return f"{name} is {metrics[name]}"
        norm = _norm(record)
        return None if math.isfinite(norm) else f"the gradient norm is {norm}"

    def _decide(self, trainer: Trainer, record: StepRecord, metrics: dict[str, Any], wrong: str) -> None:
        """End the run, go back, or return where it is enough that the update has not happened."""
        action = self._training.on_nan
        has_updated = math.isfinite(
            _norm(record)
        )  # by a finite gradient of a loss that is not: unheard of, and no matter
        if action == "rollback":
            assert self._way_back is not None and self._guard is not None
            if self._way_back.is_new() or has_updated:
                self._describe(record, metrics, wrong, action, self._find_culprits(trainer, record))
                then = self._way_back.go()
                self._spikes.put_back(then.recent)
                self._guard.release()
                self._left_out.add(record.step)
                self._tell(f"step {record.step}: {wrong}; going back to step {then.progress.step} and around it")
                raise WentBack(then.progress)
            action = "skip"
        if action == "skip" and not has_updated:
            self._describe(record, metrics, wrong, action)
            self._tell(f"step {record.step}: {wrong}; its update was left out")
            return
        self._describe(record, metrics, wrong, "stop", self._find_culprits(trainer, record))
        raise TrainingError(f"step {record.step}: {wrong}; a lower --lr may help")

    def _is_skipped_spike(self, record: StepRecord, metrics: dict[str, Any]) -> bool:
        """Tell of a spike, and say whether the guard has left its update out."""
        loss, norm = metrics["loss"], _norm(record)
        limits = self._spikes.limits(record.step)
        self._spikes.note(record.step, loss, norm)
        if limits is None or self._training.on_spike == "ignore":
            return False
        values = {"the loss": loss, "the gradient norm": norm}
        told = [
            f"{name} {values[name]:.4g} is above {limit:.4g}"
            for name, limit in zip(values, limits, strict=True)
            if values[name] > limit
        ]
        is_skipped = self._training.on_spike == "skip" and norm > limits[1]
        if told:
            wrong = f"{' and '.join(told)} ({self._training.spike_sigmas:g} standard deviations of the last steps)"
            self._describe(record, metrics, wrong, "skip" if is_skipped else "warn")
            self._tell(f"step {record.step}: {wrong}" + ("; its update was left out" if is_skipped else ""))
        return is_skipped

    def _count_overflow(self, record: StepRecord, metrics: dict[str, Any]) -> None:
        skipped = record.skipped_steps > self._skipped_before
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        self._skipped_before = record.skipped_steps
        if self._in_a_row >= self._training.max_skipped_steps:
            wrong = f"fp16 gradients overflowed {self._in_a_row} steps in a row (loss scale {record.loss_scale:g})"
            self._describe(record, metrics, wrong, "stop")
            raise TrainingError(f"step {record.step}: {wrong}; use bf16, or a lower --lr")

    def _find_culprits(self, trainer: Trainer, record: StepRecord) -> list[dict[str, Any]]:
        assert self._guard is not None
        self._guard.prepare(hold=True)
        return find_culprits(trainer, self._coordinator, record.step, self._batches_of(record.step))

    def _describe(
        self,
        record: StepRecord,
        metrics: dict[str, Any],
        wrong: str,
        action: str,
        culprits: list[dict[str, Any]] | None = None,
    ) -> None:
        if self._folder is None:
            return
        losses = {name: _number(metrics[name]) for name in ("loss", *self._loss_names)}
        content = {
            "step": record.step,
            "wrong": wrong,
            "action": action,
            **losses,
            "grad_norm": None if record.grad_norm is None else _number(_norm(record)),
            "lr": record.lr,
            "loss_scale": record.loss_scale,
            "first_not_finite": culprits,
            "samples": list(self._plan.samples(record.step - 1)),
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"step_{record.step}.json"
            write_atomically(path, (json.dumps(content, allow_nan=False) + "\n").encode())
        except OSError as error:
            self._tell(f"{self._folder}: cannot be written ({error.strerror})")

    def _tell(self, text: str) -> None:
        if self._coordinator.is_first_rank:
            complain(text)


def _norm(record: StepRecord) -> float:
    """Read a step's gradient norm; 0 where it is not computed."""
    return 0.0 if record.grad_norm is None else float(record.grad_norm)


def _number(value: float) -> float | str:
    """Give a number that JSON has, or the name of one that it has not."""
    return value if math.isfinite(value) else str(value)
