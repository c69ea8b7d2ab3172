"""Megatron's sequence parallelism: between tensor-parallel products each rank keeps a slice of the tokens.

megatron-core's own functions for it allocate on CUDA; these run on every device. All of them split or join dim 0, the
T tokens of a micro-batch, over the ranks of the tensor-parallel group: zeros fill T up to a multiple of their number.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from peer_scale.parallel.tensor_parallel import TensorParallel

# renamed in torch 2.13, where the old names warn
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def num_rows(num_tokens: int, tensor_parallel_size: int, *, sequence_parallel: bool) -> int:
    """Count the rows of hidden states that a rank has between tensor-parallel products."""
    return -(-num_tokens // tensor_parallel_size) if sequence_parallel else num_tokens


def scatter_tokens(hidden: Tensor, tensor_parallel: TensorParallel) -> Tensor:
    """Keep a slice [ceil(T/tp), ...] of what every rank has whole; backward joins the slices' gradients."""
    return _Split.apply(hidden, tensor_parallel) if tensor_parallel.sequence_parallel else hidden


def gather_tokens(hidden: Tensor, num_tokens: int, tensor_parallel: TensorParallel) -> Tensor:
    """Give all tokens [T, ...] for what every rank then computes alike; backward keeps this rank's slice."""
    return _Join.apply(hidden, num_tokens, tensor_parallel) if tensor_parallel.sequence_parallel else hidden


def gathered_linear(hidden: Tensor, weight: Tensor, tensor_parallel: TensorParallel) -> Tensor:
    """Multiply the rows of all ranks with this rank's part of a weight: [T/tp, I] and [O/tp, I] -> [T, O/tp].

    Backward adds up the ranks' gradients of the rows and slices them. As in megatron-core only this rank's rows are
    kept: they are gathered again while the gradient of the rows is computed, and that is sent while the weight's is.
    """
    return _GatheredLinear.apply(hidden, weight, tensor_parallel)


def reduce_scatter_tokens(partial: Tensor, tensor_parallel: TensorParallel) -> Tensor:
    """Give a slice of the sum of all ranks' rows; backward joins the gradients."""
    return _AddUpAndSplit.apply(partial, tensor_parallel)


def whole_gradients(parameters: tuple[Tensor, ...], tensor_parallel: TensorParallel) -> tuple[Tensor, ...]:
    """Give the replicated parameters to a layer that sees a slice: backward adds up their gradients in one message."""
    return _WholeGradients.apply(tensor_parallel, *parameters) if tensor_parallel.sequence_parallel else parameters


@contextlib.contextmanager
def own_random_stream(tensor_parallel: TensorParallel) -> Iterator[None]:
    """Dropout inside draws other numbers on each tensor-parallel rank: for activations that are split over them.

    Outside, the ranks' default generators run in step, since replicated activations need equal masks. The seed comes
    from the CPU's, which no GPU has to be asked for; so what repeats a stretch of work from the saved states of its
    generators repeats these numbers too. Inside only the generator of the ranks' device is another one.
    """
    if tensor_parallel.size == 1:
        yield
        return
    seed = int(torch.randint(2**62, ()))
    generator = _default_generator(tensor_parallel.device)
    state = generator.get_state()  # a GPU's is on the host, too
    generator.manual_seed(seed + tensor_parallel.rank)
    try:
        yield
    finally:
        generator.set_state(state)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tensor_parallel: TensorParallel) -> Tensor:
        ctx.tensor_parallel, ctx.num_tokens = tensor_parallel, len(hidden)
        return _own_slice(hidden, tensor_parallel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.tensor_parallel)[: ctx.num_tokens], None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, num_tokens: int, tensor_parallel: TensorParallel) -> Tensor:
        ctx.tensor_parallel = tensor_parallel
        return _gather(hidden, tensor_parallel)[:num_tokens]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _own_slice(grad, ctx.tensor_parallel), None, None


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tensor_parallel: TensorParallel) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.tensor_parallel = tensor_parallel
        return F.linear(_gather(hidden, tensor_parallel), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        group = ctx.tensor_parallel.group
        grad_hidden = grad_weight = gathering = sending = None
        if ctx.needs_input_grad[1]:
            whole = hidden.new_empty((len(grad), *hidden.shape[1:]))
            gathering = _all_gather(whole, hidden.contiguous(), group=group, async_op=True)
        if ctx.needs_input_grad[0]:
            partial = grad.matmul(weight)
            grad_hidden = hidden.new_empty(hidden.shape)
            sending = _reduce_scatter(grad_hidden, partial, group=group, async_op=True)
        if gathering is not None:
            gathering.wait()
            grad_weight = grad.t().matmul(whole)
        if sending is not None:
            sending.wait()
        return grad_hidden, grad_weight, None


class _AddUpAndSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, tensor_parallel: TensorParallel) -> Tensor:
        ctx.tensor_parallel = tensor_parallel
        return _sum_own_slice(partial, tensor_parallel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.tensor_parallel), None


class _WholeGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor_parallel: TensorParallel, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.tensor_parallel = tensor_parallel
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packed = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(packed, group=ctx.tensor_parallel.group)
        parts = packed.split([grad.numel() for grad in grads])
        return None, *(part.view_as(grad) for part, grad in zip(parts, grads, strict=True))


def _own_slice(hidden: Tensor, tensor_parallel: TensorParallel) -> Tensor:
    rows = num_rows(len(hidden), tensor_parallel.size, sequence_parallel=True)
    own = hidden[rows * tensor_parallel.rank : rows * (tensor_parallel.rank + 1)]
    missing = rows - len(own)
    return own.contiguous() if not missing else torch.cat([own, own.new_zeros((missing, *own.shape[1:]))])


def _gather(hidden: Tensor, tensor_parallel: TensorParallel) -> Tensor:
    whole = hidden.new_empty((hidden.shape[0] * tensor_parallel.size, *hidden.shape[1:]))
    _all_gather(whole, hidden.contiguous(), group=tensor_parallel.group)
    return whole


def _sum_own_slice(partial: Tensor, tensor_parallel: TensorParallel) -> Tensor:
    own = partial.new_empty((partial.shape[0] // tensor_parallel.size, *partial.shape[1:]))
    _reduce_scatter(own, partial.contiguous(), group=tensor_parallel.group)
    return own
