"""What a graph of works promises to those that read it, and what it refuses."""

import pytest

from peer_scale.models.config import EncoderShape
from peer_scale.objectives.graph import Cost, Graph, SampleSize, Value, Work
from peer_scale.settings.presets import find_preset, preset_names

SHAPE = EncoderShape(num_layers=3, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2)
NETWORKS = (("lower", SHAPE), ("upper", SHAPE))


def nothing(*_):
    return None


def network(name, **fields):
    return Work(name, nothing, network=name, begin=nothing, **fields)


STATES, IDS = Value("states", "compute", 8), Value("ids", "int64")


def test_look_ups():
    works = (
        network("lower", gives=(STATES,)),
        Work("head", nothing, end_takes=("states",), gives=(IDS,), has_loss=True),
        network("upper", begin_takes=("ids",), end_takes=("ids",)),
    )
    graph = Graph(NETWORKS, 1, works)
    assert graph.work("head") is works[1] and graph.value("ids") is IDS
    assert graph.giver("states") is works[0] and graph.giver("ids") is works[1]
    assert graph.takers("states") == (works[1],)
    assert graph.takers("ids") == (works[2],), "once, though it is taken at both ends"
    assert works[2].takes == ("ids", "ids")
    assert graph.shape("upper") is SHAPE and graph.num_own_layers("upper") == 2
    assert [work.has_backward for work in works] == [True, True, False]
    assert STATES.has_gradient and not IDS.has_gradient


@pytest.mark.parametrize(
    ("works", "said"),
    [
        ([Work("head", nothing, end_takes=("ids",))], "before they are given"),
        (
            [network("upper", begin_takes=("ids",)), network("lower", gives=(IDS,))],
            "upper takes ('ids',) before they are given",
        ),
        ([Work("head", nothing, begin=nothing)], "only a network has a beginning"),
        ([Work("upper", nothing, network="upper")], "only a network has a beginning"),
        (
            [network("lower", gives=(STATES,)), *(Work(n, nothing, end_takes=("states",)) for n in "ab")],
            "the gradient of states comes from 2 works",
        ),
        ([network("lower", gives=(STATES,))], "the gradient of states comes from 0 works"),
        (
            [network("lower", gives=(STATES,)), network("upper", end_takes=("states",))],
            "only works without layers take values with a gradient",
        ),
    ],
)
def test_what_cannot_run_is_refused(works, said):
    with pytest.raises(AssertionError) as error:
        Graph(NETWORKS, 0, tuple(works))
    assert said in str(error.value)


def test_costs_of_a_sequence():
    size = SampleSize.of_sequence(tokens=100, selected=15)
    costs = (Cost("token", flops=3, activations=1), Cost("position", flops=7), Cost("position", flops=2))
    assert size.count(costs, "flops") == 3 * 100 + 9 * 15
    assert size.count(costs, "activations") == 100
    assert size.count((), "workspace") == 0
    assert size.token_pairs == 10_000
    mean = SampleSize(tokens=12.5, selected=1.5, token_pairs=300.0)
    assert mean.count(costs, "flops") == 3 * 12.5 + 9 * 1.5


@pytest.mark.parametrize("name", preset_names())
def test_graphs_of_the_presets(name):
    preset = find_preset(name)
    objective, model = preset.objective, preset.model
    graph = objective.graph(model)
    assert graph.works[0].network is not None, "counts positions: it begins where the batch is"
    names = [work.name for work in graph.works]
    values = [value.name for work in graph.works for value in work.gives]
    assert len(set(names)) == len(names) and len(set(values)) == len(values)
    assert all(graph.takers(value) for value in values), "nothing is made for nobody"
    used = [head for work in graph.works for head in work.heads]
    assert sorted(used) == sorted(objective.heads(model))
    assert sum(work.has_loss for work in graph.works) == len(objective.losses)
    assert {work.network for work in graph.works} - {None} == dict(graph.networks).keys()
    for work in graph.works:
        assert (work.end_layers > 0) <= (work.network is not None)
        takers = [taker for value in work.gives for taker in graph.takers(value.name)]
        assert all(names.index(work.name) < names.index(taker.name) for taker in takers)
    assert all(graph.num_own_layers(network) >= 0 for network, _ in graph.networks)
