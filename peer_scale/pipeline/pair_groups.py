"""Process groups for messages between stages: one of two ranks for each channel."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from peer_scale.parallel.topology import Topology
from peer_scale.pipeline.dataflow import channels
from peer_scale.pipeline.instructions import Channel, Message
from peer_scale.pipeline.placement import Placement


class PairGroups:
    """The `Transport` between real ranks.

    Under NCCL a group of two has one communicator with one stream, on which its messages queue up. So each ordered pair
    of stages has a group for itself: nothing waits behind what goes the other way or comes from another stage.
    """

    def __init__(self, topology: Topology, placement: Placement) -> None:
        """Make the groups and send through each once; all ranks of the job must call it.

        NCCL makes the communicator of two ranks at their first message, where each waits for the other. Here they meet
        in one order, before training.
        """
        self._groups: dict[Channel, dist.ProcessGroup] = {}
        backend = dist.get_default_backend_for_device(topology.device)
        for channel in channels(placement):
            # also those of other pipelines: groups are numbered as they are made, and so on all ranks alike
            for pair in topology.mesh.mesh[list(channel)].flatten(1).T.tolist():
                group = dist.new_group(pair, backend=backend, group_desc=f"stage {channel[0]} to {channel[1]}")
                if dist.get_rank() in pair:
                    self._groups[channel] = group
        for channel, group in self._groups.items():
            tensor = torch.zeros(1, device=topology.device)
            transfer = _isend if topology.rank("pp") == channel[0] else _irecv
            transfer(tensor, group).wait()

    def isend(self, message: Message, tensor: Tensor) -> dist.Work:
        """Start sending to the message's destination."""
        return _isend(tensor, self._groups[message.channel])

    def irecv(self, message: Message, tensor: Tensor) -> dist.Work:
        """Start receiving from the message's source."""
        return _irecv(tensor, self._groups[message.channel])


def _isend(tensor: Tensor, group: dist.ProcessGroup) -> dist.Work:
    work = dist.isend(tensor, group=group, group_dst=1 - dist.get_rank(group))
    assert work is not None, "this rank is in the group"
    return work


def _irecv(tensor: Tensor, group: dist.ProcessGroup) -> dist.Work:
    work = dist.irecv(tensor, group=group, group_src=1 - dist.get_rank(group))
    assert work is not None, "this rank is in the group"
    return work
