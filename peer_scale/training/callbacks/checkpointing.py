"""When checkpoints are written."""

from __future__ import annotations

from peer_scale.checkpoints.writer import CheckpointWriter
from peer_scale.training.metering import StepRecord
from peer_scale.training.trainer import Callback, Trainer


class Checkpointing(Callback):
    """Saves every `interval` steps (None: never in between) and after the last one."""

    part = "save"

    def __init__(self, writer: CheckpointWriter, interval: int | None) -> None:
        self._writer, self._interval = writer, interval
        self._saved_step: int | None = None

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self._writer.poll()
        if self._interval is not None and record.step % self._interval == 0:
            self._save(trainer)

    def on_bad_data(self) -> None:
        self._writer.close()  # what is being written is of an earlier step

    def on_train_end(self, trainer: Trainer) -> None:
        if trainer.progress.step != self._saved_step:
            self._save(trainer)
        self._writer.close()

    def _save(self, trainer: Trainer) -> None:
        trainer.report(keep=0)  # what metrics.jsonl says must not lag behind the checkpoint
        self._writer.save(trainer.progress)
        self._saved_step = trainer.progress.step
