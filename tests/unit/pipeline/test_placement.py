import itertools
import time
from collections.abc import Iterator

import pytest

from peer_scale.errors import UserError
from peer_scale.flops import actual_train_flops
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.objectives.graph import Graph, SampleSize
from peer_scale.objectives.masked_lm import MaskedLanguageModel
from peer_scale.objectives.objective import Objective
from peer_scale.objectives.tqr import TokenQualityRanking
from peer_scale.pipeline.placement import Placement, place, tied_placements
from peer_scale.pipeline.search import choose_placement
from peer_scale.settings.presets import find_preset

SEQ_LENGTH, NUM_PREDICTIONS = 64, 10
SIZE, LONG = SampleSize.of_sequence(SEQ_LENGTH, NUM_PREDICTIONS), SampleSize.of_sequence(512, 77)


def encoder(layers: int, hidden: int) -> EncoderShape:
    return EncoderShape(layers, hidden, 4 * hidden, hidden // 32)


def peer(generator: int, ranker: int, shared: int, vocab_size: int = 500) -> ModelConfig:
    shapes = encoder(generator, 64), encoder(ranker, 64)
    return ModelConfig(*shapes, num_shared_layers=shared, vocab_size=vocab_size, embedding_size=64)


MODELS = {
    "peer": peer(3, 5, 2),
    "peer with a costly head": peer(2, 4, 1, vocab_size=9000),
    "peer whose ranking head tips the scales": peer(1, 4, 0, vocab_size=100),
    "nothing but shared": peer(2, 2, 2),
    "electra": ModelConfig(encoder(3, 32), encoder(3, 96), embedding_size=48, vocab_size=700),
    "bert": ModelConfig(encoder(5, 64), None, embedding_size=64, vocab_size=3000),
}


def objective_of(model: ModelConfig) -> Objective:
    return TokenQualityRanking() if model.ranker else MaskedLanguageModel()


def graph_of(model: ModelConfig) -> Graph:
    return objective_of(model).graph(model)


def train_flops(model: ModelConfig, size: SampleSize = SIZE, **more: bool) -> float:
    return actual_train_flops(model, objective_of(model), size, samples=1, **more)


def layer_flops(model: ModelConfig, hidden: int) -> float:
    """FLOPs of one more layer of that width, from the accounting of whole models."""
    more = ModelConfig(encoder(2, hidden), None, embedding_size=model.embedding_size)
    less = ModelConfig(encoder(1, hidden), None, embedding_size=model.embedding_size)
    return train_flops(more) - train_flops(less)


def cuts(num_layers: int, first: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    """Every way to give layers in order to stages from `first` on."""
    return itertools.combinations_with_replacement(range(first, num_stages), num_layers)


def brute_force(model: ModelConfig, num_stages: int) -> tuple[float, float, int]:
    """Largest stage cost, sum of squares and stages visited of the best way to give each layer a stage."""
    shared = model.num_shared_layers
    ranker_layers = model.ranker.num_layers if model.ranker else 0
    generator_layer = layer_flops(model, model.generator.hidden_size)
    ranker_layer = layer_flops(model, model.ranker.hidden_size) if model.ranker else 0
    num_layers = model.generator.num_layers, ranker_layers
    on_first_stage = 3 * NUM_PREDICTIONS * 2 * model.embedding_size * (model.generator.hidden_size + model.vocab_size)
    for shape in (model.generator, model.ranker):
        if shape and shape.hidden_size != model.embedding_size:
            on_first_stage += 3 * SEQ_LENGTH * 2 * model.embedding_size * shape.hidden_size
    layers = num_layers[0] * generator_layer + num_layers[1] * ranker_layer
    ranking_head = train_flops(model) - layers - on_first_stage
    best = (float("inf"), float("inf"), 0)
    for of_shared in cuts(shared, 0, num_stages):
        first = of_shared[-1] if of_shared else 0
        for of_generator in cuts(num_layers[0] - shared, first, num_stages):
            for of_ranker in cuts(max(ranker_layers - shared, 0), first, num_stages):
                if {*of_shared, *of_generator, *of_ranker} | {0} != set(range(num_stages)):
                    continue
                costs = [0.0] * num_stages
                costs[0] = on_first_stage
                for stage in (*of_shared, *of_generator):
                    costs[stage] += generator_layer
                for stage in (*of_shared, *of_ranker) if model.ranker else ():
                    costs[stage] += ranker_layer
                if model.ranker:
                    costs[(*of_shared, *of_ranker)[-1]] += ranking_head
                visits = len({*of_shared, *of_generator}) + len({*of_shared, *of_ranker})
                best = min(best, (max(costs), sum(cost * cost for cost in costs), visits))
    return best


def figures(placement: Placement) -> tuple[int, int, int]:
    costs = placement.costs.stage_times()
    networks = [name for name, _ in placement.graph.networks]
    visits = sum(bool(stage.num_layers(network)) for stage in placement.stages for network in networks)
    return max(costs), sum(cost * cost for cost in costs), visits


@pytest.mark.parametrize(
    ("name", "num_stages"),
    [(name, n) for name in MODELS for n in (1, 2, 3, 4) if (name, n) != ("nothing but shared", 4)],
)
def test_best_of_all_placements(name: str, num_stages: int) -> None:
    model = MODELS[name]
    placement = place(graph_of(model), num_stages, size=SIZE)
    expected = brute_force(model, num_stages)
    assert figures(placement)[0] == pytest.approx(expected[0], rel=1e-12)
    assert figures(placement)[1] == pytest.approx(expected[1], rel=1e-12)
    assert figures(placement)[2] == expected[2]


@pytest.mark.parametrize("num_stages", [1, 2, 4, 7])
@pytest.mark.parametrize("name", ["peer-base", "peer-large", "electra-base", "electra-small", "bert-base"])
def test_stages_together_are_the_model(name: str, num_stages: int) -> None:
    model = find_preset(name).model
    for placement in tied_placements(graph_of(model), num_stages, size=LONG, limit=5):
        stages, shared = placement.stages, model.num_shared_layers
        counts = {"generator": model.generator.num_layers - shared}
        if model.ranker:
            counts["ranker"] = model.ranker.num_layers - shared
        assert [index for stage in stages for index in stage.shared_layers] == list(range(shared))
        for network, count in counts.items():
            assert [index for stage in stages for index in stage.layers(network)] == list(range(count))
        last_shared = max((i for i, stage in enumerate(stages) if stage.shared_layers), default=0)
        assert not any(stage.layers(network) for stage in stages[:last_shared] for network in counts)
        assert [stage.has_embeddings for stage in stages] == [True] + [False] * (num_stages - 1)
        assert placement.path("mlm_head") == (0,)
        assert [network for network, _ in placement.graph.networks] == list(counts)
        for network in counts:  # where a network ends its head is
            assert [i for i, stage in enumerate(stages) if network in stage.ends] == [placement.path(network)[-1]]
        assert {network for stage in stages for network in stage.ends} == set(counts)
        assert sum(placement.costs.stage_times()) == train_flops(model, LONG)


def test_activation_checkpointing_counts_the_layers_once_more() -> None:
    model = find_preset("electra-base").model
    placement = place(graph_of(model), 3, size=LONG, activation_checkpointing=True)
    expected = train_flops(model, LONG, activation_checkpointing=True)
    assert sum(placement.costs.stage_times()) == expected


def test_a_pass_skips_stages_without_its_layers() -> None:
    # the MLM head is so costly that the first stage has nothing else
    model = ModelConfig(encoder(2, 64), encoder(4, 64), num_shared_layers=2, vocab_size=80_000, embedding_size=64)
    placement = place(graph_of(model), 3, size=SIZE)
    assert placement.stages[0].num_layers("ranker") == 0
    assert placement.path("generator") == (0, 1)
    assert placement.path("ranker") == (0, 1, 2)


@pytest.mark.parametrize("num_stages", [0, -1, 8, 100])
def test_number_of_stages_that_cannot_be_filled(num_stages: int) -> None:
    with pytest.raises(UserError, match=rf"^--pipeline-model-parallel-size {num_stages}: .* 6 layers can fill 1 to 7"):
        place(graph_of(peer(3, 5, 2)), num_stages, size=SIZE)


def test_most_stages_have_a_layer_each() -> None:
    placement = place(graph_of(peer(3, 5, 2)), 7, size=SIZE)
    layers = [(s.shared_layers, s.layers("generator"), s.layers("ranker")) for s in placement.stages]
    assert [sum(map(len, kinds)) for kinds in layers] == [0, 1, 1, 1, 1, 1, 1]


def test_chosen_placement_is_one_of_the_best_and_always_the_same() -> None:
    graph = graph_of(find_preset("peer-base").model)
    chosen = choose_placement(graph, 4, size=LONG)
    assert chosen in tied_placements(graph, 4, size=LONG, limit=100)
    assert max(chosen.costs.stage_times()) == max(place(graph, 4, size=LONG).costs.stage_times())
    choose_placement.cache_clear()
    assert choose_placement(graph, 4, size=LONG) == chosen


def test_24_and_12_layers_on_16_stages_take_less_than_a_second() -> None:
    graph = graph_of(find_preset("peer-large").model)
    start = time.process_time()
    place(graph, 16, size=LONG)
    assert time.process_time() - start < 1
