"""The generator's output layer over vocabulary shards: loss, sample, and what the rank labels need of the logits.

Each rank holds a slice of the vocabulary and goes through it chunk by chunk: no rank ever holds more than one chunk of
logits, and what travels between ranks is a few numbers a position.

The weight of a token is exp(its logit - the target's), so that no maximum is needed first and the loss is the logarithm
of the sum of weights. Weights are rounded to multiples of 2**-34 before they are added in fp64: up to a loss of 13 nats
such sums are exact, so the token that a uniform number picks depends on the logits alone, not on how the vocabulary is
cut into shards and chunks or in which order it is added up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_GRID_BITS = 34
_LOG2_E = math.log2(math.e)
_CHUNK_SIZE = 2048  # a chunk of a few hundred positions stays in the cache
_BLOCK = 64  # a chunk's sums are kept by blocks where a token is searched for
# weights beyond this many bits over the target's are measured from the greatest logit instead
_MAX_BITS = 80.0


class GeneratorOutput(NamedTuple):
    """What `generator_head` gives for n positions; all [n], and equal on every rank of the group."""

    loss: Tensor
    sampled_ids: Tensor
    original_logit: Tensor
    sampled_logit: Tensor
    original_rank: Tensor


def generator_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    uniforms: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> GeneratorOutput:
    """Cross-entropy of the targets, one token sampled at temperature 1, and the target's logit and rank.

    Args:
        hidden: [n, h], the same on every rank of `group`.
        weight: [V/tp, h], this rank's rows of the output matrix.
        bias: [V/tp]; -inf keeps a row that only pads the vocabulary out of everything.
        targets: [n] token ids of the whole vocabulary.
        uniforms: [n] in [0, 1): position i takes the first token whose cumulative probability exceeds uniforms[i].
        group: the tensor-parallel ranks in the order of their shards; None for one.
        chunk_size: rows of the vocabulary handled at a time; memory is O(n x chunk_size), forward and backward. None
            takes 2048.

    Returns:
        `loss` (fp32) is differentiable in hidden, weight and bias; the rest carries no gradient. `original_rank` is
        1 + the number of tokens with a strictly greater logit (Section 3.2.1); logits that differ by no more than the
        rounding of a product count as equal.

    Products are in the format of `hidden`, everything else in fp32 and fp64. A rank sends 36 bytes a position forward
    (each reduction counted once) and [n, h] backward.
    """
    size = _CHUNK_SIZE if chunk_size is None else chunk_size
    return GeneratorOutput(*_GeneratorHead.apply(hidden, weight, bias, targets, uniforms, group, size))


class _GeneratorHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        uniforms: Tensor,
        group: dist.ProcessGroup | None,
        chunk_size: int,
    ) -> tuple[Tensor, ...]:
        shard = _Shard(hidden, weight, bias, group, chunk_size)
        original_logit = shard.target_logits(targets)
        reference = original_logit
        sums, rank, totals = shard.add_up(reference, original_logit)
        if _needs_greater_reference(totals):
            reference = shard.greatest(original_logit)
            sums, rank, totals = shard.add_up(reference, original_logit)
        log_sum_exp = reference + (totals.sum(-1).log2() - _GRID_BITS).div(_LOG2_E).float()
        sampled_ids, sampled_logit = shard.sample(uniforms, reference, sums, totals)
        ctx.save_for_backward(hidden, weight, bias, targets, log_sum_exp)
        ctx.group, ctx.chunk_size = group, chunk_size
        ctx.mark_non_differentiable(sampled_ids, original_logit, sampled_logit, rank)
        return log_sum_exp - original_logit, sampled_ids, original_logit, sampled_logit, rank

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_sum_exp = ctx.saved_tensors
        shard = _Shard(hidden, weight, bias, ctx.group, ctx.chunk_size)
        return *shard.gradients(targets, log_sum_exp, grad_loss), None, None, None, None


class _Chunk(NamedTuple):
    """Some rows of a shard: their matrix, their bias in fp32, and room for [n, rows] logits."""

    first: int
    weight: Tensor
    bias: Tensor
    product: Tensor
    logits: Tensor


class _Shard:
    """One rank's slice of the vocabulary over n positions."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor, group: dist.ProcessGroup | None, chunk_size: int
    ) -> None:
        self.hidden, self.weight, self.bias, self.group = hidden, weight, bias.float(), group
        self.num_ranks = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self.num_rows = weight.shape[0]
        self.first = self.rank * self.num_rows
        self.chunk_size = max(1, min(chunk_size, self.num_rows))
        self._product = hidden.new_empty(hidden.shape[0] * self.chunk_size)
        is_single = hidden.dtype == torch.float32
        self._logits = self._product if is_single else torch.empty_like(self._product, dtype=torch.float32)

    def chunks(self) -> Iterator[_Chunk]:
        for first in range(0, self.num_rows, self.chunk_size):
            rows = slice(first, min(first + self.chunk_size, self.num_rows))
            shape = (self.hidden.shape[0], rows.stop - first)
            product, logits = (room[: math.prod(shape)].view(shape) for room in (self._product, self._logits))
            yield _Chunk(first, self.weight[rows], self.bias[rows], product, logits)

    def logits(self, chunk: _Chunk, minus: Tensor) -> Tensor:
        """Logits of a chunk less a number a position, fp32 [n, rows]; valid until the next chunk's."""
        torch.mm(self.hidden, chunk.weight.t(), out=chunk.product)
        if chunk.logits.dtype != chunk.product.dtype:
            chunk.logits.copy_(chunk.product)
        return chunk.logits.add_(chunk.bias).sub_(minus[:, None])

    def target_logits(self, targets: Tensor) -> Tensor:
        """Each position's target's logit [n], by a product of the same kind as all others."""
        rows, is_own = self._localise(targets)
        needed, column = torch.unique(rows, return_inverse=True)
        product = self.hidden.new_empty(0)
        found = []
        # few columns at a time: memory as for a chunk; and never so few that another kernel computes them
        for first in range(0, len(needed), self.chunk_size):
            some = needed[first : first + self.chunk_size]
            padded = torch.cat([some, some.new_zeros(-len(some) % _BLOCK)])
            product = self.hidden @ self.weight[padded].t()
            inside = (column >= first) & (column < first + len(some))
            own_column = torch.where(inside, column - first, 0)
            found.append(torch.where(inside, product.gather(1, own_column[:, None]).squeeze(1).float(), 0.0))
        values = sum(found, torch.zeros(len(targets), device=self.hidden.device)) + self.bias[rows]
        return self._sum(torch.where(is_own, values, 0.0))

    def add_up(self, reference: Tensor, original_logit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One pass: weights by chunk [n, chunks], targets' ranks [n], weights by tensor-parallel rank [n, ranks]."""
        offset = reference - _GRID_BITS / _LOG2_E
        threshold = (original_logit - offset) * _LOG2_E
        threshold = torch.nextafter(threshold + (1 + original_logit.abs()) * 2**-20, threshold.new_tensor(math.inf))
        sums = [reference.new_zeros(len(reference), dtype=torch.float64)]  # so that an empty shard has one, too
        greater, room = torch.zeros_like(reference), torch.empty_like(self._logits)
        for chunk in self.chunks():
            bits = self.logits(chunk, offset).mul_(_LOG2_E)
            # flags of the operands' type are made and added up several times faster than booleans
            flags = room[: bits.numel()].view(bits.shape)
            greater += torch.gt(bits, threshold[:, None], out=flags).sum(-1)
            sums.append(bits.exp2_().round_().sum(-1, dtype=torch.float64))
        by_chunk = torch.stack(sums, 1)[:, 1:]
        gathered = self._gather(torch.stack([by_chunk.sum(-1), greater.double()]))
        return by_chunk, 1 + gathered[:, 1].sum(0).long(), gathered[:, 0].t()

    def greatest(self, at_least: Tensor) -> Tensor:
        """The greatest logit of each position [n]."""
        greatest = at_least.clone()
        nothing = torch.zeros_like(at_least)
        for chunk in self.chunks():
            greatest = torch.maximum(greatest, self.logits(chunk, nothing).amax(-1))
        return self._reduce(greatest, dist.ReduceOp.MAX)

    def sample(self, uniforms: Tensor, reference: Tensor, sums: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse-CDF sample and its logit, [n] each: only the chunk that a number falls into is computed again."""
        ends = totals.cumsum(-1)
        threshold = (uniforms.double() * ends[:, -1]).floor()
        owner = (ends <= threshold[:, None]).sum(-1)
        threshold -= ends[:, self.rank] - totals[:, self.rank]
        own_ends = sums.cumsum(-1)
        number = (own_ends <= threshold[:, None]).sum(-1)
        number = torch.where(owner == self.rank, number, -1)
        picked = torch.zeros((2, len(uniforms)), dtype=torch.float64, device=uniforms.device)
        for index, chunk in enumerate(self.chunks()):
            here = (number == index).nonzero().squeeze(1)
            if len(here):
                rest = threshold[here] - (own_ends[here, index] - sums[here, index])
                picked[:, here] = self._search(chunk, here, reference[here], rest)
        picked = self._sum(picked)
        return picked[0].long(), picked[1].float()

    def _search(self, chunk: _Chunk, positions: Tensor, reference: Tensor, threshold: Tensor) -> Tensor:
        """Token ids and logits [2, k] where the weights of a chunk add up to more than `threshold`."""
        # as many rows as a small product kernel would not be chosen for
        padded = torch.cat([positions, positions.new_zeros(max(0, 16 - len(positions)))])
        product = (self.hidden[padded] @ chunk.weight.t())[: len(positions)]
        logits = product.float() + chunk.bias
        offset = reference - _GRID_BITS / _LOG2_E
        weights = (logits - offset[:, None]).mul_(_LOG2_E).exp2_().round_()
        blocks = torch.nn.functional.pad(weights, (0, -weights.shape[1] % _BLOCK)).view(len(positions), -1, _BLOCK)
        ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
        # recomputed weights may differ in a last bit: stay within what has any weight
        threshold = torch.minimum(threshold, ends[:, -1] - 1)
        block = (ends <= threshold[:, None]).sum(-1)
        row = torch.arange(len(positions), device=positions.device)
        chosen = blocks[row, block].double()
        within = chosen.cumsum(-1) + (ends[row, block] - chosen.sum(-1))[:, None]
        column = block * _BLOCK + (within <= threshold[:, None]).sum(-1)
        return torch.stack([(column + chunk.first + self.first).double(), logits[row, column].double()])

    def gradients(self, targets: Tensor, log_sum_exp: Tensor, grad_loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden, weight and bias, chunk by chunk."""
        grad_hidden = torch.zeros_like(self.hidden, dtype=torch.float32)
        grad_weight, grad_bias = torch.empty_like(self.weight), torch.empty_like(self.bias)
        rows, is_own = self._localise(targets)
        low_room = torch.empty_like(self._product)
        for chunk in self.chunks():
            grad = self.logits(chunk, log_sum_exp).mul_(_LOG2_E).exp2_()
            stop = chunk.first + grad.shape[1]
            inside = is_own & (rows >= chunk.first) & (rows < stop)
            column = torch.where(inside, rows - chunk.first, 0)
            grad.scatter_add_(1, column[:, None], -inside[:, None].float())
            grad.mul_(grad_loss[:, None])
            low = low_room[: grad.numel()].view(grad.shape).copy_(grad)
            grad_hidden += low @ chunk.weight
            torch.mm(low.t(), self.hidden, out=grad_weight[chunk.first : stop])
            torch.sum(grad, 0, out=grad_bias[chunk.first : stop])
        return self._sum(grad_hidden).to(self.hidden.dtype), grad_weight, grad_bias

    def _localise(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Row of each id in this shard (0 where it is elsewhere), and whether it is here."""
        is_own = (ids >= self.first) & (ids < self.first + self.num_rows)
        return torch.where(is_own, ids - self.first, 0), is_own

    def _sum(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def _reduce(self, tensor: Tensor, op: Any) -> Tensor:
        if self.num_ranks > 1:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def _gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, stacked along a new first dimension."""
        if self.num_ranks == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.num_ranks)]
        dist.all_gather(parts, tensor, group=self.group)
        return torch.stack(parts)


def _needs_greater_reference(totals: Tensor) -> bool:
    """Whether some token's weight is beyond what is added up exactly or at all; alike on all ranks."""
    return bool((~(totals.sum(-1) < 2.0 ** (_MAX_BITS + _GRID_BITS))).any())
