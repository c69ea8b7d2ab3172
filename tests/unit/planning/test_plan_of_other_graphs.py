"""Plans follow the graph, whatever its works: a second head beside the word table, a pass without a backward."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
from torch import nn

from peer_scale.models.config import ModelConfig
from peer_scale.models.networks import HeadBuilder
from peer_scale.objectives.graph import Cost, Graph, Value, Work
from peer_scale.objectives.tqr import TokenQualityRanking
from peer_scale.pipeline.placement import Placement
from peer_scale.pipeline.schedule import build_schedule
from peer_scale.pipeline.search import choose_placement
from peer_scale.pipeline.simulator import validate
from peer_scale.planning.estimate import make_plan
from peer_scale.planning.inventory import take_inventory
from peer_scale.planning.layout import GIB, Cluster, ParallelLayout, Workload
from peer_scale.planning.memory import heads_memory, work_activations
from peer_scale.planning.report import describe
from peer_scale.planning.stage_works import stage_part
from peer_scale.planning.traffic import pipeline_traffic, tensor_traffic
from peer_scale.settings.presets import find_preset

CLUSTER = Cluster(4, 8, 80 * GIB, 989.4e12, 300e9, 40e9)
HIDDEN, POSITIONS, LENGTH, SIZE = 256, 19, 128, 4  # of peer-small, a sequence and a micro-batch


def never(*_: object) -> None:
    raise AssertionError("a plan runs nothing")


@dataclass(frozen=True)
class WithMoreWorks(TokenQualityRanking):
    """PEER; its ranker's states come back to a head beside the word table, and its generator looks at the text once."""

    def graph(self, model: ModelConfig) -> Graph:
        generator, head, ranker = super().graph(model).works
        works = (
            Work("look", never, "generator", begin=never),
            generator,
            head,
            replace(ranker, gives=(Value("picked", "compute", HIDDEN),)),
            Work(
                "second_head",
                never,
                end_takes=("picked",),
                heads=("second_head",),
                has_loss=True,
                end_costs=(Cost("position", flops=10**6, activations=7, workspace=9000, reduced_bytes=11),),
            ),
        )
        return Graph(tuple(model.networks.items()), model.num_shared_layers, works)

    def heads(self, model: ModelConfig) -> Mapping[str, HeadBuilder]:
        return {**super().heads(model), "second_head": lambda _: nn.Linear(HIDDEN, 16)}


def workload(objective: TokenQualityRanking) -> Workload:
    preset = find_preset("peer-small")
    return Workload(preset.model, objective, preset.masking, LENGTH, 512, 1e9)


PLAIN, MORE = workload(TokenQualityRanking()), workload(WithMoreWorks())
LAYOUT = ParallelLayout(2, 2, 4, 2, SIZE)


def placed(work: Workload, like: Placement | None = None) -> Placement:
    """The best placement; or the works of `work` on another's stages, to compare the two."""
    chosen = choose_placement(work.graph, 4, size=work.full)
    return replace(chosen, stages=like.stages) if like else chosen


def test_whole_plan() -> None:
    placement = placed(MORE)
    for kind in ("two_pass", "1f1b_phases"):
        validate(build_schedule(kind, placement, 9))
    plan = make_plan(MORE, CLUSTER, LAYOUT)
    assert "embeddings, mlm_head, second_head" in describe(plan, MORE, CLUSTER)
    assert plan.step_time > make_plan(PLAIN, CLUSTER, LAYOUT).step_time


def test_traffic() -> None:
    plain = placed(PLAIN)
    more = placed(MORE, like=plain)
    last = plain.path("ranker")[-1]
    look = plain.path("generator")
    states, picked = SIZE * LENGTH * HIDDEN * 2, SIZE * POSITIONS * HIDDEN * 2
    assert len(look) > 1 and last
    for stage in range(4):
        more_hidden = states * (stage in look[:-1])  # once there, and nothing back
        expected = pipeline_traffic(plain, stage, PLAIN, LAYOUT) + more_hidden + picked * (stage in (0, last))
        assert pipeline_traffic(more, stage, MORE, LAYOUT) == expected
        # a ring of two sends each tensor once: two all-reduces a layer, and one of the embeddings
        forward = 2 * states * plain.stages[stage].num_layers("generator")
        head = SIZE * (POSITIONS * 11) + SIZE * LENGTH * MORE.model.embedding_size * 2
        expected = tensor_traffic(plain, stage, PLAIN, LAYOUT) + forward + head * (stage == 0)
        assert tensor_traffic(more, stage, MORE, LAYOUT) == expected


def test_parameters_and_what_each_backward_call_reaches() -> None:
    plain = placed(PLAIN)
    more = placed(MORE, like=plain)
    head = HIDDEN * 16 + 16
    before = take_inventory(PLAIN.model, PLAIN.objective, plain, 2)
    after = take_inventory(MORE.model, MORE.objective, more, 2)
    words = (30528 // 2) * MORE.model.embedding_size
    assert [one.count for one in after] == [before[0].count + head, *(one.count for one in before[1:])]
    assert sorted(after[0].reached) == sorted([*before[0].reached, head + words])
    assert [one.reached for one in after[1:]] == [one.reached for one in before[1:]]


def test_memory() -> None:
    placement = placed(MORE)
    mlm_head, second = (stage_part(placement, 0, MORE.graph.work(name)) for name in ("mlm_head", "second_head"))
    kept = SIZE * POSITIONS * 7 * 2
    assert work_activations(second, MORE, LAYOUT) == kept
    # the larger workspace is that of one work at a time, once in bf16 and once in fp32
    expected = work_activations(mlm_head, MORE, LAYOUT) + kept + SIZE * POSITIONS * 9000 * (2 + 4)
    assert heads_memory(placement, 0, MORE, LAYOUT) == expected
    for stage in range(4):
        assert work_activations(stage_part(placement, stage, MORE.graph.work("look")), MORE, LAYOUT) == 0


@pytest.mark.parametrize("name", ["teams-tiny", "teams-base"])
def test_teams_needs_no_words_of_its_own(name: str) -> None:
    preset = find_preset(name)
    work = Workload(preset.model, preset.objective, preset.masking, preset.training.seq_length, 512, 1e9)
    text = describe(make_plan(work, CLUSTER, ParallelLayout(8, 2, 2, 1, 4)), work, CLUSTER)
    assert "rtd_branch, mws_branch" in text
