"""Which stage of the pipeline holds which part of the model, so that the busiest stage has as little as possible to do.

Embeddings, projections and the MLM head, whose output matrix is the word embedding, are on the first stage: the hidden
states of the selected positions come back to it, and no parameter lives on two stages. Shared layers are on the first
stages of both networks' paths, and each network's own layers follow in order. A network skips stages where it has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from peer_scale.errors import UserError
from peer_scale.flops import (
    layer_matmul_flops,
    mlm_head_matmul_flops,
    projection_matmul_flops,
    score_head_matmul_flops,
)
from peer_scale.models.config import EncoderShape, ModelConfig, ModelPart
from peer_scale.pipeline.costs import Costs, PassCosts
from peer_scale.pipeline.instructions import Network
from peer_scale.pipeline.splits import Load, Share, Split, best_splits


@dataclass(frozen=True)
class Stage(ModelPart):
    """What one stage holds of the model."""

    def num_layers(self, network: Network) -> int:
        """Layers that the network's pass runs through here."""
        own = self.generator_layers if network == "generator" else self.ranker_layers
        return len(self.shared_layers) + len(own)


@dataclass(frozen=True)
class Placement:
    """The stages of a model, and what their work on one sequence costs (FLOPs; a layer's activations: hidden size)."""

    stages: tuple[Stage, ...]
    networks: tuple[Network, ...]
    costs: Costs

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages."""
        return len(self.stages)

    def path(self, network: Network) -> tuple[int, ...]:
        """Stages that the network's pass visits: the first, with the embeddings, and all that have layers of it."""
        return self._paths[network]

    @cached_property
    def _paths(self) -> dict[Network, tuple[int, ...]]:
        return {
            network: tuple(i for i, stage in enumerate(self.stages) if i == 0 or stage.num_layers(network))
            for network in self.networks
        }


def place(
    model: ModelConfig,
    num_stages: int,
    *,
    seq_length: int,
    num_predictions: int,
    activation_checkpointing: bool = False,
) -> Placement:
    """The placement whose busiest stage has the least to do; exact.

    Among equals the one with the least sum of squared stage costs, then the shortest paths, then layers early.

    Args:
        model: What to place.
        num_stages: At least 1.
        seq_length: Tokens a sequence.
        num_predictions: Selected positions a sequence.
        activation_checkpointing: Backward runs the layers' forward once more.

    Raises:
        UserError: There are more stages than could each have something to do.
    """
    return tied_placements(
        model,
        num_stages,
        seq_length=seq_length,
        num_predictions=num_predictions,
        activation_checkpointing=activation_checkpointing,
        limit=1,
    )[0]


def tied_placements(
    model: ModelConfig,
    num_stages: int,
    *,
    seq_length: int,
    num_predictions: int,
    activation_checkpointing: bool = False,
    limit: int,
) -> list[Placement]:
    """The first `limit` of the placements whose busiest stage has the least to do, in the order that `place` prefers.

    Arguments and errors are those of `place`.
    """
    layers = _layers(model)
    if not 1 <= num_stages <= sum(layers) + 1:
        raise UserError(
            f"--pipeline-model-parallel-size {num_stages}: the model's {sum(layers)} layers can fill 1 to "
            f"{sum(layers) + 1} stages"
        )
    flops = _ForwardFlops.of(model, seq_length, num_predictions, layer_backward=3 if activation_checkpointing else 2)
    load = flops.load(layers)
    return [_placement(model, flops, load, split) for split in best_splits(load, num_stages, limit)]


@dataclass(frozen=True)
class _ForwardFlops:
    """Forward FLOPs of one sequence in peer_scale.flops' actual accounting, and a layer's backward in forwards."""

    generator_layer: int
    ranker_layer: int
    generator_projection: int
    ranker_projection: int
    mlm_head: int
    ranking_head: int
    layer_backward: int

    @classmethod
    def of(cls, model: ModelConfig, seq_length: int, num_predictions: int, layer_backward: int) -> _ForwardFlops:
        generator, ranker = model.generator, model.ranker
        return cls(
            generator_layer=layer_matmul_flops(generator, seq_length),
            ranker_layer=layer_matmul_flops(ranker, seq_length) if ranker else 0,
            generator_projection=projection_matmul_flops(model, generator, seq_length),
            ranker_projection=projection_matmul_flops(model, ranker, seq_length) if ranker else 0,
            mlm_head=num_predictions * mlm_head_matmul_flops(model, generator),
            ranking_head=seq_length * score_head_matmul_flops(ranker) if ranker else 0,
            layer_backward=layer_backward,
        )

    def load(self, layers: Share) -> Load:
        """Forward and backward together; what is no layer has twice its forward as backward."""
        generator = (1 + self.layer_backward) * self.generator_layer
        ranker = (1 + self.layer_backward) * self.ranker_layer
        first = 3 * (self.generator_projection + self.ranker_projection + self.mlm_head)
        return Load(layers, Share(generator + ranker, generator, ranker), first=first, last=3 * self.ranking_head)


def _layers(model: ModelConfig) -> Share:
    """Shared layers, and what each network has beyond them."""
    shared = model.num_shared_layers
    ranker = model.ranker.num_layers - shared if model.ranker else 0
    return Share(shared, model.generator.num_layers - shared, ranker)


def _placement(model: ModelConfig, flops: _ForwardFlops, load: Load, split: Split) -> Placement:
    """The stages of a split, with their costs."""
    stages: list[Stage] = []
    before = Share(0, 0, 0)
    for index, share in enumerate(split):
        after = before.plus(share)
        stages.append(
            Stage(
                shared_layers=range(before.shared, after.shared),
                generator_layers=range(before.generator, after.generator),
                ranker_layers=range(before.ranker, after.ranker),
                has_embeddings=index == 0,
                has_mlm_head=index == 0,
                has_ranking_head=load.ends_ranker(before, share),
            )
        )
        before = after
    num_layers = [stage.num_layers("generator") for stage in stages]
    others = [flops.generator_projection * stage.has_embeddings for stage in stages]
    generator = _pass_costs(model.generator, flops.generator_layer, num_layers, others, flops.layer_backward)
    if model.ranker is None:
        nothing = (0,) * len(stages)
        ranker = PassCosts(nothing, nothing, nothing)
    else:
        num_layers = [stage.num_layers("ranker") for stage in stages]
        others = [
            flops.ranker_projection * stage.has_embeddings + flops.ranking_head * stage.has_ranking_head
            for stage in stages
        ]
        ranker = _pass_costs(model.ranker, flops.ranker_layer, num_layers, others, flops.layer_backward)
    costs = Costs(generator, ranker, head_forward=flops.mlm_head, head_backward=2 * flops.mlm_head)
    return Placement(tuple(stages), ("generator", "ranker") if model.ranker else ("generator",), costs)


def _pass_costs(
    shape: EncoderShape, layer_flops: int, num_layers: list[int], others: list[int], layer_backward: int
) -> PassCosts:
    """Costs of a network's pass from its number of layers on each stage and the FLOPs of what is no layer."""
    layers = [count * layer_flops for count in num_layers]
    return PassCosts(
        forward=tuple(layer + other for layer, other in zip(layers, others, strict=True)),
        backward=tuple(layer_backward * layer + 2 * other for layer, other in zip(layers, others, strict=True)),
        activations=tuple(count * shape.hidden_size for count in num_layers),
    )
