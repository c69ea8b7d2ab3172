"""The parameters that a rank of each stage will have, without any rank: the model is built on torch's meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import nn

from peer_scale.models.config import ModelConfig, decays, padded_vocab_size
from peer_scale.objectives.graph import Work
from peer_scale.objectives.objective import Objective
from peer_scale.objectives.task import build_model
from peer_scale.parallel.tensor_parallel import TensorParallel
from peer_scale.pipeline.placement import Placement
from peer_scale.planning.stage_works import stage_works

# a model is built whole and then divided: without process groups megatron-core's layers do not split themselves
_WHOLE: Final = TensorParallel(size=1, rank=0, group=None, sequence_parallel=False, device=torch.device("meta"))


@dataclass(frozen=True)
class Inventory:
    """Sizes of a rank's parameters (its tensor-parallel share), those that decay and those that do not.

    These are the optimizer's two groups, which DeepSpeed lays out one after the other. `reached` counts the numbers
    whose gradients each backward call of a micro-batch gives: all in one call without a pipeline, but on a stage one
    call per work.
    """

    decayed: tuple[int, ...]
    others: tuple[int, ...]
    reached: tuple[int, ...]

    @property
    def count(self) -> int:
        """All numbers."""
        return sum(self.decayed) + sum(self.others)


def take_inventory(
    model: ModelConfig, objective: Objective, placement: Placement, tensor_parallel: int
) -> tuple[Inventory, ...]:
    """Take one inventory for each stage; all tensor-parallel ranks have the same."""
    padded = replace(model, vocab_size=padded_vocab_size(model.vocab_size, tensor_parallel))
    inventories = []
    for stage, part in enumerate(placement.stages):
        with torch.device("meta"):
            parameters = dict(build_model(padded, objective, _WHOLE, part).named_parameters())
        sizes = {name: _local_size(parameter, tensor_parallel) for name, parameter in parameters.items()}
        decayed = tuple(size for name, size in sizes.items() if decays(name, parameters[name].ndim))
        others = tuple(size for name, size in sizes.items() if not decays(name, parameters[name].ndim))
        reached = _reached(placement, stage, sizes) if placement.num_stages > 1 else (sum(sizes.values()),)
        inventories.append(Inventory(decayed, others, reached))
    return tuple(inventories)


def _reached(placement: Placement, stage: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Count what each backward call of a stage reaches."""
    works = [part.work for part in stage_works(placement, stage) if part.work.has_backward]
    counts = [sum(size for name, size in sizes.items() if name.startswith(_reach(work))) for work in works]
    return tuple(count for count in counts if count)


def _reach(work: Work) -> tuple[str, ...]:
    """Say how the names begin of all parameters that the work's backward reaches."""
    heads = tuple(f"{head}." for head in work.heads)
    if work.network is None:
        return *heads, "embeddings.word."
    return *heads, "embeddings.", "shared_layers.", f"{work.network}."


def _local_size(parameter: nn.Parameter, tensor_parallel: int) -> int:
    is_split = getattr(parameter, "tensor_model_parallel", False)
    return parameter.numel() // tensor_parallel if is_split else parameter.numel()
