"""Which stage of the pipeline holds which part of the model, so that the busiest stage has as little as possible to do.

Embeddings, projections and the works beside the word table (the MLM head, whose output matrix it is) are on the first
stage: the hidden states of the selected positions come back to it, and no parameter lives on two stages. Shared layers
are on the first stages of all networks' paths, and each network's own layers follow in order. A network skips stages
where it has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from peer_scale.errors import UserError
from peer_scale.models.config import ModelPart
from peer_scale.models.costs import layer_matmul_flops
from peer_scale.objectives.graph import Graph, SampleSize, Work
from peer_scale.pipeline.costs import Costs, WorkCosts
from peer_scale.pipeline.splits import LayerCounts, Load, Split, best_splits, no_layers, plus


@dataclass(frozen=True)
class Placement:
    """The stages of a model, and what their work on one sequence costs (FLOPs; a layer's activations: hidden size).

    `costs` are those of the sequences that the stages were chosen for; `costs_of` gives those of others.
    """

    graph: Graph
    stages: tuple[ModelPart, ...]
    costs: Costs

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages."""
        return len(self.stages)

    def path(self, work: str) -> tuple[int, ...]:
        """List the stages that a work visits.

        Those of its network: the first, with the embeddings, and all that have layers of it; else the first alone.
        """
        return self._paths[work]

    def costs_of(self, size: SampleSize, *, activation_checkpointing: bool = False) -> Costs:
        """Give each work's costs on each stage for samples of any size."""
        return _Flops(self.graph, size, layer_backward=3 if activation_checkpointing else 2).costs(self.stages)

    @cached_property
    def _paths(self) -> dict[str, tuple[int, ...]]:
        return {work.name: _path(self.stages, work) for work in self.graph.works}


def place(graph: Graph, num_stages: int, *, size: SampleSize, activation_checkpointing: bool = False) -> Placement:
    """Find the placement whose busiest stage has the least to do; exact.

    Among equals the one with the least sum of squared stage costs, then the shortest paths, then layers early.

    Args:
        graph: What to place.
        num_stages: At least 1.
        size: Of a sequence.
        activation_checkpointing: Backward runs the layers' forward once more.

    Raises:
        UserError: There are more stages than could each have something to do.
    """
    return tied_placements(graph, num_stages, size=size, activation_checkpointing=activation_checkpointing, limit=1)[0]


def tied_placements(
    graph: Graph, num_stages: int, *, size: SampleSize, activation_checkpointing: bool = False, limit: int
) -> list[Placement]:
    """Find the first `limit` of the placements whose busiest stage has the least to do, in the order of `place`.

    Arguments and errors are those of `place`.
    """
    layers = (graph.num_shared_layers, *(graph.num_own_layers(name) for name, _ in graph.networks))
    if not 1 <= num_stages <= sum(layers) + 1:
        raise UserError(
            f"--pipeline-model-parallel-size {num_stages}: the model's {sum(layers)} layers can fill 1 to "
            f"{sum(layers) + 1} stages"
        )
    flops = _Flops(graph, size, layer_backward=3 if activation_checkpointing else 2)
    load = flops.load(layers)
    return [_placement(flops, load, split) for split in best_splits(load, num_stages, limit)]


@dataclass(frozen=True)
class _Flops:
    """FLOPs of one sequence in the actual accounting, in whole numbers; `layer_backward`: of a layer, in forwards."""

    graph: Graph
    size: SampleSize
    layer_backward: int

    def layer(self, network: str) -> int:
        size, shape = self.size, self.graph.shape(network)
        return round(layer_matmul_flops(shape, size.tokens, size.token_pairs, self.graph.blocks))

    def begin(self, work: Work) -> int:
        """Count a work's forward beside its layers, where it begins."""
        return round(self.size.count(work.begin_costs, "flops"))

    def end(self, work: Work) -> int:
        """Count a work's forward beside its layers and those of its heads, where it ends."""
        return round(self.size.count(work.end_costs, "flops"))

    def load(self, layers: LayerCounts) -> Load:
        """Add up forward and backward, for all works of each network."""
        networks = [name for name, _ in self.graph.networks]
        own = [sum(self._passes(work) * self.layer(name) for work in self._works_of(name)) for name in networks]
        first = sum(self._others(work, self.begin(work)) for work in self.graph.works)
        first += sum(self._others(work, self.end(work)) for work in self.graph.works if work.network is None)
        ends = tuple(sum(self._end_load(work) for work in self._works_of(name)) for name in networks)
        return Load(layers, (sum(own), *own), first, ends)

    def _works_of(self, network: str) -> list[Work]:
        return [work for work in self.graph.works if work.network == network]

    def _end_load(self, work: Work) -> int:
        assert work.network is not None
        return work.end_layers * self._passes(work) * self.layer(work.network) + self._others(work, self.end(work))

    def _passes(self, work: Work) -> int:
        return 1 + self.layer_backward * work.has_backward

    @staticmethod
    def _others(work: Work, forward: int) -> int:
        return (3 if work.has_backward else 1) * forward

    def costs(self, stages: tuple[ModelPart, ...]) -> Costs:
        """Give each work's costs on each stage."""
        return Costs(tuple((work.name, self._work_costs(stages, work)) for work in self.graph.works))

    def _work_costs(self, stages: tuple[ModelPart, ...], work: Work) -> WorkCosts:
        path = _path(stages, work)
        others = [self.begin(work) * (i == path[0]) + self.end(work) * (i == path[-1]) for i in range(len(stages))]
        if work.network is None:
            layers = hidden = [0] * len(stages)
        else:
            counts = [stage.num_layers(work.network) for stage in stages]
            counts[path[-1]] += work.end_layers
            layers = [count * self.layer(work.network) for count in counts]
            hidden = [count * self.graph.shape(work.network).hidden_size for count in counts]
        nothing = (0,) * len(stages)
        backward = tuple(self.layer_backward * one + 2 * other for one, other in zip(layers, others, strict=True))
        return WorkCosts(
            forward=tuple(one + other for one, other in zip(layers, others, strict=True)),
            backward=backward if work.has_backward else nothing,
            activations=tuple(hidden) if work.has_backward else nothing,
        )


def _placement(flops: _Flops, load: Load, split: Split) -> Placement:
    """Make the stages of a split, with their costs."""
    networks = [name for name, _ in flops.graph.networks]
    stages: list[ModelPart] = []
    before = no_layers(len(networks))
    for index, counts in enumerate(split):
        after = plus(before, counts)
        stages.append(
            ModelPart(
                shared_layers=range(before[0], after[0]),
                own_layers=tuple((name, range(before[own], after[own])) for own, name in enumerate(networks, start=1)),
                has_embeddings=index == 0,
                ends=tuple(name for i, name in enumerate(networks) if load.ends_network(i, before, counts)),
            )
        )
        before = after
    return Placement(flops.graph, tuple(stages), flops.costs(tuple(stages)))


def _path(stages: tuple[ModelPart, ...], work: Work) -> tuple[int, ...]:
    if work.network is None:
        return (0,)
    return tuple(index for index, stage in enumerate(stages) if index == 0 or stage.num_layers(work.network))
