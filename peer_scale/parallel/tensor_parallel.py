"""A rank's place among those that share each layer: all that the models know of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


@dataclass(frozen=True)
class TensorParallel:
    """One of the ranks that share each layer.

    Attributes:
        size: how many they are.
        rank: this one's number among them.
        group: how they talk; None for a model that is only built, never run.
        sequence_parallel: whether activations are split along the sequence between tensor-parallel products.
        device: where this rank computes.
    """

    size: int
    rank: int
    group: dist.ProcessGroup | None
    sequence_parallel: bool
    device: torch.device
