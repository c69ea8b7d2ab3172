import itertools
import re
import time
from dataclasses import replace
from functools import lru_cache

import pytest

from hand_made_pipelines import part, peer_costs, peer_graph
from peer_scale.objectives.graph import SampleSize
from peer_scale.pipeline.costs import Costs, WorkCosts, peak_activations
from peer_scale.pipeline.instructions import Backward, Forward
from peer_scale.pipeline.list_scheduling import WORK_KINDS, list_schedule
from peer_scale.pipeline.placement import Placement, place
from peer_scale.pipeline.schedule import KINDS, Kind, build_schedule
from peer_scale.pipeline.search import choose_placement
from peer_scale.pipeline.simulator import simulate
from peer_scale.settings.presets import find_preset
from runs import PROJECT

pytestmark = pytest.mark.heavy

DOCS = PROJECT / "docs" / "pipeline.md"


def ranker_chain(num_stages: int, head_cost: int = 0) -> Placement:
    """A layer of the ranker on each stage (forward 1, backward 2) and a generator that costs nothing."""
    stages = [
        part(ranker=range(index, index + 1), first=index == 0, ends="ranker" * (index == num_stages - 1))
        for index in range(num_stages)
    ]
    nothing, one, two = (0,) * num_stages, (1,) * num_stages, (2,) * num_stages
    costs = peer_costs(WorkCosts(nothing, nothing, nothing), WorkCosts(one, two, one), head_cost, 2 * head_cost)
    return Placement(peer_graph(), tuple(stages), costs)


# stage 0: the shared layer and the head; stage 1: a layer of each network
TWO_STAGES = Placement(
    peer_graph(),
    (
        part(shared=range(1), first=True),
        part(generator=range(1), ranker=range(1), ends="generator ranker"),
    ),
    peer_costs(
        WorkCosts((10, 10), (20, 20), (3, 4)),
        WorkCosts((10, 15), (20, 30), (3, 5)),
        head_forward=5,
        head_backward=10,
    ),
)


def test_one_micro_batch_by_hand() -> None:
    order = (
        "late_forward",
        "late_backward",
        "table_forward",
        "table_backward",
        "early_forward",
        "early_backward",
    )
    result = simulate(build_schedule("two_pass", TWO_STAGES, 1, cap=1, order=order))
    timeline = [[(done.start, done.end, done.work) for done in stage] for stage in result.executed]
    assert timeline == [
        [
            (0, 10, Forward("generator", 0)),
            (20, 25, Forward("mlm_head", 0)),
            (25, 35, Forward("ranker", 0)),
            (35, 45, Backward("mlm_head", 0)),
            (80, 100, Backward("ranker", 0)),
            (100, 120, Backward("generator", 0)),
        ],
        [
            (10, 20, Forward("generator", 0)),
            (35, 50, Forward("ranker", 0)),
            (50, 80, Backward("ranker", 0)),
            (80, 100, Backward("generator", 0)),
        ],
    ]
    assert result.makespan == 120
    assert result.busy == (75, 75)
    assert result.bubble_share == result.mean_idle_share == 1 - 75 / 120
    assert result.peak_activations == (6, 9)
    assert result.peak_micro_batches == (1, 1)


def test_latency_is_on_the_way_of_every_message() -> None:
    costs = replace(TWO_STAGES.costs, latency=100)
    slow = simulate(build_schedule("two_pass", TWO_STAGES, 1, cap=1), costs)
    # the longest way: generator forward, head, ranker forward and backward, then stage 1 has the generator's to do
    assert slow.makespan == 10 + 100 + 10 + 100 + 5 + 10 + 100 + 15 + 30 + 20 + 100 + 20


@pytest.mark.parametrize("num_stages", [1, 2, 4, 7])
def test_textbook_figures_of_a_plain_chain(num_stages: int) -> None:
    placement = ranker_chain(num_stages)
    for num_micro_batches in (num_stages, 3 * num_stages):
        for kind in ("gpipe", "1f1b"):
            result = simulate(build_schedule(kind, placement, num_micro_batches))
            rounds = num_micro_batches + num_stages - 1
            assert result.makespan == 3 * rounds
            assert result.bubble_share == pytest.approx((num_stages - 1) / rounds)
            assert result.peak_micro_batches[0] == (num_micro_batches if kind == "gpipe" else num_stages)
        work = [done.work for done in result.executed[0] if isinstance(done.work, Forward | Backward)]
        work = [one for one in work if one.work == "ranker"]
        forwards = [Forward("ranker", micro) for micro in range(num_micro_batches)]
        backwards = [Backward("ranker", micro) for micro in range(num_micro_batches)]
        steady = [one for pair in zip(backwards, forwards[num_stages:], strict=False) for one in pair]
        assert work == forwards[:num_stages] + steady + backwards[num_micro_batches - num_stages :]


def test_activations_of_textbook_1f1b() -> None:
    costs = ranker_chain(5).costs
    assert [costs.one_f_one_b_peak(count) for count in (1, 3, 5, 100)] == [1, 3, 5, 5]
    # stage 1 is the fullest: two micro-batches of 9 against three of 3 and one of 12
    three = WorkCosts((1, 1, 1), (2, 2, 2), (1, 4, 6))
    uneven = peer_costs(three, WorkCosts((1, 1, 1), (2, 2, 2), (2, 5, 6)), 0, 0)
    assert uneven.one_f_one_b_peak(8) == 18


def test_imbalance() -> None:
    costs = peer_costs(WorkCosts((1, 2), (2, 4), (0, 0)), WorkCosts((0, 1), (0, 2), (0, 0)), 1, 2)
    assert costs.stage_times() == (6, 9)
    assert costs.imbalance == pytest.approx(9 / 7.5 - 1)


@pytest.mark.parametrize("latency", [0, 7])
@pytest.mark.parametrize("seed", range(6))
def test_greedy_clock_is_the_simulators(seed: int, latency: int) -> None:
    """The scheduler keeps time by ready work, the simulator by instructions that wait: both come to the same."""
    order = list(itertools.permutations(WORK_KINDS))[seed * 119]
    preset = find_preset(("peer-base", "electra-small", "bert-base")[seed % 3])
    placement = place(preset.objective.graph(preset.model), 3, size=SampleSize.of_sequence(128, 19))
    unit = placement.costs.of("mlm_head").forward[0] // 10
    head = WorkCosts((10 * unit, 0, 0), (20 * unit, 0, 0), (0, 0, 0))
    works = dict(placement.costs.works) | {"mlm_head": head}
    costs = Costs(tuple(works.items()), latency * unit)
    listed = list_schedule(placement, costs, 9, order, cap=4)
    result = simulate(build_schedule("two_pass", placement, 9, cap=4, order=order, costs=costs), costs)
    assert result.makespan == listed.makespan
    assert result.peak_activations == listed.peak_activations
    assert [[done.work for done in stage] for stage in result.executed] == [list(stage) for stage in listed.stages]


def test_peak_of_a_stages_activations() -> None:
    order = [
        Forward("generator", 0),  # 3
        Forward("ranker", 0),  # 6
        Backward("generator", 0),  # 3
        Forward("generator", 1),  # 6
        Forward("generator", 2),  # 9
        Backward("ranker", 0),  # 6
        Forward("ranker", 1),  # 9
    ]
    assert peak_activations(TWO_STAGES.costs, 0, order) == 9
    assert peak_activations(TWO_STAGES.costs, 1, order) == 13


def figures(num_stages: int, num_micro_batches: int, kind: Kind) -> tuple[float, float, float, int]:
    """Share of the step that the busiest stage and that all stages idle; peak over textbook 1F1B's; micro-batches."""
    placement = peer_base(num_stages)
    result = simulate(build_schedule(kind, placement, num_micro_batches))
    peak = max(result.peak_activations) / placement.costs.one_f_one_b_peak(num_micro_batches)
    return result.bubble_share, result.mean_idle_share, peak, max(result.peak_micro_batches)


@lru_cache
def peer_base(num_stages: int) -> Placement:
    preset = find_preset("peer-base")
    return choose_placement(preset.objective.graph(preset.model), num_stages, size=SampleSize.of_sequence(512, 77))


@pytest.mark.parametrize("num_micro_batches", [8, 12, 16, 24, 32, 48, 64])
@pytest.mark.parametrize("num_stages", [4, 8])
def test_two_pass_bubble_of_peer_base(num_stages: int, num_micro_batches: int) -> None:
    bubble, _, peak, in_flight = figures(num_stages, num_micro_batches, "two_pass")
    assert bubble <= 0.8 * (num_stages - 1) / (num_micro_batches + num_stages - 1)
    assert peak <= 1.5
    assert in_flight <= 1.5 * num_stages
    assert bubble < 0.4 * figures(num_stages, num_micro_batches, "1f1b_phases")[0]
    assert bubble < figures(num_stages, num_micro_batches, "1f1b")[0]


def test_a_schedule_for_eight_stages_and_64_micro_batches_is_made_in_seconds() -> None:
    placement = peer_base(8)
    build_schedule.cache_clear()
    start = time.process_time()
    build_schedule("two_pass", placement, 64)
    assert time.process_time() - start < 5


def test_the_documented_table_is_what_the_simulator_says() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| `(\w+)` \|(.*)\|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert {(int(stages), int(micros), kind) for stages, micros, kind, _ in rows} == {
        (stages, micros, kind) for stages in (4, 8) for micros in (8, 16, 32, 64) for kind in KINDS
    }
    for stages, micros, kind, written in rows:
        assert written.split("|") == table_cells(int(stages), int(micros), kind)


def table_cells(num_stages: int, num_micro_batches: int, kind: Kind) -> list[str]:
    bubble, idle, peak, in_flight = figures(num_stages, num_micro_batches, kind)
    formula = (num_stages - 1) / (num_micro_batches + num_stages - 1)
    imbalance = peer_base(num_stages).costs.imbalance
    cells = (
        f"{bubble:.1%}",
        f"{bubble / formula:.2f}",
        f"{idle:.1%}",
        f"{imbalance:.1%}",
        f"{peak:.2f}",
        f"{in_flight}",
    )
    return [f" {cell} " for cell in cells]
