"""Megatron's sequence parallelism: between tensor-parallel products each rank keeps a slice of the sequence.

megatron-core's own functions for it allocate on CUDA; these run on every device. All of them split or join dim 0, the
sequence, over the ranks of the tensor-parallel group.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peer_scale.parallel.topology import Topology

# renamed in torch 2.13, where the old names warn
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def split_sequence(hidden: Tensor, topology: Topology) -> Tensor:
    """Keep a slice [S/tp, ...] of what every rank has whole; backward joins the slices' gradients."""
    return _Split.apply(hidden, topology) if topology.sequence_parallel else hidden


def join_sequence(hidden: Tensor, topology: Topology) -> Tensor:
    """The whole sequence [S, ...] for what every rank then computes alike; backward keeps this rank's slice."""
    return _Join.apply(hidden, topology) if topology.sequence_parallel else hidden


def join_sequence_for_split_weights(hidden: Tensor, topology: Topology) -> Tensor:
    """The whole sequence as input of a column-parallel layer; backward adds up the ranks' gradients, and slices."""
    return _JoinForSplitWeights.apply(hidden, topology) if topology.sequence_parallel else hidden


def add_up_and_split(partial: Tensor, topology: Topology) -> Tensor:
    """A slice of the sum of all ranks' [S, ...]; backward joins the gradients."""
    return _AddUpAndSplit.apply(partial, topology)


def whole_gradients(parameters: tuple[Tensor, ...], topology: Topology) -> tuple[Tensor, ...]:
    """The replicated parameters of a layer that sees only a slice: backward adds up their gradients (one message)."""
    return _WholeGradients.apply(topology, *parameters) if topology.sequence_parallel else parameters


@contextlib.contextmanager
def own_random_stream(topology: Topology) -> Iterator[None]:
    """Dropout inside draws other numbers on each tensor-parallel rank: for activations that are split over them.

    Outside, the ranks' default generators run in step, since replicated activations need equal masks. The seed comes
    from there, so what repeats a stretch of work from its saved generator state repeats these numbers too.
    """
    if topology.size("tp") == 1:
        yield
        return
    seed = int(torch.randint(2**62, ()))
    devices = [topology.device] if topology.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + topology.rank("tp"))
        yield


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, topology: Topology) -> Tensor:
        ctx.topology = topology
        return _own_slice(hidden, topology)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.topology), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, topology: Topology) -> Tensor:
        ctx.topology = topology
        return _gather(hidden, topology)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _own_slice(grad, ctx.topology), None


class _JoinForSplitWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, topology: Topology) -> Tensor:
        ctx.topology = topology
        return _gather(hidden, topology)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_own_slice(grad, ctx.topology), None


class _AddUpAndSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, topology: Topology) -> Tensor:
        ctx.topology = topology
        return _sum_own_slice(partial, topology)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.topology), None


class _WholeGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, topology: Topology, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.topology = topology
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packed = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(packed, group=ctx.topology.group("tp"))
        parts = packed.split([grad.numel() for grad in grads])
        return None, *(part.view_as(grad) for part, grad in zip(parts, grads, strict=True))


def _own_slice(hidden: Tensor, topology: Topology) -> Tensor:
    return hidden.chunk(topology.size("tp"))[topology.rank("tp")].contiguous()


def _gather(hidden: Tensor, topology: Topology) -> Tensor:
    whole = hidden.new_empty((hidden.shape[0] * topology.size("tp"), *hidden.shape[1:]))
    _all_gather(whole, hidden.contiguous(), group=topology.group("tp"))
    return whole


def _sum_own_slice(partial: Tensor, topology: Topology) -> Tensor:
    own = partial.new_empty((partial.shape[0] // topology.size("tp"), *partial.shape[1:]))
    _reduce_scatter(own, partial.contiguous(), group=topology.group("tp"))
    return own
