"""Runs one stage's list of instructions: the same list that the simulator runs."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from peer_scale.objectives.engine import Engine
from peer_scale.objectives.graph import Value
from peer_scale.objectives.works import StepInfo
from peer_scale.parallel.sequence import num_rows
from peer_scale.parallel.topology import Topology
from peer_scale.pipeline.dataflow import taken_at, taking_stages
from peer_scale.pipeline.instructions import (
    Backward,
    Forward,
    Instruction,
    Message,
    OptimizerStep,
    PostRecv,
    Recv,
    Send,
    forwards_only,
)
from peer_scale.pipeline.messages import Messenger, PassOn, Transport
from peer_scale.pipeline.placement import Placement
from peer_scale.pipeline.schedule import build_schedule
from peer_scale.pipeline.zero import Adaptation
from peer_scale.samples.examples import Batch

_Key: TypeAlias = tuple[str, int, bool]
"""Name of a value or of a work (its hidden states), micro-batch, and whether the gradient is meant."""


@dataclass(frozen=True)
class _Activations:
    """What a work's backward needs: what arrived, the share of the loss, and what was given with a gradient."""

    arrived: dict[str, Tensor]
    loss: Tensor | None
    given: dict[str, Tensor]


@dataclass
class _StepState:
    """What is under way in one step: `mail` is what has been made or received and waits for its use."""

    batches: Sequence[Batch]
    info: StepInfo
    seed_dropout: Callable[..., None]
    messenger: Messenger
    sums: Tensor
    backwards_left: int
    mail: dict[_Key, Tensor] = field(default_factory=dict)
    uses_left: Counter[_Key] = field(default_factory=Counter)
    activations: dict[tuple[str, int], _Activations] = field(default_factory=dict)
    has_uncounted_backward: bool = False

    def put(self, key: _Key, tensor: Tensor, uses: int) -> None:
        """Keep a tensor for so many uses."""
        if uses:
            self.mail[key], self.uses_left[key] = tensor, uses

    def take(self, key: _Key) -> Tensor:
        """Give a tensor, and forget it at its last use."""
        self.uses_left[key] -= 1
        return self.mail[key] if self.uses_left[key] else self.mail.pop(key)


class PipelineRunner:
    """A rank's `Runner` under pipeline parallelism; steps may differ in their number of micro-batches."""

    def __init__(
        self, engine: Engine, topology: Topology, placement: Placement, transport: Transport, dtype: torch.dtype
    ) -> None:
        """Take over an engine around a PretrainingTask of this stage's part; `dtype` is that of matrix products."""
        self._engine, self._topology, self._placement, self._dtype = engine, topology, placement, dtype
        self._transport = transport
        self._graph, self._stage = placement.graph, topology.rank("pp")
        self._instructions = functools.cache(
            lambda num_micro: build_schedule("two_pass", placement, num_micro).stages[self._stage]
        )
        self._zero = Adaptation(engine, topology.group("dp"))

    def train(self, batches: Sequence[Batch], step: StepInfo, seed_dropout: Callable[..., None]) -> Tensor:
        """See `Runner`."""
        return self._run(self._instructions(len(batches)), batches, step, seed_dropout)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], step: StepInfo) -> Tensor:
        """See `Runner`."""
        self._engine.eval()
        instructions = forwards_only(self._instructions(len(batches)))
        sums = self._run(instructions, batches, step, lambda *_: None)
        self._engine.train()
        return sums

    def _run(
        self,
        instructions: Sequence[Instruction],
        batches: Sequence[Batch],
        info: StepInfo,
        seed_dropout: Callable[..., None],
    ) -> Tensor:
        sums = torch.zeros(len(self._engine.module.sums), dtype=torch.float64, device=self._topology.device)
        messenger = Messenger(self._transport, lambda message: self._empty(message, batches))
        backwards = sum(isinstance(instruction, Backward) for instruction in instructions)
        state = _StepState(batches, info, seed_dropout, messenger, sums, backwards_left=backwards)
        for instruction in instructions:
            self._do(instruction, state)
        messenger.finish()
        return state.sums

    def _do(self, instruction: Instruction, state: _StepState) -> None:
        match instruction:
            case PostRecv(message):
                state.messenger.post(message)
            case Recv(message):
                key = (message.value, message.micro, message.is_gradient)
                state.put(key, state.messenger.receive(message), self._uses_here(message))
            case Send(message):
                state.messenger.send(message, state.take((message.value, message.micro, message.is_gradient)))
            case Forward(work, micro):
                self._forward(work, micro, state)
            case Backward(work, micro):
                self._backward(work, micro, state)
            case OptimizerStep():
                self._zero.before_update()
                self._count_backward(state)
                self._zero.after_update()

    def _forward(self, name: str, micro: int, state: _StepState) -> None:
        work = self._graph.work(name)
        values = {value: state.take((value, micro, False)) for value in taken_at(self._placement, self._stage, work)}
        if self._stage != self._placement.path(name)[0]:
            values[name] = state.take((name, micro, False))
        arrived = {value: values[value].requires_grad_() for value in values if self._has_gradient(value)}
        if work.network is not None:
            state.seed_dropout(micro, name, self._stage)
        loss, sums, given = self._engine((name,), state.batches[micro], state.info, values)
        state.sums += sums
        if torch.is_grad_enabled() and work.has_backward:
            kept = {value: tensor for value, tensor in given.items() if self._has_gradient(value)}
            state.activations[name, micro] = _Activations(arrived, loss, kept)
        for value, tensor in given.items():
            state.put((value, micro, False), tensor.detach(), self._uses(value))

    def _backward(self, name: str, micro: int, state: _StepState) -> None:
        """Go back from the work's loss and the gradients of what it gave; keep the gradients of what it took."""
        kept = state.activations.pop((name, micro))
        # DeepSpeed averages over data-parallel ranks; our loss is a share of the global sum
        terms = [] if kept.loss is None else [kept.loss * self._topology.size("dp")]
        terms += [PassOn.apply(tensor, state.take((value, micro, True))) for value, tensor in kept.given.items()]
        self._zero.before_backward()
        self._count_backward(state)
        state.backwards_left -= 1
        self._engine.set_gradient_accumulation_boundary(not state.backwards_left)
        self._engine.backward(sum(terms[1:], terms[0]), scale_wrt_gas=False)
        state.has_uncounted_backward = True
        for value, tensor in kept.arrived.items():
            assert tensor.grad is not None, f"{value} has no part in the loss"
            state.put((value, micro, True), tensor.grad, uses=1)

    def _count_backward(self, state: _StepState) -> None:
        """Have the engine count the last backward call; it updates at the last one of a step.

        Not at once: in the update all stages meet, and what the last backward gives has to be sent before that.
        """
        if state.has_uncounted_backward:
            self._engine.step()
            state.has_uncounted_backward = False

    def _has_gradient(self, name: str) -> bool:
        value = self._value(name)
        return value is None or value.has_gradient

    def _value(self, name: str) -> Value | None:
        """Find a value of the graph; None for the hidden states of a work."""
        return None if any(work.name == name for work in self._graph.works) else self._graph.value(name)

    def _uses(self, name: str) -> int:
        """Count how often what this stage has made is used: by works here, and to be sent to other stages."""
        if self._value(name) is None:
            return 1
        sent = sum(stage != self._stage for stage in taking_stages(self._placement, name))
        return sent + self._takers_here(name)

    def _uses_here(self, message: Message) -> int:
        return 1 if message.is_gradient or self._value(message.value) is None else self._takers_here(message.value)

    def _takers_here(self, name: str) -> int:
        works = self._graph.takers(name)
        here = [work for work in works if self._stage in self._placement.path(work.name)]
        return sum(name in taken_at(self._placement, self._stage, work) for work in here)

    def _empty(self, message: Message, batches: Sequence[Batch]) -> Tensor:
        """Make room for a message: shapes are known to both ends."""
        batch, device = batches[message.micro], self._topology.device
        value = self._value(message.value)
        if value is not None:
            shape = (batch.positions.numel(),) if value.width is None else (batch.positions.numel(), value.width)
            dtype = self._dtype if value.format == "compute" else getattr(torch, value.format)
            return torch.empty(shape, dtype=dtype, device=device)
        network = self._graph.work(message.value).network
        assert network is not None, "only networks have hidden states"
        rows = num_rows(
            batch.sequences.num_tokens, self._topology.size("tp"), sequence_parallel=self._topology.sequence_parallel
        )
        width = self._graph.shape(network).hidden_size
        return torch.empty((rows, width), dtype=self._dtype, device=device)
