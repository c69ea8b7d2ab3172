"""Back to the newest checkpoint, in the process that has gone on from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peer_scale.checkpoints.folder import newest
from peer_scale.checkpoints.loading import find_damage, load_checkpoint
from peer_scale.checkpoints.manifest import Manifest
from peer_scale.checkpoints.sections import Sections
from peer_scale.checkpoints.state import TrainingState
from peer_scale.errors import TrainingError
from peer_scale.parallel.coordination import RankCoordinator


class WayBack:
    """Finds what was saved last in a folder and puts it in place; all ranks call the same methods."""

    def __init__(
        self, save: Path, state: TrainingState, coordinator: RankCoordinator, settle: Callable[[], None]
    ) -> None:
        """Go back within `save`; `settle` waits for a save that is under way."""
        self._save, self._state, self._coordinator, self._settle = save, state, coordinator, settle
        self._taken: Path | None = None

    def is_new(self) -> bool:
        """Say whether there is another checkpoint than the one gone back to last."""
        return self._newest()[0] != self._taken

    def go(self) -> Sections:
        """Load the newest checkpoint; give what it says of the run.

        Raises:
            TrainingError: there is none, or it is damaged.
        """
        folder, manifest = self._newest()
        damage = find_damage(self._coordinator, folder, manifest)
        if damage is not None:
            raise TrainingError(f"--on-nan rollback: {damage}")
        self._taken = folder
        load_checkpoint(self._state, self._coordinator, folder, manifest)
        return manifest.sections

    def _newest(self) -> tuple[Path, Manifest]:
        self._settle()
        found = self._coordinator.first_rank(lambda: newest(self._save))
        if found is None:
            raise TrainingError(f"--on-nan rollback: --save {self._save} holds no checkpoint to go back to")
        return found
