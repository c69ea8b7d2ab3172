"""The generator's output layer over vocabulary shards: loss, sample, and what the rank labels need of the logits.

Each rank holds a slice of the vocabulary and goes through it chunk by chunk: no rank ever holds more than one chunk of
logits, and what travels between ranks is a few numbers per position.

The weight of a token is exp(its logit - the target's), so that no maximum is needed first and the loss is the logarithm
of the sum of weights. Weights are rounded to multiples of 2**-34 before they are added in fp64: up to a loss of 13 nats
such sums are exact, so the token that a uniform number picks depends on the logits alone, not on how the vocabulary is
cut into shards and chunks or in which order it is added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from peer_scale.kernels.availability import on_gpu, use_triton
from peer_scale.kernels.vocab_chunk import LOG2_E, add_up_chunk, chunk_gradient

_GRID_BITS = 34
CHUNK_SIZE = 2048
"""Rows of the vocabulary handled at a time: a chunk of a few hundred positions stays in the cache."""

REDUCED_BYTES, GATHERED_BYTES = 20, 16
"""What a tensor-parallel rank reduces and gathers per position, forward; backward reduces the gradient of hidden."""

EXCLUSION_REDUCED_BYTES, DRAW_REDUCED_BYTES = 8, 16
"""What it reduces besides to exclude the target from the negatives, and for each negative."""

_BLOCK = 64  # a chunk's sums are kept by blocks where a token is searched for
_LEAST_BITS = 12  # what is left must weigh at least 2**-12 of what weights are measured by
# weights beyond this many bits over the target's are measured from the greatest logit instead
_MAX_BITS = 80.0


class _Fields(NamedTuple):
    loss: Tensor
    sampled_ids: Tensor
    original_logit: Tensor
    sampled_logit: Tensor
    original_rank: Tensor


class GeneratorOutput(_Fields):
    """What `generator_head` gives for n positions; all [n], and equal on every rank of the group.

    `negatives` [n, k], where they were asked for, is an attribute beside the tuple's fields.
    """

    negatives: Tensor | None = None


def generator_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    uniforms: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
    negative_uniforms: Tensor | None = None,
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
        negative_uniforms: [n, k] in [0, 1), for `negatives`; None for none. The vocabulary must have more than k tokens
            beside the padding.

    Returns:
        `loss` (fp32) is differentiable in hidden, weight and bias; the rest carries no gradient. `original_rank` is
        1 + the number of tokens with a strictly greater logit (Section 3.2.1); logits that differ by no more than the
        rounding of a product count as equal. `negatives` are k distinct tokens, none of them the target, drawn one
        after the other by their probabilities among those that are left (the law of Gumbel-top-k).

    Products are in the format of `hidden`, everything else in fp32 and fp64. A rank sends 36 bytes per position forward
    (each reduction counted once), 8 + 16 k more for k negatives, and [n, h] backward.
    """
    size = CHUNK_SIZE if chunk_size is None else chunk_size
    *fields, negatives = _GeneratorHead.apply(hidden, weight, bias, targets, uniforms, negative_uniforms, group, size)
    output = GeneratorOutput(*fields)
    output.negatives = negatives
    return output


class _GeneratorHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        uniforms: Tensor,
        negative_uniforms: Tensor | None,
        group: dist.ProcessGroup | None,
        chunk_size: int,
    ) -> tuple[Tensor | None, ...]:
        shard = _Shard(hidden, weight, bias, group, chunk_size)
        original_logit = shard.target_logits(targets)
        reference = original_logit
        sums, rank, totals = shard.add_up(reference, original_logit)
        if shard.needs_greater_reference(totals):
            reference = shard.greatest(original_logit)
            sums, rank, totals = shard.add_up(reference, original_logit)
        log_sum_exp = reference + (totals.sum(-1).log2() - _GRID_BITS).div(LOG2_E).float()
        sampled_ids, sampled_logit = shard.sample(uniforms, reference, sums, totals)
        negatives = None
        if negative_uniforms is not None:
            negatives = _Remaining(shard, targets, reference, sums, totals).draw(negative_uniforms)
            ctx.mark_non_differentiable(sampled_ids, original_logit, sampled_logit, rank, negatives)
        else:
            ctx.mark_non_differentiable(sampled_ids, original_logit, sampled_logit, rank)
        ctx.save_for_backward(hidden, weight, bias, targets, log_sum_exp)
        ctx.group, ctx.chunk_size = group, chunk_size
        return log_sum_exp - original_logit, sampled_ids, original_logit, sampled_logit, rank, negatives

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_sum_exp = ctx.saved_tensors
        shard = _Shard(hidden, weight, bias, ctx.group, ctx.chunk_size)
        return *shard.gradients(targets, log_sum_exp, grad_loss), None, None, None, None, None


class _Remaining:
    """What is left of the vocabulary for each of n positions: the target is out from the beginning, then what is drawn.

    The chunk that a token is taken from is added up again without it. To subtract its weight would not do: it may be so
    much greater than all that is left that its rounding outweighs that. Where what is left weighs little against what
    the weights are measured by, the grid would distort it: such rows are measured anew, from the greatest logit left.
    """

    def __init__(self, shard: _Shard, targets: Tensor, reference: Tensor, sums: Tensor, totals: Tensor) -> None:
        self._shard = shard
        self._reference, self._sums, self._totals = reference.clone(), sums.clone(), totals.clone()
        self._excluded = targets[:, None]
        owner, number = shard.chunk_of(targets)

        def add_up(first: int, here: Tensor) -> Tensor:
            _, weights = shard.weights(first, here, reference[here], self._excluded[here])
            return weights.sum(-1, dtype=torch.float64)[None]

        (left,) = shard.by_chunk(number, add_up, 1)
        self._update(owner, shard.sum(self._left_here(number, left)))

    def draw(self, uniforms: Tensor) -> Tensor:
        """Draw a token for each of the numbers [n, k] and take it out; gives their ids [n, k]."""
        for column in uniforms.unbind(1):
            self._measure_anew()
            self._draw_one(column)
        return self._excluded[:, 1:].contiguous()

    def _draw_one(self, uniforms: Tensor) -> None:
        owner, number, rest = self._shard.locate(uniforms, self._sums, self._totals)

        def search(first: int, here: Tensor) -> Tensor:
            _, weights = self._shard.weights(first, here, self._reference[here], self._excluded[here])
            column = _first_beyond(weights, rest[here])
            weights.scatter_(1, column[:, None], 0.0)
            return torch.stack([(column + first + self._shard.first).double(), weights.sum(-1, dtype=torch.float64)])

        ids, left = self._shard.by_chunk(number, search, 2)
        ids, total = self._shard.sum(torch.stack([ids, self._left_here(number, left)]))
        self._excluded = torch.cat([self._excluded, ids.long()[:, None]], 1)
        self._update(owner, total)

    def _left_here(self, number: Tensor, left: Tensor) -> Tensor:
        """Put `left` [n] in place of the sums of chunks `number` (-1: none of this rank's); give the rank's totals."""
        is_own, chunk = number >= 0, number.clamp(min=0)[:, None]
        self._sums.scatter_(1, chunk, torch.where(is_own, left, self._sums.gather(1, chunk).squeeze(1))[:, None])
        return torch.where(is_own, self._sums.sum(-1), 0.0)

    def _update(self, owner: Tensor, total: Tensor) -> None:
        self._totals.scatter_(1, owner[:, None], total[:, None])

    def _measure_anew(self) -> None:
        too_light = self._totals.sum(-1) < 2.0 ** (_GRID_BITS - _LEAST_BITS)
        rows = too_light.nonzero().squeeze(1)  # alike on all ranks
        if len(rows):
            found = self._shard.measure_from_greatest(rows, self._excluded[rows])
            self._reference[rows], self._sums[rows], self._totals[rows] = found


class _Chunk(NamedTuple):
    """Some rows of a shard: their matrix, their bias in fp32, and buffers for [n, rows] logits."""

    first: int
    weight: Tensor
    bias: Tensor
    product: Tensor
    logits: Tensor
    flags: Tensor


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
        # Triton's kernels keep what they work on in registers
        size = 0 if use_triton(hidden) else len(self._product)
        self._logits = self._product if is_single else hidden.new_empty(size, dtype=torch.float32)
        self._flags = hidden.new_empty(size, dtype=torch.float32)

    def chunks(self) -> Iterator[_Chunk]:
        for first in range(0, self.num_rows, self.chunk_size):
            rows = slice(first, min(first + self.chunk_size, self.num_rows))
            shape = (self.hidden.shape[0], rows.stop - first)
            buffers = (_view(buffer, shape) for buffer in (self._product, self._logits, self._flags))
            chunk = _Chunk(first, self.weight[rows], self.bias[rows], *buffers)
            torch.mm(self.hidden, chunk.weight.t(), out=chunk.product)
            yield chunk

    def target_logits(self, targets: Tensor) -> Tensor:
        """Each position's target's logit [n], by a product of the same kind as all others."""
        rows, is_own = self._localise(targets)
        if on_gpu(self.hidden.device):  # nothing whose size depends on values, which the host would have to wait for
            values = self._paired_product(rows) + self.bias[rows]
            return self.sum(torch.where(is_own, values, 0.0))
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
        return self.sum(torch.where(is_own, values, 0.0))

    def _paired_product(self, rows: Tensor) -> Tensor:
        """Of each position with its own row, as the diagonals of small products: fp32 [n]."""
        count = len(rows)
        padding = -count % _BLOCK
        hidden = torch.nn.functional.pad(self.hidden, (0, 0, 0, padding)).view(-1, _BLOCK, self.hidden.shape[1])
        weight = torch.nn.functional.pad(self.weight[rows], (0, 0, 0, padding)).view_as(hidden)
        return (hidden @ weight.mT).diagonal(dim1=1, dim2=2).flatten()[:count].float()

    def add_up(self, reference: Tensor, original_logit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pass once: weights by chunk [n, chunks], targets' ranks [n], weights by tensor-parallel rank [n, ranks]."""
        offset = reference - _GRID_BITS / LOG2_E
        threshold = (original_logit - offset) * LOG2_E
        threshold = torch.nextafter(threshold + (1 + original_logit.abs()) * 2**-20, threshold.new_tensor(math.inf))
        sums = [reference.new_zeros(len(reference), dtype=torch.float64)]  # so that an empty shard has one, too
        greater = torch.zeros_like(reference)
        for chunk in self.chunks():
            total, count = add_up_chunk(chunk.product, chunk.bias, offset, threshold, chunk.logits, chunk.flags)
            sums.append(total)
            greater += count
        by_chunk = torch.stack(sums, 1)[:, 1:]
        gathered = self._gather(torch.stack([by_chunk.sum(-1), greater.double()]))
        return by_chunk, 1 + gathered[:, 1].sum(0).long(), gathered[:, 0].t()

    def greatest(self, at_least: Tensor) -> Tensor:
        """Give the greatest logit of each position [n]."""
        greatest = at_least.clone()
        for chunk in self.chunks():
            greatest = torch.maximum(greatest, (chunk.product.float() + chunk.bias).amax(-1))
        return self._reduce(greatest, dist.ReduceOp.MAX)

    def sample(self, uniforms: Tensor, reference: Tensor, sums: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Draw inverse-CDF samples and give their logits, [n] each; only the chunk that is hit is computed again."""
        _, number, rest = self.locate(uniforms, sums, totals)

        def search(first: int, here: Tensor) -> Tensor:
            logits, weights = self.weights(first, here, reference[here])
            column = _first_beyond(weights, rest[here])
            row = torch.arange(len(here), device=here.device)
            return torch.stack([(column + first + self.first).double(), logits[row, column].double()])

        picked = self.sum(self.by_chunk(number, search, 2))
        return picked[0].long(), picked[1].float()

    def locate(self, uniforms: Tensor, sums: Tensor, totals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Say where uniform numbers fall, [n] each: in which rank, in which of this rank's chunks, and how far into it.

        The chunk is -1 where it is another rank's.
        """
        ends = totals.cumsum(-1)
        threshold = (uniforms.double() * ends[:, -1]).floor()
        owner = (ends <= threshold[:, None]).sum(-1)
        threshold -= ends[:, self.rank] - totals[:, self.rank]
        own_ends = sums.cumsum(-1)
        number = (own_ends <= _below(threshold, own_ends[:, -1])[:, None]).sum(-1)
        begin = (own_ends - sums).gather(1, number[:, None]).squeeze(1)
        return owner, torch.where(owner == self.rank, number, -1), threshold - begin

    def by_chunk(self, number: Tensor, compute: Callable[[int, Tensor], Tensor], num_results: int) -> Tensor:
        """Compute something of each position's own chunk: fp64 [num_results, n], zeros where it is another rank's.

        `compute` gets a chunk's first row and some positions [k], and gives [num_results, k].
        """
        found = torch.zeros((num_results, len(number)), dtype=torch.float64, device=number.device)
        for index, first in enumerate(range(0, self.num_rows, self.chunk_size)):
            if on_gpu(self.hidden.device):
                # all positions, and those that are not here are left out: the host need not wait
                everywhere = torch.arange(len(number), device=number.device)
                found = torch.where(number == index, compute(first, everywhere), found)
                continue
            here = (number == index).nonzero().squeeze(1)
            if len(here):
                found[:, here] = compute(first, here)
        return found

    def weights(
        self, first: int, positions: Tensor, reference: Tensor, excluded: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the chunk that begins at `first` again: logits and weights [k, rows], none for tokens `excluded`."""
        rows = slice(first, first + self.chunk_size)
        # as many rows as a small product kernel would not be chosen for
        padded = torch.cat([positions, positions.new_zeros(max(0, 16 - len(positions)))])
        product = (self.hidden[padded] @ self.weight[rows].t())[: len(positions)]
        logits = product.float() + self.bias[rows]
        if excluded is not None:
            self._exclude(logits, first, excluded)
        offset = reference - _GRID_BITS / LOG2_E
        return logits, (logits - offset[:, None]).mul_(LOG2_E).exp2_().round_()

    def _exclude(self, logits: Tensor, first: int, excluded: Tensor) -> None:
        """Take tokens [k, e] out of a chunk's logits [k, rows]."""
        columns, is_own = self._localise(excluded)
        columns = columns - first
        inside = is_own & (columns >= 0) & (columns < logits.shape[1])
        # those of other chunks would write where one of this chunk may be written: they add nothing instead
        minus = torch.where(inside, -math.inf, 0.0)
        logits.scatter_add_(1, torch.where(inside, columns, 0), minus)

    def measure_from_greatest(self, positions: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Measure weights from the greatest logit that is not excluded: reference [k], by chunk and by rank."""
        hidden = self.hidden[positions]
        others = torch.full((len(positions),), -math.inf, device=hidden.device)
        for logits in self._logits_without(hidden, excluded):
            others = torch.maximum(others, logits.amax(-1))
        reference = self._reduce(others, dist.ReduceOp.MAX)
        offset = reference - _GRID_BITS / LOG2_E
        sums = [
            logits.sub_(offset[:, None]).mul_(LOG2_E).exp2_().round_().sum(-1, dtype=torch.float64)
            for logits in self._logits_without(hidden, excluded)
        ]
        by_chunk = torch.stack(sums, 1)
        return reference, by_chunk, self._gather(by_chunk.sum(-1)).t()

    def _logits_without(self, hidden: Tensor, excluded: Tensor) -> Iterator[Tensor]:
        for first in range(0, self.num_rows, self.chunk_size):
            rows = slice(first, first + self.chunk_size)
            logits = (hidden @ self.weight[rows].t()).float() + self.bias[rows]
            self._exclude(logits, first, excluded)
            yield logits

    def chunk_of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Say of tokens [n] which rank has them, and in which of its chunks; -1 where it is not this rank."""
        rows, is_own = self._localise(ids)
        return ids // self.num_rows, torch.where(is_own, rows // self.chunk_size, -1)

    def gradients(self, targets: Tensor, log_sum_exp: Tensor, grad_loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden, weight and bias, chunk by chunk."""
        grad_hidden = torch.zeros_like(self.hidden, dtype=torch.float32)
        grad_weight, grad_bias = torch.empty_like(self.weight), torch.empty_like(self.bias)
        rows, is_own = self._localise(targets)
        low_buffer = torch.empty_like(self._product)
        for chunk in self.chunks():
            low = _view(low_buffer, chunk.product.shape)
            stop = chunk.first + low.shape[1]
            column = torch.where(is_own & (rows >= chunk.first) & (rows < stop), rows - chunk.first, -1)
            grad_bias[chunk.first : stop] = chunk_gradient(
                chunk.product, chunk.bias, log_sum_exp, column, grad_loss, chunk.logits, low
            )
            grad_hidden += low @ chunk.weight
            torch.mm(low.t(), self.hidden, out=grad_weight[chunk.first : stop])
        return self.sum(grad_hidden).to(self.hidden.dtype), grad_weight, grad_bias

    def needs_greater_reference(self, totals: Tensor) -> bool:
        """Say whether some token outweighs a target by more than fp32 can say; alike on all ranks.

        The GPU's kernel adds up fp64 powers, which do not overflow here.
        """
        if on_gpu(self.hidden.device):
            return False
        return bool((~(totals.sum(-1) < 2.0 ** (_MAX_BITS + _GRID_BITS))).any())

    def _localise(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Row of each id in this shard (0 where it is elsewhere), and whether it is here."""
        is_own = (ids >= self.first) & (ids < self.first + self.num_rows)
        return torch.where(is_own, ids - self.first, 0), is_own

    def sum(self, tensor: Tensor) -> Tensor:
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


def _first_beyond(weights: Tensor, threshold: Tensor) -> Tensor:
    """Find the columns [k] at which the sums of `weights` [k, rows] from the left exceed `threshold`, [k]."""
    blocks = torch.nn.functional.pad(weights, (0, -weights.shape[1] % _BLOCK)).view(len(weights), -1, _BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    # recomputed weights may differ in a last bit: stay within what has any weight
    threshold = _below(threshold, ends[:, -1])
    block = (ends <= threshold[:, None]).sum(-1)
    row = torch.arange(len(weights), device=weights.device)
    chosen = blocks[row, block].double()
    within = chosen.cumsum(-1) + (ends[row, block] - chosen.sum(-1))[:, None]
    column = block * _BLOCK + (within <= threshold[:, None]).sum(-1)
    return column.clamp(max=weights.shape[1] - 1)


def _below(numbers: Tensor, limit: Tensor) -> Tensor:
    """Give the numbers, or the greatest that is less than `limit`."""
    return torch.minimum(numbers, torch.nextafter(limit, limit.new_tensor(-math.inf)))


def _view(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Give the beginning of `buffer` in that shape; all of it where it is too small to be meant for use."""
    return buffer[: math.prod(shape)].view(shape) if len(buffer) >= math.prod(shape) else buffer
