"""Loading a checkpoint into a running engine, whatever layout saved it."""

from pathlib import Path

import torch.distributed as dist

from peer_scale.checkpoints.manifest import KINDS, WEIGHT, Manifest
from peer_scale.checkpoints.pieces import TensorReader, check_file
from peer_scale.checkpoints.progress import Progress
from peer_scale.checkpoints.sections import OptimizerState
from peer_scale.checkpoints.state import TrainingState
from peer_scale.parallel.coordination import RankCoordinator


def load_checkpoint(
    state: TrainingState, coordinator: RankCoordinator, folder: Path, manifest: Manifest, *, only_weights: bool = False
) -> Progress:
    """Put weights and optimizer state in place; give how far the run had come.

    With `only_weights` the optimizer stays as it is and the run is at its beginning. The ranks share the files out
    among them and verify each checksum before anything is changed.

    Raises:
        UserError: on all ranks, where a file is damaged or a parameter is missing.
    """
    coordinator.everyone(lambda: _check_files(folder, manifest))
    reader = TensorReader(folder, manifest.tensors)
    progress, optimizer = manifest.sections.progress, manifest.sections.optimizer
    kinds: tuple[str, ...] = KINDS
    if only_weights:
        progress, optimizer, kinds = Progress(), OptimizerState(), (WEIGHT,)
    coordinator.everyone(lambda: state.fill(reader, optimizer, progress, kinds))
    state.publish()
    return progress


def _check_files(folder: Path, manifest: Manifest) -> None:
    for name in sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]:
        check_file(folder / name, manifest.files[name])
