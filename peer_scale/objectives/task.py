"""The module that the training engine wraps: runs works of the objective's graph on a micro-batch.

`PretrainingModel` beneath it is architecture only; what a work computes is the objective's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from peer_scale.models.config import ModelConfig, ModelPart
from peer_scale.models.networks import HeadBuilder, PretrainingModel, whole_model
from peer_scale.objectives.graph import Graph, Work
from peer_scale.objectives.objective import Objective, SumsLayout
from peer_scale.objectives.works import Outcome, StepInfo, WorkContext, call
from peer_scale.parallel.tensor_parallel import TensorParallel
from peer_scale.samples.examples import Batch

TaskOutput = tuple[Tensor | None, Tensor, dict[str, Tensor]]
"""A share of the global loss (a scalar; None without one), sums fp64 [len(SumsLayout)], and values by name."""


class PretrainingTask(nn.Module):
    """All works of an objective, or those that a pipeline stage has its part in."""

    def __init__(
        self, config: ModelConfig, objective: Objective, tensor_parallel: TensorParallel, part: ModelPart | None = None
    ) -> None:
        super().__init__()
        self.objective, self.graph, self.sums = objective, objective.graph(config), SumsLayout(objective)
        self.part = part or whole_model(config, dict(self.graph.networks))
        self.model = build_model(config, objective, tensor_parallel, self.part)
        self.call = call

    def forward(
        self, works: Sequence[str], batch: Batch, step: StepInfo, values: Mapping[str, Tensor] | None = None
    ) -> TaskOutput:
        """Run works one after the other.

        Args:
            works: names, in an order in which they can run.
            batch: the micro-batch.
            step: the normalisers of the whole step, and its phase.
            values: what works outside of this call have given. A network that began on an earlier stage finds its
                hidden states [T, H] under its work's name, and leaves them there where it does not end here.

        Returns:
            See `TaskOutput`; the values are those that these works gave.
        """
        mail, given = dict(values or {}), dict[str, Tensor]()
        losses: dict[str, Tensor] = {}
        sums = self._sizes(batch) if self._counts(works) else {}
        for name in works:
            outcome = self._run(self.graph.work(name), batch, step, mail)
            losses |= outcome.losses
            sums |= outcome.sums
            mail |= outcome.values
            given |= outcome.values
        return self._weighted(losses, step), self._packed(sums | losses, batch), given

    def _run(self, work: Work, batch: Batch, step: StepInfo, mail: Mapping[str, Tensor]) -> Outcome:
        values = {name: mail[name] for name in work.takes if name in mail}
        context = WorkContext(self.model, batch, values, step.warmup, self.call)
        if work.network is None:
            return work.end(context, None)
        hidden = mail.get(work.name)
        if hidden is None:
            assert work.begin is not None, "a network begins with token ids"
            hidden = self.model.embed(work.network, work.begin(context), batch.token_types, batch.sequences)
        hidden = self.model.run_layers(work.network, hidden, batch.sequences)
        if work.network in self.part.ends:
            return work.end(context, hidden)
        return Outcome(values={work.name: hidden})

    def _counts(self, works: Sequence[str]) -> bool:
        """Say whether these works count the micro-batch's positions: the first work does, where it begins."""
        first = self.graph.works[0]
        return first.name in works and self.part.has_embeddings

    def _sizes(self, batch: Batch) -> dict[str, Tensor]:
        lengths = batch.sequences.lengths
        sizes = {
            "selected": len(batch.positions),
            "tokens": sum(lengths),
            "token_pairs": sum(length**2 for length in lengths),
        }
        device = batch.input_ids.device
        return {name: torch.full((), size, dtype=torch.float64, device=device) for name, size in sizes.items()}

    def _weighted(self, losses: Mapping[str, Tensor], step: StepInfo) -> Tensor | None:
        counts = step.counts._asdict()
        weighted = [
            loss.weight * losses[loss.name] / counts[loss.normaliser]
            for loss in self.objective.losses
            if loss.name in losses
        ]
        total = None
        for term in weighted:
            total = term if total is None else total + term
        return total

    def _packed(self, sums: Mapping[str, Tensor], batch: Batch) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64, device=batch.input_ids.device)
        scalars = [sums[name].detach() if name in sums else zero for name in self.sums.names]
        # number formats are changed for all of one format at once: a kernel for each scalar would cost its launch
        for dtype in {each.dtype for each in scalars} - {torch.float64}:
            places = [place for place, each in enumerate(scalars) if each.dtype == dtype]
            changed = torch.stack([scalars[place] for place in places]).double().unbind()
            for place, each in zip(places, changed, strict=True):
                scalars[place] = each
        return torch.stack(scalars)


def build_model(
    config: ModelConfig, objective: Objective, tensor_parallel: TensorParallel, part: ModelPart | None = None
) -> PretrainingModel:
    """Build the model that an objective trains, or a part of it, with the heads that the part's works need."""
    graph = objective.graph(config)
    networks = dict(graph.networks)
    part = part or whole_model(config, networks)
    heads = _heads(graph, objective.heads(config), part)
    topped = frozenset(work.network for work in graph.works if work.network is not None and work.end_layers)
    return PretrainingModel(config, networks, heads, tensor_parallel, part, topped=topped)


def _heads(graph: Graph, builders: Mapping[str, HeadBuilder], part: ModelPart) -> dict[str, dict[str, HeadBuilder]]:
    """Sort the heads of a part by the network after whose layers they come in the model's order of parameters."""
    sorted_heads: dict[str, dict[str, HeadBuilder]] = {name: {} for name, _ in graph.networks}
    network = graph.networks[0][0]
    for work in graph.works:
        network = work.network or network
        is_here = part.has_embeddings if work.network is None else work.network in part.ends
        if is_here:
            sorted_heads[network] |= {name: builders[name] for name in work.heads}
    return sorted_heads
