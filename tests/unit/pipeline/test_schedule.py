import os
import queue
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from hand_made_pipelines import part, peer_costs, peer_graph
from peer_scale.errors import UserError
from peer_scale.objectives.graph import SampleSize
from peer_scale.pipeline.costs import WorkCosts
from peer_scale.pipeline.instructions import (
    Backward,
    Compute,
    Forward,
    Instruction,
    Message,
    OptimizerStep,
    PostRecv,
    Recv,
    Send,
)
from peer_scale.pipeline.list_scheduling import WORK_KINDS
from peer_scale.pipeline.placement import Placement, place
from peer_scale.pipeline.schedule import KINDS, Kind, Schedule, build_schedule
from peer_scale.pipeline.simulator import ScheduleError, simulate, validate
from peer_scale.settings.presets import find_preset

LAYOUTS = [
    (name, num_stages)
    for name in ("peer-base", "peer-tiny", "electra-small", "bert-small")
    for num_stages in (1, 2, 3, 4, 8)
    if (name, num_stages) != ("peer-tiny", 8)
]


def placed(name: str, num_stages: int) -> Placement:
    preset = find_preset(name)
    return place(preset.objective.graph(preset.model), num_stages, size=SampleSize.of_sequence(128, 19))


def counts_of_micro_batches(num_stages: int) -> list[int]:
    return sorted({1, max(1, num_stages - 1), num_stages, 4 * num_stages})


# A placement whose generator ends on stage 1 and is absent from stage 2, which the ranker's pass uses.
SKIPPING = Placement(
    graph=peer_graph(),
    stages=(
        part(shared=range(1), first=True),
        part(generator=range(1), ends="generator"),
        part(ranker=range(2), ends="ranker"),
    ),
    costs=peer_costs(
        WorkCosts((1, 1, 0), (2, 2, 0), (1, 1, 0)),
        WorkCosts((1, 0, 2), (2, 0, 4), (1, 0, 2)),
        head_forward=1,
        head_backward=2,
    ),
)


class Rank(threading.Thread):
    """Runs a stage's list for real: a thread, channels that only keep order, and traces in place of tensors.

    Knows of the schedule nothing but its instructions: what one of them needs and makes is written down here anew.
    """

    def __init__(self, stage: int, schedule: Schedule, channels: dict[tuple[int, int], queue.Queue]) -> None:
        super().__init__(daemon=True)
        self.stage, self.placement, self.instructions = stage, schedule.placement, schedule.stages[stage]
        self.channels = channels
        self.mail: dict[tuple[str, bool, int], str] = {}
        self.saved: dict[tuple[str, int], str] = {}
        self.results: dict[tuple[str, int], str] = {}
        self.steps = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for instruction in self.instructions:
                self.execute(instruction)
            assert not self.mail and not self.saved, "left over"
        except BaseException as error:
            self.error = error

    def execute(self, instruction: Instruction) -> None:
        match instruction:
            case Send(message):
                assert message.source == self.stage
                content = self.mail.pop((message.value, message.is_gradient, message.micro))
                self.channels[self.stage, message.destination].put((message.value, message.is_gradient, content))
            case PostRecv(message):
                assert message.destination == self.stage
            case Recv(message):
                *what, content = self.channels[message.source, self.stage].get(timeout=20)
                assert what == [message.value, message.is_gradient]
                self.mail[message.value, message.is_gradient, message.micro] = content
            case OptimizerStep():
                self.steps += 1
            case work:
                self.compute(work)

    def compute(self, work: Compute) -> None:
        stage, mail = self.stage, self.mail
        match work:
            case Forward("generator", micro):
                before = mail.pop(("generator", False, micro)) if stage else f"masked{micro}"
                self.saved["generator", micro] = state = f"{before} g{stage}"
                mail["selected" if self.is_last("generator") else "generator", False, micro] = state
            case Forward("mlm_head", micro):
                self.saved["head", micro] = state = mail.pop(("selected", False, micro)) + " head"
                if self.has_ranker:
                    mail["labels", False, micro] = state
                    self.saved["corrupted", micro] = state
            case Backward("mlm_head", micro):
                mail["selected", True, micro] = self.saved.pop(("head", micro)) + " -head"
            case Forward("ranker", micro):
                before = mail.pop(("ranker", False, micro)) if stage else self.saved.pop(("corrupted", micro))
                self.saved["ranker", micro] = state = f"{before} r{stage}"
                if self.is_last("ranker"):
                    mail["ranker", True, micro] = f"{state} with {mail.pop(('labels', False, micro))}"
                else:
                    mail["ranker", False, micro] = state
            case Backward(network, micro):
                value = "selected" if network == "generator" and self.is_last(network) else network
                gradient = mail.pop((value, True, micro))
                assert self.saved.pop((network, micro)) in gradient, "activations of another forward"
                gradient += f" -{network[0]}{stage}"
                if stage:
                    mail[network, True, micro] = gradient
                else:
                    self.results[network, micro] = gradient

    @property
    def has_ranker(self) -> bool:
        return has_ranker(self.placement)

    def is_last(self, network: str) -> bool:
        return self.stage == self.placement.path(network)[-1]


def has_ranker(placement: Placement) -> bool:
    return "ranker" in dict(placement.graph.networks)


def expected_results(placement: Placement, num_micro_batches: int) -> dict[tuple[str, int], str]:
    """What the two passes give when each micro-batch runs on its own."""

    def there(network: str) -> str:
        return "".join(f" {network[0]}{stage}" for stage in placement.path(network))

    def back(network: str) -> str:
        return "".join(f" -{network[0]}{stage}" for stage in reversed(placement.path(network)))

    results = {}
    for micro in range(num_micro_batches):
        head = f"masked{micro}{there('generator')} head"
        results["generator", micro] = f"{head} -head{back('generator')}"
        if has_ranker(placement):
            results["ranker", micro] = f"{head}{there('ranker')} with {head}{back('ranker')}"
    return results


def run_on_threads(schedule: Schedule) -> dict[tuple[str, int], str]:
    stages = range(len(schedule.stages))
    channels: dict[tuple[int, int], queue.Queue] = {(a, b): queue.Queue() for a in stages for b in stages if a != b}
    ranks = [Rank(stage, schedule, channels) for stage in stages]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=60)
        if rank.error:
            raise rank.error
        assert rank.steps == 1
    assert all(channel.empty() for channel in channels.values())
    return ranks[0].results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "num_stages"), LAYOUTS)
def test_threads_that_run_the_lists_get_what_one_process_gets(name: str, num_stages: int, kind: Kind) -> None:
    placement = placed(name, num_stages)
    for num_micro_batches in counts_of_micro_batches(num_stages):
        schedule = build_schedule(kind, placement, num_micro_batches)
        validate(schedule)
        assert run_on_threads(schedule) == expected_results(placement, num_micro_batches)


@pytest.mark.parametrize("kind", KINDS)
def test_passes_that_skip_stages(kind: Kind) -> None:
    schedule = build_schedule(kind, SKIPPING, 5)
    validate(schedule)
    assert run_on_threads(schedule) == expected_results(SKIPPING, 5)
    assert not any(isinstance(one, Forward) and one.work == "ranker" for one in schedule.stages[1])
    messages = {one.message for one in schedule.stages[0] if isinstance(one, Send) and one.message.micro == 0}
    assert messages == {
        Message("generator", 0, 0, 1),
        Message("selected", 0, 0, 1, is_gradient=True),
        Message("labels", 0, 0, 2),
        Message("ranker", 0, 0, 2),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_two_stages_see_their_messages_in_one_order(kind: Kind) -> None:
    schedule = build_schedule(kind, placed("peer-base", 4), 16)
    for source, sender in enumerate(schedule.stages):
        for destination, receiver in enumerate(schedule.stages):
            sent = [i.message for i in sender if isinstance(i, Send) and i.message.destination == destination]
            for kind_at_receiver in (PostRecv, Recv):
                there = [i.message for i in receiver if isinstance(i, kind_at_receiver) and i.message.source == source]
                assert sent == there


def test_gpipe_runs_all_forwards_first() -> None:
    for stage in build_schedule("gpipe", placed("peer-base", 4), 6).stages:
        works = [i for i in stage if isinstance(i, Forward | Backward)]
        is_backward = [isinstance(work, Backward) for work in works]
        assert is_backward == sorted(is_backward)


def test_phases_run_one_network_after_the_other() -> None:
    for stage in build_schedule("1f1b_phases", placed("peer-base", 4), 6).stages:
        is_second = [i.work == "ranker" for i in stage if isinstance(i, Forward | Backward)]
        assert is_second == sorted(is_second)


def most_in_flight(schedule: Schedule) -> int:
    """Micro-batches that are begun and not finished anywhere in the pipeline, by the simulated clock."""
    begins, ends = {}, {}
    for stage in simulate(schedule).executed:
        for done in stage:
            begins[done.work.micro] = min(done.start, begins.get(done.work.micro, done.start))
            ends[done.work.micro] = max(done.end, ends.get(done.work.micro, 0))
    return max(sum(begins[one] <= now < ends[one] for one in begins) for now in begins.values())


@pytest.mark.parametrize("cap", [1, 2, 5])
@pytest.mark.parametrize("kind", ["1f1b", "two_pass"])
def test_cap_on_micro_batches_in_flight(kind: Kind, cap: int) -> None:
    schedule = build_schedule(kind, placed("peer-base", 4), 12, cap=cap)
    validate(schedule)
    assert most_in_flight(schedule) == cap


@pytest.mark.parametrize(("name", "num_stages"), [("peer-base", 4), ("electra-small", 4), ("bert-small", 8)])
def test_two_pass_has_at_most_half_as_many_more_in_flight(name: str, num_stages: int) -> None:
    placement = placed(name, num_stages)
    for num_micro_batches in (num_stages, 4 * num_stages):
        schedule = build_schedule("two_pass", placement, num_micro_batches)
        assert most_in_flight(schedule) <= 1.5 * num_stages
        peak = max(simulate(schedule).peak_activations)
        assert peak <= 1.5 * placement.costs.one_f_one_b_peak(num_micro_batches)


def test_search_is_no_worse_than_any_order_it_could_have_been_given() -> None:
    placement = placed("peer-base", 4)
    found = simulate(build_schedule("two_pass", placement, 8)).makespan
    given = [WORK_KINDS, WORK_KINDS[::-1], (*WORK_KINDS[3:], *WORK_KINDS[:3])]
    assert found <= min(
        simulate(build_schedule("two_pass", placement, 8, cap=4, order=order)).makespan for order in given
    )


# the works and sizes of peer-base, without the torch that its objective would import
_PRINT_SCHEDULE = """
import hashlib
from peer_scale.models.config import EncoderShape
from peer_scale.objectives.graph import Cost, Graph, SampleSize, Value, Work
from peer_scale.pipeline.schedule import build_schedule
from peer_scale.pipeline.search import choose_placement

generator, ranker = EncoderShape(6, 768, 3072, 12), EncoderShape(12, 768, 3072, 12)
works = (
    Work("generator", print, "generator", begin=print, gives=(Value("selected", "compute", 768),)),
    Work(
        "mlm_head",
        print,
        end_takes=("selected",),
        gives=(Value("sampled", "int64"), Value("labels", "float32")),
        has_loss=True,
        end_costs=(Cost("position", flops=2 * 768 * (768 + 30522)),),
    ),
    Work(
        "ranker",
        print,
        "ranker",
        begin=print,
        begin_takes=("sampled",),
        end_takes=("labels",),
        has_loss=True,
        end_costs=(Cost("token", flops=2 * 768 * 769),),
    ),
)
graph = Graph((("generator", generator), ("ranker", ranker)), 3, works)
placement = choose_placement(graph, 4, size=SampleSize.of_sequence(512, 77))
schedule = build_schedule("two_pass", placement, 24)
print(hashlib.sha256(repr((placement.stages, placement.costs, schedule.stages)).encode()).hexdigest())
"""


def test_every_process_builds_the_same_schedule() -> None:
    outputs = set()
    for hash_seed in ("0", "1", "2024"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", _PRINT_SCHEDULE], env=environment, capture_output=True, text=True, check=True
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zigzag", 4, None), "'zigzag'.*gpipe, 1f1b, 1f1b_phases, two_pass"),
        (("1f1b", 0, None), "number of micro-batches is 0"),
        (("two_pass", 4, 0), "micro-batches in flight is 0"),
    ],
)
def test_arguments_that_cannot_be(arguments: tuple, message: str) -> None:
    kind, num_micro_batches, cap = arguments
    with pytest.raises(UserError, match=message):
        build_schedule(kind, SKIPPING, num_micro_batches, cap=cap)


Lists = list[list[Instruction]]


def swap(instructions: list[Instruction], one: Instruction, other: Instruction) -> None:
    i, j = instructions.index(one), instructions.index(other)
    instructions[i], instructions[j] = instructions[j], instructions[i]


def move_before(instructions: list[Instruction], what: Instruction, place: Instruction) -> None:
    instructions.remove(what)
    instructions.insert(instructions.index(place), what)


def drop_message(lists: Lists, message: Message) -> None:
    lists[message.source].remove(Send(message))
    lists[message.destination].remove(PostRecv(message))
    lists[message.destination].remove(Recv(message))


LABELS = Message("labels", 1, 0, 2)
SELECTED = Message("selected", 0, 1, 0)
CORRUPTIONS: dict[str, tuple[Callable[[Lists], object], str]] = {
    "missing backward": (lambda s: s[1].remove(Backward("generator", 2)), "stage 1: .*Backward.* is missing"),
    "missing head": (lambda s: s[0].remove(Forward("mlm_head", 1)), "stage 0: Forward.*mlm_head.* is missing"),
    "twice": (lambda s: s[2].insert(-1, Backward("ranker", 0)), "stage 2.*done twice"),
    "another stage's work": (lambda s: s[1].insert(0, Forward("ranker", 0)), "stage 1: .* does not belong here"),
    "a micro-batch too many": (lambda s: s[2].insert(-1, Forward("ranker", 3)), "does not belong here"),
    "backward before forward": (
        lambda s: swap(s[1], Forward("generator", 0), Backward("generator", 0)),
        "stage 1.*Backward.* begins without",
    ),
    "no optimizer step": (lambda s: s[2].pop(), "stage 2: the optimizer step"),
    "work after the optimizer step": (lambda s: s[0].insert(0, s[0].pop()), "stage 0: the optimizer step"),
    "never sent": (lambda s: s[0].remove(Send(LABELS)), "expects|deadlock"),
    "never received": (lambda s: s[2].remove(Recv(LABELS)), "begins without|expects"),
    "neither sent nor received": (lambda s: drop_message(s, LABELS), "begins without .*labels"),
    "sent before it is made": (
        lambda s: move_before(s[1], Send(SELECTED), Forward("generator", 0)),
        "stage 1.* has no .*selected.* to send",
    ),
    "sent twice": (lambda s: s[1].insert(-1, Send(SELECTED)), "has no .* to send"),
    "another order at one end": (
        lambda s: swap(s[1], Recv(Message("generator", 1, 0, 1)), Recv(Message("generator", 2, 0, 1))),
        "stage 1.* expects .*micro=2.* next from stage 0 is .*micro=1",
    ),
    "receive not posted": (lambda s: s[2].remove(PostRecv(LABELS)), "stage 2.*labels.*has been posted"),
    "receive posted too late": (
        lambda s: (s[2].remove(PostRecv(LABELS)), s[2].insert(s[2].index(Recv(LABELS)) + 1, PostRecv(LABELS))),
        "stage 2.*labels.*has been posted",
    ),
    "receives posted in another order": (
        lambda s: swap(s[1], PostRecv(Message("generator", 1, 0, 1)), PostRecv(Message("generator", 2, 0, 1))),
        "stage 1.*generator.*has been posted",
    ),
    "receive posted for nothing": (
        lambda s: s[2].insert(-1, PostRecv(LABELS)),
        "posted, but never waited for: .*labels",
    ),
    "waiting in a circle": (lambda s: move_before(s[0], Recv(SELECTED), Forward("generator", 0)), "deadlock: stage 0"),
    "received too late": (
        lambda s: swap(s[2], Recv(Message("ranker", 0, 0, 2)), Forward("ranker", 0)),
        "stage 2.* begins without Message.*ranker",
    ),
}


@pytest.mark.parametrize("kind", ["gpipe", "two_pass"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_spoilt_schedule_is_refused(name: str, kind: Kind) -> None:
    spoil, message = CORRUPTIONS[name]
    schedule = build_schedule(kind, SKIPPING, 3)
    lists = [list(stage) for stage in schedule.stages]
    spoil(lists)
    with pytest.raises(ScheduleError, match=message):
        validate(replace(schedule, stages=tuple(map(tuple, lists))))


def test_what_validation_lets_pass_runs() -> None:
    """Schedules with neighbours swapped here and there, right ones and wrong ones."""
    rng = random.Random(0)
    num_passed = 0
    for _ in range(120):
        schedule = build_schedule(rng.choice(KINDS), SKIPPING, 3)
        lists = [list(stage) for stage in schedule.stages]
        for _ in range(rng.randint(1, 3)):
            instructions = rng.choice(lists)
            i = rng.randrange(len(instructions) - 1)
            instructions[i : i + 2] = reversed(instructions[i : i + 2])
        swapped = replace(schedule, stages=tuple(map(tuple, lists)))
        try:
            validate(swapped)
        except ScheduleError:
            continue
        num_passed += 1
        assert run_on_threads(swapped) == expected_results(SKIPPING, 3)
    assert 10 < num_passed < 110
