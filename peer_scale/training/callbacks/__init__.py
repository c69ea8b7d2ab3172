"""What can be hung onto the training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peer_scale.training.trainer import StepRecord, Trainer


class Callback:
    """Does nothing; subclasses override what they need. All ranks call the same methods in the same order."""

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        """A step has been launched; `record.extra` takes further figures for its line of metrics.jsonl."""

    def on_figures(self, figures: dict[str, Any]) -> None:
        """A step's figures have been read back (at most one step late)."""

    def on_train_end(self, trainer: Trainer) -> None:
        """The last step is done and reported."""
