"""Loss on the text held out."""

from __future__ import annotations

import torch

from peer_scale.objectives.objective import SumsLayout
from peer_scale.samples.loader import ExampleDataset, Fault, micro_batches
from peer_scale.samples.shares import BatchPlan
from peer_scale.training.metering import StepRecord
from peer_scale.training.trainer import Callback, Trainer


class Validation(Callback):
    """Every `interval` steps the same `iters` global batches of held-out text, without dropout."""

    part = "validation"

    def __init__(self, dataset: ExampleDataset, plan: BatchPlan, interval: int, iters: int) -> None:
        self._dataset, self._plan, self._interval, self._iters = dataset, plan, interval, iters

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step % self._interval == 0 or record.step == trainer.run.training.train_iters:
            record.extra |= self._evaluate(trainer, record.step)

    def _evaluate(self, trainer: Trainer, trained_step: int) -> dict[str, object]:
        objective = trainer.run.objective
        layout = SumsLayout(objective)
        sums = torch.zeros(len(layout), dtype=torch.float64, device=trainer.topology.device)
        faults: list[Fault] = []
        for step in micro_batches(self._dataset, self._plan, first_step=0, last_step=self._iters, num_workers=0):
            batches = [batch.to(trainer.topology.device) for batch in step.batches]
            sums += trainer.runner.evaluate(batches, trainer.step_info(trained_step, batches))
            faults += [step.fault] if step.fault else []
        *totals, num_faults = trainer.global_sums(sums, float(bool(faults))).tolist()
        trainer.end_at_fault(num_faults, min(faults, default=None))
        metrics = layout.metrics(totals)
        names = ("loss", *(loss.name for loss in objective.losses), *objective.validation_metrics)
        return {f"validation_{name}": metrics[name] for name in names}
