"""Pipelines with stages and costs written down by hand, over the works of PEER: a generator, its head, a ranker."""

from peer_scale.models.config import EncoderShape, ModelConfig, ModelPart
from peer_scale.objectives.graph import Graph
from peer_scale.objectives.tqr import TokenQualityRanking
from peer_scale.pipeline.costs import Costs, WorkCosts


def peer_graph() -> Graph:
    """The works; what the networks' sizes are is said by each stage's part."""
    shape = EncoderShape(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1)
    return TokenQualityRanking().graph(ModelConfig(generator=shape, ranker=shape))


def part(
    shared: range = range(0), generator: range = range(0), ranker: range = range(0), first: bool = False, ends: str = ""
) -> ModelPart:
    return ModelPart(shared, (("generator", generator), ("ranker", ranker)), first, tuple(ends.split()))


def peer_costs(generator: WorkCosts, ranker: WorkCosts, head_forward: int, head_backward: int) -> Costs:
    """The head is on the first stage and keeps nothing."""
    elsewhere = (0,) * (len(generator.forward) - 1)
    head = WorkCosts((head_forward, *elsewhere), (head_backward, *elsewhere), (0, *elsewhere))
    return Costs((("generator", generator), ("mlm_head", head), ("ranker", ranker)))
