"""Point-to-point transfers between stages: shapes that both ends know, never waiting for the receiver."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peer_scale.parallel.topology import Topology
from peer_scale.pipeline.instructions import Instruction, Message, Recv

_RECEIVES_AHEAD = 2


class Messenger:
    """Sends and receives this rank's messages of one step.

    What goes to later stages and what goes back use different groups, so that under NCCL neither waits behind the
    other. A few receives from each stage are posted before they are needed.
    """

    def __init__(
        self, topology: Topology, instructions: Sequence[Instruction], empty: Callable[[Message], Tensor]
    ) -> None:
        self._topology, self._empty = topology, empty
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._to_receive: dict[int, deque[Message]] = defaultdict(deque)
        self._posted: dict[Message, tuple[Any, Tensor]] = {}
        for instruction in instructions:
            if isinstance(instruction, Recv):
                self._to_receive[instruction.message.source].append(instruction.message)
        for source in self._to_receive:
            for _ in range(_RECEIVES_AHEAD):
                self._post(source)

    def send(self, message: Message, tensor: Tensor) -> None:
        """Start sending; the tensor is kept until it has gone."""
        tensor = tensor.contiguous()
        group = self._group(message)
        peer = dist.get_global_rank(group, message.destination)
        self._sent.append((dist.isend(tensor, peer, group=group), tensor))
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()

    def receive(self, message: Message) -> Tensor:
        """Wait for a message."""
        request, tensor = self._posted.pop(message)
        request.wait()
        self._post(message.source)
        return tensor

    def finish(self) -> None:
        """Wait until all that was sent has gone."""
        for request, _ in self._sent:
            request.wait()
        assert not self._posted and not any(self._to_receive.values()), "messages were never asked for"

    def _post(self, source: int) -> None:
        if self._to_receive[source]:
            message = self._to_receive[source].popleft()
            tensor = self._empty(message)
            group = self._group(message)
            self._posted[message] = (dist.irecv(tensor, dist.get_global_rank(group, source), group=group), tensor)

    def _group(self, message: Message) -> dist.ProcessGroup:
        return self._topology.pipeline_group(forward=message.source < message.destination)


class PassOn(torch.autograd.Function):
    """A scalar whose backward puts a gradient that came from another stage into `output`.

    The incoming gradient has been through that stage's loss scaling, so the scalar's own gradient is left out.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return output.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None
