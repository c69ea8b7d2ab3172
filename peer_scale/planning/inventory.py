"""The parameters that a rank of each stage will have, without any rank: the model is built on torch's meta device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, cast

import torch
import torch.distributed as dist
from torch import nn

from peer_scale.models.config import ModelConfig, padded_vocab_size
from peer_scale.models.networks import PretrainingModel
from peer_scale.parallel.topology import Topology
from peer_scale.pipeline.placement import Placement


@dataclass(frozen=True)
class Inventory:
    """Sizes of a rank's parameters (its tensor-parallel share), those that decay and those that do not.

    These are the optimizer's two groups, which DeepSpeed lays out one after the other. `reached` counts the numbers
    whose gradients each backward call of a micro-batch gives: all in one call, but between stages a call a pass and one
    of the MLM head.
    """

    decayed: tuple[int, ...]
    others: tuple[int, ...]
    reached: tuple[int, ...]

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
            parameters = dict(PretrainingModel(padded, num_levels, topology, stage).named_parameters())
        sizes = {name: _local_size(parameter, tensor_parallel) for name, parameter in parameters.items()}
        decayed = tuple(size for name, size in sizes.items() if parameters[name].ndim >= 2)
        others = tuple(size for name, size in sizes.items() if parameters[name].ndim < 2)
        calls = _CALLS if placement.num_stages > 1 else (("",),)
        reached = [sum(size for name, size in sizes.items() if name.startswith(call)) for call in calls]
        inventories.append(Inventory(decayed, others, tuple(count for count in reached if count)))
    return tuple(inventories)


# which parameters the backward calls between stages reach
_CALLS = (
    ("mlm_head.", "embeddings.word."),
    ("embeddings.", "shared_layers.", "generator."),
    ("embeddings.", "shared_layers.", "ranker.", "ranking_head."),
)


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
