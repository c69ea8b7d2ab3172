"""Loading a checkpoint into a running engine, whatever layout saved it."""

from pathlib import Path

import torch.distributed as dist

from peer_scale.checkpoints.manifest import KINDS, WEIGHT, Manifest
from peer_scale.checkpoints.pieces import TensorReader, check_file
from peer_scale.checkpoints.progress import Progress
from peer_scale.checkpoints.sections import OptimizerState
from peer_scale.checkpoints.state import TrainingState
from peer_scale.errors import UserError
from peer_scale.parallel.coordination import RankCoordinator


def load_checkpoint(
    state: TrainingState, coordinator: RankCoordinator, folder: Path, manifest: Manifest, *, only_weights: bool = False
) -> Progress:
    """Put weights and optimizer state in place; give how far the run had come.

    With `only_weights` the optimizer stays as it is and the run is at its beginning. The files have been checked, see
    `find_damage`.

    Raises:
        UserError: on all ranks, where a parameter is missing.
    """
    reader = TensorReader(folder, manifest.tensors)
    progress, optimizer = manifest.sections.progress, manifest.sections.optimizer
    kinds: tuple[str, ...] = KINDS
    if only_weights:
        progress, optimizer, kinds = Progress(), OptimizerState(), (WEIGHT,)
    coordinator.everyone(lambda: state.fill(reader, optimizer, progress, kinds))
    state.publish()
    return progress


def find_damage(coordinator: RankCoordinator, folder: Path, manifest: Manifest) -> str | None:
    """Say which file of a checkpoint is not what was written; the ranks share the files out, and all give the same."""
    return next((damage for damage in coordinator.exchange(_damage_of_share(folder, manifest)) if damage), None)


def _damage_of_share(folder: Path, manifest: Manifest) -> str | None:
    try:
        for name in sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]:
            check_file(folder / name, manifest.files[name])
    except UserError as error:
        return str(error)
    return None
