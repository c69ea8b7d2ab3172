"""Messages between real ranks: groups of two, each for one direction, and the order of the lists."""

import zlib

import torch
import torch.distributed as dist

from peer_scale.objectives.graph import SampleSize
from peer_scale.pipeline.dataflow import channels
from peer_scale.pipeline.instructions import Message, OptimizerStep, PostRecv, Recv, Send
from peer_scale.pipeline.messages import Messenger
from peer_scale.pipeline.pair_groups import PairGroups
from peer_scale.pipeline.schedule import build_schedule
from peer_scale.pipeline.search import choose_placement
from peer_scale.settings.presets import find_preset


def placed(num_stages):
    preset = find_preset("peer-base")
    return choose_placement(preset.objective.graph(preset.model), num_stages, size=SampleSize.of_sequence(512, 77))


def content(message: Message, replica: int) -> torch.Tensor:
    """What nobody else sends."""
    return torch.tensor([zlib.crc32(repr(message).encode()), replica])


def exchange_all(num_stages: int, num_micro: int) -> int:
    """Do all of a list but the work; give the number of messages that have come as they were sent."""
    from peer_scale.parallel.topology import build_topology

    topology = build_topology(torch.device("cpu"), pipeline_parallel=num_stages)
    placement, replica = placed(num_stages), topology.rank("dp")
    messenger = Messenger(PairGroups(topology, placement), lambda _: torch.empty(2, dtype=torch.int64))
    count = 0
    for instruction in build_schedule("two_pass", placement, num_micro).stages[topology.rank("pp")]:
        match instruction:
            case PostRecv(message):
                messenger.post(message)
            case Send(message):
                # not contiguous, and gone from here at once
                messenger.send(message, content(message, replica).repeat_interleave(2)[::2])
            case Recv(message):
                assert messenger.receive(message).equal(content(message, replica)), message
                count += 1
            case OptimizerStep():
                messenger.finish()
    return count


def test_every_message_comes_as_it_was_sent(four_ranks):
    stages = build_schedule("two_pass", placed(4), 8).stages
    expected = [sum(isinstance(one, Recv) for one in stage) for stage in stages]
    assert four_ranks.run(exchange_all, 4, 8, timeout=60) == expected
    assert min(expected) >= 16


def test_pipelines_side_by_side_keep_to_themselves(four_ranks):
    stages = build_schedule("two_pass", placed(2), 4).stages
    counts = [sum(isinstance(one, Recv) for one in stage) for stage in stages]
    # ranks 0 and 1 are the first stages of two pipelines
    assert four_ranks.run(exchange_all, 2, 4, timeout=60) == [counts[0], counts[0], counts[1], counts[1]]


def groups_of(num_stages: int) -> dict[tuple[int, int], tuple[bool, list[int], str]]:
    from peer_scale.parallel.topology import build_topology

    topology = build_topology(torch.device("cpu"), pipeline_parallel=num_stages)
    groups = PairGroups(topology, placed(num_stages))._groups
    assert len({id(group) for group in groups.values()}) == len(groups), "a group serves one channel"
    return {
        channel: (group is dist.group.WORLD, dist.get_process_group_ranks(group), dist.get_backend(group))
        for channel, group in groups.items()
    }


def test_a_pipeline_of_all_ranks_has_a_group_for_each_direction(two_ranks):
    either = (False, [0, 1], "gloo")
    assert two_ranks.run(groups_of, 2) == [{(0, 1): either, (1, 0): either}] * 2


def test_channels_are_those_of_the_lists():
    for num_stages in (2, 4):
        stages = build_schedule("two_pass", placed(num_stages), 3).stages
        used = {one.message.channel for stage in stages for one in stage if isinstance(one, Send)}
        assert channels(placed(num_stages)) == tuple(sorted(used))
    assert channels(placed(1)) == ()
