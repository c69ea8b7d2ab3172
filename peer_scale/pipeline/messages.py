"""Point-to-point transfers between stages: shapes that both ends know, never waiting for the receiver."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from peer_scale.pipeline.instructions import Message


class Request(Protocol):
    """A transfer under way."""

    def wait(self) -> object:
        """Wait for it; with NCCL the device's computing waits, not the host."""

    def is_completed(self) -> bool:
        """Say whether it is over."""


class Transport(Protocol):
    """What carries messages; in each channel the first that is sent is the first that is received."""

    def isend(self, message: Message, tensor: Tensor) -> Request:
        """Start sending."""

    def irecv(self, message: Message, tensor: Tensor) -> Request:
        """Start receiving."""


class Messenger:
    """Sends and receives this rank's messages of one step, in the order in which it is told to."""

    def __init__(self, transport: Transport, empty: Callable[[Message], Tensor]) -> None:
        """Take what carries the messages, and what makes room for one."""
        self._transport, self._empty = transport, empty
        self._sent: deque[tuple[Request, Tensor]] = deque()
        self._posted: dict[Message, tuple[Request, Tensor]] = {}

    def send(self, message: Message, tensor: Tensor) -> None:
        """Start sending; the tensor is kept until it has gone."""
        tensor = tensor.contiguous()
        self._sent.append((self._transport.isend(message, tensor), tensor))
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()

    def post(self, message: Message) -> None:
        """Make room for a message and start receiving it."""
        tensor = self._empty(message)
        self._posted[message] = (self._transport.irecv(message, tensor), tensor)

    def receive(self, message: Message) -> Tensor:
        """Wait for a message whose receive has been posted."""
        request, tensor = self._posted.pop(message)
        request.wait()
        return tensor

    def finish(self) -> None:
        """Wait until all that was sent has gone."""
        for request, _ in self._sent:
            request.wait()
        assert not self._posted, "messages were never asked for"


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
