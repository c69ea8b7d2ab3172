"""The parameters that a rank of each stage will have, without any rank: the model is built on torch's meta device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, cast

import torch
import torch.distributed as dist
from torch import nn

from peer_scale.models.config import ModelConfig
from peer_scale.models.layers import padded_vocab_size
from peer_scale.models.networks import PretrainingModel
from peer_scale.parallel.topology import Topology
from peer_scale.pipeline.placement import Placement


@dataclass(frozen=True)
class Inventory:
    """Sizes of a rank's parameters (its tensor-parallel share), those that decay and those that do not.

    These are the optimizer's two groups, which DeepSpeed lays out one after the other.
    """

    decayed: tuple[int, ...]
    others: tuple[int, ...]

    @property
    def count(self) -> int:
        """All numbers."""
        return sum(self.decayed) + sum(self.others)


def take_inventory(
    model: ModelConfig, num_levels: int, placement: Placement, tensor_parallel: int
) -> tuple[Inventory, ...]:
    """One for each stage; all tensor-parallel ranks have the same."""
    # built whole and then divided: without process groups megatron-core's layers do not split themselves
    padded = replace(model, vocab_size=padded_vocab_size(model.vocab_size, tensor_parallel))
    topology = _NoRanks(_SIZES, _SIZES, _SIZES, torch.device("meta"))  # type: ignore[arg-type]
    inventories = []
    for stage in placement.stages:
        with torch.device("meta"):
            parameters = list(PretrainingModel(padded, num_levels, topology, stage).parameters())
        sizes = [(p.ndim, _local_size(p, tensor_parallel)) for p in parameters]
        decayed = tuple(size for ndim, size in sizes if ndim >= 2)
        inventories.append(Inventory(decayed, tuple(size for ndim, size in sizes if ndim < 2)))
    return tuple(inventories)


def _local_size(parameter: nn.Parameter, tensor_parallel: int) -> int:
    is_split = getattr(parameter, "tensor_model_parallel", False)
    return parameter.numel() // tensor_parallel if is_split else parameter.numel()


_SIZES: Final = {"tp": 1, "pp": 1, "dp": 1}


class _NoRanks(Topology):
    """What a model asks of its topology while it is built."""

    def size(self, dim: str) -> int:
        return _SIZES[dim]

    def rank(self, dim: str) -> int:
        return 0

    def group(self, dim: str) -> dist.ProcessGroup:
        return cast("dist.ProcessGroup", None)
