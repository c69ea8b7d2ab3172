"""Forward, backward and update of one step where each rank has the whole depth of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from peer_scale.objectives.engine import Engine
from peer_scale.objectives.works import StepInfo
from peer_scale.parallel.topology import Topology
from peer_scale.samples.examples import Batch


class Runner(Protocol):
    """What runs a rank's share of a step; sums are fp64 [len(SumsLayout)], over this rank's micro-batches."""

    def train(self, batches: Sequence[Batch], step: StepInfo, seed_dropout: Callable[..., None]) -> Tensor:
        """Run forward and backward of all micro-batches and the optimizer's update; give the sums."""

    def evaluate(self, batches: Sequence[Batch], step: StepInfo) -> Tensor:
        """Give the sums of a forward pass without dropout."""


class WholeModelRunner:
    """Runs all works of a micro-batch in one forward call, and one backward call after it."""

    def __init__(self, engine: Engine, topology: Topology) -> None:
        self._engine, self._topology = engine, topology
        self._works = tuple(work.name for work in engine.module.graph.works)
        self._num_sums = len(engine.module.sums)
        # DeepSpeed averages over data-parallel ranks; our loss is a share of the global sum
        self._scale = topology.size("dp")

    def train(self, batches: Sequence[Batch], step: StepInfo, seed_dropout: Callable[..., None]) -> Tensor:
        """See `Runner`."""
        engine = self._engine
        sums = self._zeros()
        for micro, batch in enumerate(batches):
            seed_dropout(micro)
            engine.set_gradient_accumulation_boundary(micro == len(batches) - 1)
            loss, of_micro_batch, _ = engine(self._works, batch, step)
            assert loss is not None, "the works have losses"
            engine.backward(loss * self._scale, scale_wrt_gas=False)
            engine.step()
            sums += of_micro_batch
        return sums

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], step: StepInfo) -> Tensor:
        """See `Runner`."""
        self._engine.eval()
        sums = self._zeros()
        for batch in batches:
            sums += self._engine(self._works, batch, step)[1]
        self._engine.train()
        return sums

    def _zeros(self) -> Tensor:
        return torch.zeros(self._num_sums, dtype=torch.float64, device=self._topology.device)
