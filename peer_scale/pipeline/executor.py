"""Runs one stage's list of instructions: the same list that the simulator runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peer_scale.objectives.tasks import GlobalCounts
from peer_scale.parallel.topology import Topology
from peer_scale.pipeline.instructions import (
    Backward,
    Forward,
    HeadBackward,
    HeadForward,
    Instruction,
    Message,
    Network,
    OptimizerStep,
    Payload,
    Recv,
    Send,
)
from peer_scale.pipeline.messages import Messenger, PassOn
from peer_scale.pipeline.placement import Placement
from peer_scale.pipeline.zero import Adaptation
from peer_scale.samples.examples import Batch
from peer_scale.settings.run import RunConfig

_FORWARD_PAYLOADS = (Payload.ACTIVATION, Payload.SELECTED_STATES, Payload.LABELS)


@dataclass
class _Step:
    """What is under way in one step: `mail` is what has been made or received and waits for its use."""

    batches: Sequence[Batch]
    counts: GlobalCounts
    warmup: bool
    seed_dropout: Callable[..., None]
    messenger: Messenger
    sums: Tensor
    mail: dict[tuple[Payload, Network, int], Tensor] = field(default_factory=dict)
    corrupted: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    graphs: dict[tuple[str, int], tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    has_uncounted_backward: bool = False


class PipelineStage:
    """A rank's `Passes` under pipeline parallelism; `instructions` are its stage's for one optimizer step."""

    def __init__(
        self,
        engine: Any,
        topology: Topology,
        placement: Placement,
        instructions: Sequence[Instruction],
        run: RunConfig,
    ) -> None:
        self._engine, self._topology, self._placement = engine, topology, placement
        self._stage = topology.rank("pp")
        self._instructions = instructions
        self._forward_only = [i for i in instructions if _is_forward(i)]
        self._hidden_sizes = {"generator": run.model.generator.hidden_size}
        if run.model.ranker is not None:
            self._hidden_sizes["ranker"] = run.model.ranker.hidden_size
        self._dtype = run.compute_dtype
        self._zero = Adaptation(engine, topology.group("dp"))

    def train(
        self, batches: Sequence[Batch], counts: GlobalCounts, warmup: bool, seed_dropout: Callable[..., None]
    ) -> Tensor:
        """See `Passes`."""
        return self._run(self._instructions, batches, counts, warmup, seed_dropout)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], counts: GlobalCounts, warmup: bool) -> Tensor:
        """See `Passes`."""
        self._engine.eval()
        sums = self._run(self._forward_only, batches, counts, warmup, lambda *_: None)
        self._engine.train()
        return sums

    def _run(
        self,
        instructions: Sequence[Instruction],
        batches: Sequence[Batch],
        counts: GlobalCounts,
        warmup: bool,
        seed_dropout: Callable[..., None],
    ) -> Tensor:
        sums = torch.zeros(len(self._engine.module.statistics), dtype=torch.float64, device=self._topology.device)
        messenger = Messenger(self._topology, instructions, lambda message: self._empty(message, batches))
        step = _Step(batches, counts, warmup, seed_dropout, messenger, sums)
        for instruction in instructions:
            self._do(instruction, step)
        messenger.finish()
        return step.sums

    def _do(self, instruction: Instruction, step: _Step) -> None:
        match instruction:
            case Recv(message):
                step.mail[message.payload, message.network, message.micro] = step.messenger.receive(message)
            case Send(message):
                step.messenger.send(message, step.mail.pop((message.payload, message.network, message.micro)))
            case Forward("generator", micro):
                self._forward_generator(micro, step)
            case HeadForward(micro):
                self._forward_head(micro, step)
            case Forward("ranker", micro):
                self._forward_ranker(micro, step)
            case HeadBackward(micro):
                arrived = self._backward("head", micro, None, step)
                assert arrived is not None, "the head has an input"
                step.mail[Payload.SELECTED_GRADIENT, "generator", micro] = arrived
            case Backward(network, micro):
                self._backward_network(network, micro, step)
            case OptimizerStep():
                self._zero.before_update()
                self._count_backward(step)
                self._zero.after_update()

    def _forward_generator(self, micro: int, step: _Step) -> None:
        arrived = self._arrived("generator", micro, step)
        step.seed_dropout(micro, "generator", self._stage)
        output = self._engine("generator", step.batches[micro], arrived)
        self._keep("generator", micro, arrived, output, step)
        is_last = self._stage == self._placement.path("generator")[-1]
        payload = Payload.SELECTED_STATES if is_last else Payload.ACTIVATION
        step.mail[payload, "generator", micro] = output.detach()

    def _forward_head(self, micro: int, step: _Step) -> None:
        selected = step.mail.pop((Payload.SELECTED_STATES, "generator", micro)).requires_grad_()
        batch = step.batches[micro]
        loss, corrupted_ids, labels, statistics = self._engine("head", batch, selected, step.counts)
        self._keep("head", micro, selected, loss, step)
        step.sums += statistics
        if "ranker" in self._placement.networks:
            step.corrupted[micro] = (corrupted_ids, labels)
            if self._placement.path("ranker")[-1] != self._stage:
                at_positions = [t.gather(1, batch.positions).double() for t in (corrupted_ids, labels)]
                step.mail[Payload.LABELS, "ranker", micro] = torch.stack(at_positions)

    def _forward_ranker(self, micro: int, step: _Step) -> None:
        batch = step.batches[micro]
        arrived = self._arrived("ranker", micro, step)
        corrupted = step.corrupted.pop(micro, None)
        if corrupted is None and (Payload.LABELS, "ranker", micro) in step.mail:
            corrupted = self._unpack(step.mail.pop((Payload.LABELS, "ranker", micro)), batch)
        step.seed_dropout(micro, "ranker", self._stage)
        output = self._engine("ranker", batch, arrived, corrupted, step.counts, step.warmup)
        if self._stage == self._placement.path("ranker")[-1]:
            output, statistics = output
            step.sums += statistics
        else:
            step.mail[Payload.ACTIVATION, "ranker", micro] = output.detach()
        self._keep("ranker", micro, arrived, output, step)

    def _backward_network(self, network: Network, micro: int, step: _Step) -> None:
        path = self._placement.path(network)
        if self._stage != path[-1]:
            grad = step.mail.pop((Payload.GRADIENT, network, micro))
        elif network == "generator":
            grad = step.mail.pop((Payload.SELECTED_GRADIENT, network, micro))
        else:
            grad = None  # it begins with the loss
        arrived = self._backward(network, micro, grad, step)
        if arrived is not None:
            step.mail[Payload.GRADIENT, network, micro] = arrived

    def _backward(self, work: str, micro: int, grad: Tensor | None, step: _Step) -> Tensor | None:
        """Backward of what `work` did, from its loss or from the next stage's gradient; gives its input's gradient."""
        arrived, output = step.graphs.pop((work, micro))
        # DeepSpeed averages over data-parallel ranks; our loss is a share of the global sum
        loss = output * self._topology.size("dp") if grad is None else PassOn.apply(output, grad)
        self._zero.before_backward()
        self._count_backward(step)
        self._engine.backward(loss, scale_wrt_gas=False)
        step.has_uncounted_backward = True
        return None if arrived is None else arrived.grad

    def _count_backward(self, step: _Step) -> None:
        """Have the engine count the last backward call; it updates at the last one of a step.

        Not at once: in the update all stages meet, and what the last backward gives has to be sent before that.
        """
        if step.has_uncounted_backward:
            self._engine.step()
            step.has_uncounted_backward = False

    def _arrived(self, network: Network, micro: int, step: _Step) -> Tensor | None:
        if self._stage == 0:
            return None
        return step.mail.pop((Payload.ACTIVATION, network, micro)).requires_grad_()

    def _keep(self, work: str, micro: int, arrived: Tensor | None, output: Tensor, step: _Step) -> None:
        if torch.is_grad_enabled():
            step.graphs[work, micro] = (arrived, output)

    def _empty(self, message: Message, batches: Sequence[Batch]) -> Tensor:
        """Where a message is received: shapes are known to both ends."""
        batch = batches[message.micro]
        micro_batch, seq_length = batch.input_ids.shape
        device = self._topology.device
        hidden_size = self._hidden_sizes[message.network]
        if message.payload is Payload.LABELS:
            return torch.empty((2, *batch.positions.shape), dtype=torch.float64, device=device)
        if message.payload in (Payload.SELECTED_STATES, Payload.SELECTED_GRADIENT):
            return torch.empty((batch.positions.numel(), hidden_size), dtype=self._dtype, device=device)
        if self._topology.sequence_parallel:
            seq_length //= self._topology.size("tp")
        return torch.empty((seq_length, micro_batch, hidden_size), dtype=self._dtype, device=device)

    def _unpack(self, packed: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Corrupted ids and labels [B, S] of their values at the selected positions."""
        ids, labels = packed[0].to(batch.input_ids.dtype), packed[1].float()
        num_levels = float(self._engine.module.objective.num_levels)
        all_labels = torch.full(batch.input_ids.shape, num_levels, device=labels.device)
        return batch.input_ids.scatter(1, batch.positions, ids), all_labels.scatter(1, batch.positions, labels)


def num_backward_calls(instructions: Sequence[Instruction]) -> int:
    """What the engine counts as its gradient accumulation steps."""
    return sum(isinstance(instruction, Backward | HeadBackward) for instruction in instructions)


def _is_forward(instruction: Instruction) -> bool:
    if isinstance(instruction, Send | Recv):
        return instruction.message.payload in _FORWARD_PAYLOADS
    return isinstance(instruction, Forward | HeadForward)
