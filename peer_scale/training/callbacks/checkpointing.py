"""When checkpoints are written, and what becomes of a run that cannot write them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NoReturn

from peer_scale.checkpoints.writer import CheckpointWriter, SaveError
from peer_scale.errors import StoppedEarly, TrainingError
from peer_scale.training.complaints import complain
from peer_scale.training.metering import StepRecord
from peer_scale.training.spikes import SpikeWatch
from peer_scale.training.trainer import Callback, Trainer


class Checkpointing(Callback):
    """Saves every `interval` steps (None: never in between) and after the last one.

    Training goes on without a checkpoint that could not be written, up to `max_failed` in a row and unless it is the
    last one. Then the run ends on all ranks: by StoppedEarly where it can be started again from an older one, else by
    TrainingError.
    """

    part = "save"

    def __init__(
        self,
        writer: CheckpointWriter,
        interval: int | None,
        *,
        saves_start: bool = False,
        max_failed: int = 3,
        spikes: SpikeWatch | None = None,
        is_first_rank: bool = False,
    ) -> None:
        """Save by a writer, with `saves_start` also what the run begins with, with `spikes` what they follow from.

        The first rank warns.
        """
        self._writer, self._interval, self._spikes = writer, interval, spikes
        self._max_failed, self._is_first_rank = max_failed, is_first_rank
        self._saves_start = saves_start
        self._saved_step: int | None = None
        self._failure = ""

    def settle(self) -> None:
        """Wait for a save that is under way."""
        self._attempt(self._writer.finish)

    def on_step_begin(self, trainer: Trainer, step: int) -> None:
        if self._saves_start:
            self._saves_start = False
            self._save(trainer)

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self._attempt(self._writer.poll)
        if self._interval is not None and record.step % self._interval == 0:
            self._save(trainer)

    def on_failure(self) -> None:
        with contextlib.suppress(SaveError):
            self._writer.close()  # what is being written is of an earlier step

    def on_train_end(self, trainer: Trainer) -> None:
        if trainer.progress.step != self._saved_step:
            self._save(trainer)
        self._attempt(self._writer.close)
        if self._writer.failed_in_a_row:
            self._give_up()

    def _save(self, trainer: Trainer) -> None:
        trainer.report(keep=0)  # what metrics.jsonl says must not lag behind the checkpoint
        self.settle()
        recent = None if self._spikes is None else self._spikes.recent
        self._attempt(lambda: self._writer.save(trainer.progress, recent))
        self._saved_step = trainer.progress.step

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except SaveError as error:
            self._failure = str(error)
            if self._is_first_rank:
                complain(str(error))
            if self._writer.failed_in_a_row >= self._max_failed:
                self._give_up()

    def _give_up(self) -> NoReturn:
        number = self._writer.failed_in_a_row
        told = self._failure if number == 1 else f"{number} saves in a row have failed; {self._failure}"
        if self._writer.has_saved:
            raise StoppedEarly(f"stopped: {told}: the same command goes on from there")
        raise TrainingError(told)
