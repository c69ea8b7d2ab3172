"""Do ranks come to an end under NCCL's rules? With today's lists and groups, and with what was posted before."""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache

import pytest
import torch

from peer_scale.objectives.graph import SampleSize
from peer_scale.pipeline.instructions import (
    Forward,
    Instruction,
    Message,
    OptimizerStep,
    PostRecv,
    Recv,
    Send,
    forwards_only,
)
from peer_scale.pipeline.messages import Messenger, Request, Transport
from peer_scale.pipeline.ordering import Posted, Recorder, Rules, Transfer, Wait, carry_out
from peer_scale.pipeline.placement import Placement
from peer_scale.pipeline.schedule import KINDS, Kind, Schedule, build_schedule
from peer_scale.pipeline.search import choose_placement
from peer_scale.pipeline.simulator import ScheduleError
from peer_scale.settings.presets import find_preset

pytestmark = pytest.mark.heavy

MODELS = ("peer-base", "peer-large", "electra-small", "teams-base", "bert-base")
NUMBERS_OF_MICRO_BATCHES = (4, 8, 16, 32)
NOTHING, FIRST_USE, ONE_QUEUE, HOST_WAITS = (
    Rules(),
    Rules(made_at_first_use=True),
    Rules(one_queue=True),
    Rules(host_waits=True),
)
grid = pytest.mark.parametrize(
    ("name", "num_stages"),
    [
        pytest.param(name, num_stages, marks=[pytest.mark.slow] * (num_stages == 8))
        for name in MODELS
        for num_stages in (2, 4, 8)
    ],
)


@lru_cache
def placed(name: str, num_stages: int) -> Placement:
    preset = find_preset(name)
    return choose_placement(preset.objective.graph(preset.model), num_stages, size=SampleSize.of_sequence(512, 77))


class ReceivesAhead:
    """The messenger as it was: a few receives of each source posted before they are needed, whatever the list says."""

    def __init__(self, transport: Transport, instructions: Sequence[Instruction], num_ahead: int) -> None:
        self._transport = transport
        self._sent: list[Request] = []
        self._to_receive: defaultdict[int, deque[Message]] = defaultdict(deque)
        self._posted: dict[Message, Request] = {}
        for instruction in instructions:
            if isinstance(instruction, Recv):
                self._to_receive[instruction.message.source].append(instruction.message)
        for source in self._to_receive:
            for _ in range(num_ahead):
                self._post(source)

    def send(self, message: Message, tensor: torch.Tensor) -> None:
        self._sent.append(self._transport.isend(message, tensor))

    def post(self, message: Message) -> None:
        pass

    def receive(self, message: Message) -> None:
        self._posted.pop(message).wait()
        self._post(message.source)

    def finish(self) -> None:
        for request in self._sent:
            request.wait()

    def _post(self, source: int) -> None:
        if self._to_receive[source]:
            message = self._to_receive[source].popleft()
            self._posted[message] = self._transport.irecv(message, torch.empty(0))


def of_either_direction(message: Message) -> Hashable:
    """What a message went through: a group of all stages for messages that go on, another for those that go back."""
    return frozenset(message.channel), message.source < message.destination


def of_all_ranks(message: Message) -> Hashable:
    """As it was where the pipeline is all ranks of the job: both groups were the default one."""
    return frozenset(message.channel)


def of_the_channel(message: Message) -> Hashable:
    return message.channel


def posted(
    instructions: Sequence[Instruction],
    communicator: Callable[[Message], Hashable] = of_the_channel,
    num_ahead: int | None = None,
) -> list[Posted]:
    """What a rank posts that does its list, by the messenger or, with a number of receives ahead, by the former one."""
    recorder, nothing = Recorder(communicator), torch.empty(0)
    messenger = (
        Messenger(recorder, lambda _: nothing)
        if num_ahead is None
        else ReceivesAhead(recorder, instructions, num_ahead)
    )
    for instruction in instructions:
        match instruction:
            case PostRecv(message):
                messenger.post(message)
            case Recv(message):
                messenger.receive(message)
            case Send(message):
                messenger.send(message, nothing)
            case OptimizerStep():
                pass
            case work:
                recorder.compute(work)
    messenger.finish()
    return recorder.posted


def finishes(ranks: Sequence[Sequence[Posted]], rules: Rules) -> bool:
    try:
        carry_out(ranks, rules)
    except ScheduleError as error:
        assert str(error).startswith("deadlock: rank "), error
        return False
    return True


def schedules(name: str, num_stages: int) -> list[Schedule]:
    return [build_schedule("two_pass", placed(name, num_stages), number) for number in NUMBERS_OF_MICRO_BATCHES]


@grid
@pytest.mark.parametrize("rules", [FIRST_USE, ONE_QUEUE, HOST_WAITS], ids=["first_use", "one_queue", "host_waits"])
def test_every_pipeline_comes_to_an_end(name: str, num_stages: int, rules: Rules) -> None:
    for schedule in schedules(name, num_stages):
        carry_out([posted(stage) for stage in schedule.stages], rules)
        carry_out([posted(forwards_only(stage)) for stage in schedule.stages], rules)


@grid
def test_what_was_posted_before_hangs(name: str, num_stages: int) -> None:
    for schedule in schedules(name, num_stages):
        ranks = [posted(stage, of_either_direction, num_ahead=2) for stage in schedule.stages]
        assert [finishes(ranks, rules) for rules in (NOTHING, FIRST_USE, ONE_QUEUE)] == [True, False, False]
        # where the pipeline is all ranks, communicators that are there already do not help
        assert not finishes([posted(stage, of_all_ranks, num_ahead=2) for stage in schedule.stages], NOTHING)


@pytest.mark.parametrize("num_ahead", [0, 1, 2])
def test_groups_of_two_alone_are_not_enough_with_one_queue(num_ahead: int) -> None:
    """The place of each receive in the list is what makes it finish."""
    stages = build_schedule("two_pass", placed("peer-base", 4), 16).stages
    ranks = [posted(stage, num_ahead=max(num_ahead, 1)) for stage in stages]
    if num_ahead == 0:  # each receive is posted where it is waited for
        ranks = [posted([two for one in stage for two in at_the_wait(one)]) for stage in stages]
    assert [finishes(ranks, rules) for rules in (NOTHING, ONE_QUEUE)] == [True, False]


def at_the_wait(instruction: Instruction) -> list[Instruction]:
    if isinstance(instruction, PostRecv):
        return []
    return [PostRecv(instruction.message), instruction] if isinstance(instruction, Recv) else [instruction]


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_schedules_come_to_an_end(kind: Kind) -> None:
    for num_micro_batches in (1, 3, 8):
        stages = build_schedule(kind, placed("peer-base", 4), num_micro_batches).stages
        carry_out([posted(stage) for stage in stages], HOST_WAITS)


# the rules themselves, on two ranks that exchange a few messages

THERE, BACK = Message("there", 0, 0, 1), Message("back", 0, 1, 0)
SECOND, THIRD = Message("there", 1, 0, 1), Message("there", 2, 0, 1)
WORK = Forward("work", 0)


def through(communicator: Hashable, *messages: Message) -> list[Posted]:
    return [Transfer(message, communicator) for message in messages]


def test_a_stream_keeps_its_order() -> None:
    crossed = [through("one", BACK, THERE), through("one", THERE, BACK)]
    assert not finishes(crossed, NOTHING)
    assert finishes([crossed[0], crossed[0]], NOTHING)
    with pytest.raises(ScheduleError, match=r"rank \d posts .*micro=[01],.* where rank \d posts .*micro=[01],"):
        carry_out([through("one", THERE, SECOND), through("one", SECOND, THERE)], NOTHING)
    # each waits for the other before it sends
    waiting = [
        [*through("back", BACK), Wait(BACK), *through("there", THERE)],
        [*through("there", THERE), Wait(THERE), *through("back", BACK)],
    ]
    assert not finishes(waiting, NOTHING)
    # a transfer waits for what is computed before it, and not for what is computed after it
    apart = [[*through("back", BACK), *through("there", THERE), Wait(BACK)], waiting[1]]
    assert finishes(apart, NOTHING)


def test_two_receives_posted_in_two_groups_wait_for_the_making_of_both() -> None:
    crossed = [through("back", BACK) + through("there", THERE), through("there", THERE) + through("back", BACK)]
    assert finishes(crossed, NOTHING)
    assert not finishes(crossed, FIRST_USE)
    assert finishes([crossed[0], crossed[0]], FIRST_USE)


def test_one_queue_is_held_up_by_what_cannot_start_and_not_by_what_runs() -> None:
    sender = [*through("back", BACK), Wait(BACK), *through("there", THERE, SECOND)]
    assert finishes([sender, [*through("there", THERE), *through("back", BACK), *through("there", SECOND)]], ONE_QUEUE)
    # the second receive waits in its stream for the first, and what would let that go is behind it
    assert not finishes([sender, [*through("there", THERE, SECOND), *through("back", BACK)]], ONE_QUEUE)
    assert finishes([sender, [*through("there", THERE, SECOND), *through("back", BACK)]], NOTHING)


def test_a_host_that_waits_needs_one_order_of_all() -> None:
    in_order = through("there", THERE) + through("back", BACK)
    assert finishes([in_order, in_order], HOST_WAITS)
    crossed = [in_order[::-1], in_order]
    assert finishes(crossed, ONE_QUEUE) and not finishes(crossed, HOST_WAITS)


def test_what_only_one_end_posts_never_ends() -> None:
    with pytest.raises(ScheduleError, match=r"deadlock: rank 0 at Transfer\(message=Message\(value='there', micro=1"):
        carry_out([through("there", THERE, SECOND), through("there", THERE)], NOTHING)
    assert not finishes([through("there", THERE), []], FIRST_USE)
    assert not finishes([[WORK, *through("there", THIRD)], [WORK]], HOST_WAITS)
