"""Forward, backward and update of one step where each rank has the whole depth of the model."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from peer_scale.objectives.tasks import GlobalCounts
from peer_scale.parallel.topology import Topology
from peer_scale.samples.examples import Batch


class Passes(Protocol):
    """What runs a rank's share of a step; sums are fp64 [len(statistics)], over this rank's micro-batches."""

    def train(
        self, batches: Sequence[Batch], counts: GlobalCounts, warmup: bool, seed_dropout: Callable[..., None]
    ) -> Tensor:
        """Forward and backward of all micro-batches and the optimizer's update; gives the sums."""

    def evaluate(self, batches: Sequence[Batch], counts: GlobalCounts, warmup: bool) -> Tensor:
        """The sums of a forward pass without dropout."""


class WholeModel:
    """One forward and one backward a micro-batch."""

    def __init__(self, engine: Any, topology: Topology) -> None:
        self._engine, self._topology = engine, topology
        self._num_sums = len(engine.module.statistics)

    def train(
        self, batches: Sequence[Batch], counts: GlobalCounts, warmup: bool, seed_dropout: Callable[..., None]
    ) -> Tensor:
        """See `Passes`."""
        engine = self._engine
        # DeepSpeed averages over micro-batches and data-parallel ranks; our loss is a share of the global sum
        scale = len(batches) * self._topology.size("dp")
        sums = self._zeros()
        for micro, batch in enumerate(batches):
            seed_dropout(micro)
            loss, statistics = engine(batch, counts, warmup)
            engine.backward(loss * scale)
            engine.step()
            sums += statistics
        return sums

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], counts: GlobalCounts, warmup: bool) -> Tensor:
        """See `Passes`."""
        self._engine.eval()
        sums = self._zeros()
        for batch in batches:
            sums += self._engine(batch, counts, warmup)[1]
        self._engine.train()
        return sums

    def _zeros(self) -> Tensor:
        return torch.zeros(self._num_sums, dtype=torch.float64, device=self._topology.device)
