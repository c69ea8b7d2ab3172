"""The forward passes of one pipeline stage: the same pieces as `PretrainingTask`, cut where stages meet."""

from __future__ import annotations

from torch import Tensor

from peer_scale.models.config import ModelConfig
from peer_scale.models.networks import select
from peer_scale.objectives.config import ObjectiveConfig
from peer_scale.objectives.tasks import GlobalCounts, PretrainingTask, corrupt
from peer_scale.parallel.sequence import join_sequence
from peer_scale.parallel.topology import Topology
from peer_scale.pipeline.instructions import Network
from peer_scale.pipeline.placement import Placement
from peer_scale.samples.examples import Batch


class StageTask(PretrainingTask):
    """What the engine of a stage wraps; `forward` is told which piece of work to do.

    Hidden states are [S, B, H] (a slice of the sequence under sequence parallelism), selected ones [B*P, H].
    """

    def __init__(
        self, config: ModelConfig, objective: ObjectiveConfig, topology: Topology, placement: Placement
    ) -> None:
        stage = topology.rank("pp")
        super().__init__(config, objective, topology, placement.stages[stage])
        self._ends = {network: stage == placement.path(network)[-1] for network in placement.networks}
        self._topology = topology

    def forward(self, work: str, *inputs: object) -> object:  # type: ignore[override]
        """Do `work`: "generator" or "ranker" (this stage's layers of it), or "head" (the MLM head)."""
        return {"generator": self._generator, "ranker": self._ranker, "head": self._head}[work](*inputs)  # type: ignore[operator]

    def _generator(self, batch: Batch, hidden: Tensor | None) -> Tensor:
        """Hidden states; on the generator's last stage those of the selected positions."""
        hidden = self._layers("generator", batch, batch.masked_ids, hidden)
        if not self._ends["generator"]:
            return hidden
        return select(join_sequence(hidden, self._topology), batch.positions)

    def _head(self, batch: Batch, selected: Tensor, counts: GlobalCounts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss, corrupted ids, labels and statistics; the ids are the original ones where there is no ranker."""
        loss, generated, statistics = self.masked_lm(selected, batch, counts)
        return loss, *corrupt(batch, generated, self.objective), self.statistics.pack(statistics)

    def _ranker(
        self,
        batch: Batch,
        hidden: Tensor | None,
        corrupted: tuple[Tensor, Tensor] | None,
        counts: GlobalCounts,
        warmup: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states; on the ranker's last stage the loss and statistics.

        `corrupted`, ids and labels, is needed on the first and on the last stage.
        """
        hidden = self._layers("ranker", batch, corrupted[0] if corrupted else None, hidden)
        if not self._ends["ranker"]:
            return hidden
        assert corrupted is not None, "the ranking head needs labels"
        loss, statistics = self.ranking(join_sequence(hidden, self._topology), *corrupted, batch, counts, warmup)
        return loss, self.statistics.pack(statistics)

    def _layers(self, network: Network, batch: Batch, ids: Tensor | None, hidden: Tensor | None) -> Tensor:
        module = getattr(self.model, network)
        if hidden is None:
            assert ids is not None, "the first stage needs token ids"
            hidden = self.model.embed(module, ids, batch.token_types)
        return self.model.run_layers(module, hidden, batch.is_token)
