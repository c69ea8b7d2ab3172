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

from peer_scale.kernels.vocab_chunk import LOG2_E, add_up_chunk, chunk_gradient

_GRID_BITS = 34
CHUNK_SIZE = 2048
"""Rows of the vocabulary handled at a time: a chunk of a few hundred positions stays in the cache."""

REDUCED_BYTES, GATHERED_BYTES, DRAW_REDUCED_BYTES = 20, 16, 16
"""What a tensor-parallel rank reduces and gathers per position, forward, and reduces for each negative; backward
reduces the gradient of hidden."""

_BLOCK = 64  # a chunk's sums are kept by blocks where a token is searched for
_LEAST_BITS = 12  # what is left must weigh at least 2**-12 of what weights are measured by
# weights beyond this many bits over the target's are measured from the greatest logit instead
_MAX_BITS = 80.0


class GeneratorOutput(NamedTuple):
    """What `generator_head` gives for n positions: [n] and, of `negatives`, [n, k]; equal on all ranks of the group."""

    loss: Tensor
    sampled_ids: Tensor
    original_logit: Tensor
    sampled_logit: Tensor
    original_rank: Tensor
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

    Products are in the format of `hidden`, everything else in fp32 and fp64. A rank sends 36 bytes a position forward
    (each reduction counted once) and [n, h] backward.
    """
    size = CHUNK_SIZE if chunk_size is None else chunk_size
    drawn = uniforms.new_empty(len(uniforms), 0) if negative_uniforms is None else negative_uniforms
    output = GeneratorOutput(*_GeneratorHead.apply(hidden, weight, bias, targets, uniforms, drawn, group, size))
    return output._replace(negatives=None) if negative_uniforms is None else output


class _GeneratorHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        uniforms: Tensor,
        negative_uniforms: Tensor,
        group: dist.ProcessGroup | None,
        chunk_size: int,
    ) -> tuple[Tensor, ...]:
        shard = _Shard(hidden, weight, bias, group, chunk_size)
        original_logit = shard.target_logits(targets)
        reference = original_logit
        sums, rank, totals = shard.add_up(reference, original_logit)
        if shard.needs_greater_reference(totals):
            reference = shard.greatest(original_logit)
            sums, rank, totals = shard.add_up(reference, original_logit)
        log_sum_exp = reference + (totals.sum(-1).log2() - _GRID_BITS).div(LOG2_E).float()
        sampled_ids, sampled_logit = shard.sample(uniforms, reference, sums, totals)
        remaining = _Remaining(shard, targets, original_logit, reference, sums, totals)
        negatives = (
            torch.stack([remaining.draw(one) for one in negative_uniforms.unbind(1)], 1)
            if (negative_uniforms.shape[1])
            else targets.new_empty(negative_uniforms.shape)
        )
        ctx.save_for_backward(hidden, weight, bias, targets, log_sum_exp)
        ctx.group, ctx.chunk_size = group, chunk_size
        ctx.mark_non_differentiable(sampled_ids, original_logit, sampled_logit, rank, negatives)
        return log_sum_exp - original_logit, sampled_ids, original_logit, sampled_logit, rank, negatives

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_sum_exp = ctx.saved_tensors
        shard = _Shard(hidden, weight, bias, ctx.group, ctx.chunk_size)
        return *shard.gradients(targets, log_sum_exp, grad_loss), None, None, None, None, None


class _Remaining:
    """What is left of the vocabulary for each of n positions: the target is out from the beginning, then what is drawn.

    A drawn token's weight is taken from its chunk's and its rank's sums, which is exact as far as these are. Where what
    is left weighs little against what the weights are measured by, the grid would distort it: such rows are counted
    again, measured from the greatest logit that is left.
    """

    def __init__(
        self,
        shard: _Shard,
        targets: Tensor,
        original_logit: Tensor,
        reference: Tensor,
        sums: Tensor,
        totals: Tensor,
    ) -> None:
        self._shard = shard
        self._reference, self._sums, self._totals = reference.clone(), sums.clone(), totals.clone()
        self._excluded = targets[:, None]
        self._take_out(targets, original_logit)

    def draw(self, uniforms: Tensor) -> Tensor:
        """Draw a token for each position, [n], and take it out."""
        self._count_again()
        ids, logit = self._shard.sample(uniforms, self._reference, self._sums, self._totals, self._excluded)
        self._excluded = torch.cat([self._excluded, ids[:, None]], 1)
        self._take_out(ids, logit)
        return ids

    def _take_out(self, ids: Tensor, logit: Tensor) -> None:
        offset = self._reference - _GRID_BITS / LOG2_E
        weight = ((logit - offset) * LOG2_E).exp2().round().double()
        rank, is_own, chunk = self._shard.chunk_of(ids)
        own_weight = torch.where(is_own, weight, 0.0)[:, None]
        self._sums.scatter_add_(1, chunk[:, None], -own_weight).clamp_(min=0)
        self._totals.scatter_add_(1, rank[:, None], -weight[:, None]).clamp_(min=0)

    def _count_again(self) -> None:
        too_light = self._totals.sum(-1) < 2.0 ** (_GRID_BITS - _LEAST_BITS)
        if too_light.is_cuda:  # all positions, so that the host need not wait for how many
            everywhere = torch.arange(len(too_light), device=too_light.device)
            reference, sums, totals = self._shard.recount(everywhere, self._excluded)
            self._reference = torch.where(too_light, reference, self._reference)
            self._sums = torch.where(too_light[:, None], sums, self._sums)
            self._totals = torch.where(too_light[:, None], totals, self._totals)
            return
        rows = too_light.nonzero().squeeze(1)  # alike on all ranks
        if len(rows):
            recounted = self._shard.recount(rows, self._excluded[rows])
            self._reference[rows], self._sums[rows], self._totals[rows] = recounted


class _Chunk(NamedTuple):
    """Some rows of a shard: their matrix, their bias in fp32, and room for [n, rows] logits."""

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
        # the GPU's kernels keep what they work on in registers
        size = 0 if hidden.is_cuda else len(self._product)
        self._logits = self._product if is_single else hidden.new_empty(size, dtype=torch.float32)
        self._flags = hidden.new_empty(size, dtype=torch.float32)

    def chunks(self) -> Iterator[_Chunk]:
        for first in range(0, self.num_rows, self.chunk_size):
            rows = slice(first, min(first + self.chunk_size, self.num_rows))
            shape = (self.hidden.shape[0], rows.stop - first)
            rooms = (_view(room, shape) for room in (self._product, self._logits, self._flags))
            chunk = _Chunk(first, self.weight[rows], self.bias[rows], *rooms)
            torch.mm(self.hidden, chunk.weight.t(), out=chunk.product)
            yield chunk

    def target_logits(self, targets: Tensor) -> Tensor:
        """Each position's target's logit [n], by a product of the same kind as all others."""
        rows, is_own = self._localise(targets)
        if self.hidden.is_cuda:  # nothing whose size depends on values, which the host would have to wait for
            values = self._paired_product(rows) + self.bias[rows]
            return self._sum(torch.where(is_own, values, 0.0))
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

    def _paired_product(self, rows: Tensor) -> Tensor:
        """Of each position with its own row, as the diagonals of small products: fp32 [n]."""
        count = len(rows)
        padding = -count % _BLOCK
        hidden = torch.nn.functional.pad(self.hidden, (0, 0, 0, padding)).view(-1, _BLOCK, self.hidden.shape[1])
        weight = torch.nn.functional.pad(self.weight[rows], (0, 0, 0, padding)).view_as(hidden)
        return (hidden @ weight.mT).diagonal(dim1=1, dim2=2).flatten()[:count].float()

    def add_up(self, reference: Tensor, original_logit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One pass: weights by chunk [n, chunks], targets' ranks [n], weights by tensor-parallel rank [n, ranks]."""
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
        """The greatest logit of each position [n]."""
        greatest = at_least.clone()
        for chunk in self.chunks():
            greatest = torch.maximum(greatest, (chunk.product.float() + chunk.bias).amax(-1))
        return self._reduce(greatest, dist.ReduceOp.MAX)

    def sample(
        self, uniforms: Tensor, reference: Tensor, sums: Tensor, totals: Tensor, excluded: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw inverse-CDF samples and give their logits, [n] each; only the chunk that is hit is computed again.

        `excluded` [n, e] are token ids that `sums` and `totals` do not count.
        """
        ends = totals.cumsum(-1)
        threshold = (uniforms.double() * ends[:, -1]).floor()
        owner = (ends <= threshold[:, None]).sum(-1)
        threshold -= ends[:, self.rank] - totals[:, self.rank]
        own_ends = sums.cumsum(-1)
        number = (own_ends <= threshold[:, None]).sum(-1)
        number = torch.where(owner == self.rank, number, -1)
        picked = torch.zeros((2, len(uniforms)), dtype=torch.float64, device=uniforms.device)
        for index, first in enumerate(range(0, self.num_rows, self.chunk_size)):
            rest = threshold - (own_ends[:, index] - sums[:, index])
            if self.hidden.is_cuda:  # all positions, and those that are not here are left out: the host need not wait
                everywhere = torch.arange(len(number), device=number.device)
                found = self._search(first, everywhere, reference, rest.clamp(min=0), excluded)
                picked = torch.where(number == index, found, picked)
                continue
            here = (number == index).nonzero().squeeze(1)
            if len(here):
                picked[:, here] = self._search(
                    first, here, reference[here], rest[here], None if excluded is None else excluded[here]
                )
        picked = self._sum(picked)
        return picked[0].long(), picked[1].float()

    def _search(
        self, first: int, positions: Tensor, reference: Tensor, threshold: Tensor, excluded: Tensor | None
    ) -> Tensor:
        """Find token ids and logits [2, k] where the weights of the chunk that begins at `first` exceed `threshold`."""
        rows = slice(first, first + self.chunk_size)
        # as many rows as a small product kernel would not be chosen for
        padded = torch.cat([positions, positions.new_zeros(max(0, 16 - len(positions)))])
        product = (self.hidden[padded] @ self.weight[rows].t())[: len(positions)]
        logits = product.float() + self.bias[rows]
        if excluded is not None:
            self._exclude(logits, first, excluded)
        offset = reference - _GRID_BITS / LOG2_E
        weights = (logits - offset[:, None]).mul_(LOG2_E).exp2_().round_()
        blocks = torch.nn.functional.pad(weights, (0, -weights.shape[1] % _BLOCK)).view(len(positions), -1, _BLOCK)
        ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
        # recomputed weights may differ in a last bit: stay within what has any weight
        threshold = torch.minimum(threshold, ends[:, -1] - 1)
        block = (ends <= threshold[:, None]).sum(-1)
        row = torch.arange(len(positions), device=positions.device)
        chosen = blocks[row, block].double()
        within = chosen.cumsum(-1) + (ends[row, block] - chosen.sum(-1))[:, None]
        column = block * _BLOCK + (within <= threshold[:, None]).sum(-1)
        column = column.clamp(max=logits.shape[1] - 1)
        if excluded is not None:  # nothing that weighs anything is left: only rounding has led here
            column = torch.where(ends[:, -1] > 0, column, logits.argmax(1))
        return torch.stack([(column + first + self.first).double(), logits[row, column].double()])

    def _exclude(self, logits: Tensor, first: int, excluded: Tensor) -> None:
        """Take tokens [k, e] out of a chunk's logits [k, rows]."""
        columns, is_own = self._localise(excluded)
        columns = columns - first
        inside = is_own & (columns >= 0) & (columns < logits.shape[1])
        # those of other chunks would write where one of this chunk may be written: they add nothing instead
        minus = torch.where(inside, -math.inf, 0.0)
        logits.scatter_add_(1, torch.where(inside, columns, 0), minus)

    def recount(self, positions: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Measure weights from the greatest logit that is not excluded: reference [k], by chunk and by rank."""
        hidden = self.hidden[positions]
        others = torch.full((len(positions),), -math.inf, device=hidden.device)
        for _, logits in self._logits_without(hidden, excluded):
            others = torch.maximum(others, logits.amax(-1))
        reference = self._reduce(others, dist.ReduceOp.MAX)
        offset = reference - _GRID_BITS / LOG2_E
        by_chunk = torch.stack(
            [
                logits.sub_(offset[:, None]).mul_(LOG2_E).exp2_().round_().sum(-1, dtype=torch.float64)
                for _, logits in self._logits_without(hidden, excluded)
            ],
            1,
        )
        return reference, by_chunk, self._gather(by_chunk.sum(-1)).t()

    def _logits_without(self, hidden: Tensor, excluded: Tensor) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, self.num_rows, self.chunk_size):
            rows = slice(first, min(first + self.chunk_size, self.num_rows))
            logits = (hidden @ self.weight[rows].t()).float() + self.bias[rows]
            self._exclude(logits, first, excluded)
            yield first, logits

    def chunk_of(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Say of tokens [n] which rank has them, whether it is this one, and in which chunk."""
        rows, is_own = self._localise(ids)
        return ids // self.num_rows, is_own, rows // self.chunk_size

    def gradients(self, targets: Tensor, log_sum_exp: Tensor, grad_loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden, weight and bias, chunk by chunk."""
        grad_hidden = torch.zeros_like(self.hidden, dtype=torch.float32)
        grad_weight, grad_bias = torch.empty_like(self.weight), torch.empty_like(self.bias)
        rows, is_own = self._localise(targets)
        low_room = torch.empty_like(self._product)
        for chunk in self.chunks():
            low = _view(low_room, chunk.product.shape)
            stop = chunk.first + low.shape[1]
            column = torch.where(is_own & (rows >= chunk.first) & (rows < stop), rows - chunk.first, -1)
            grad_bias[chunk.first : stop] = chunk_gradient(
                chunk.product, chunk.bias, log_sum_exp, column, grad_loss, chunk.logits, low
            )
            grad_hidden += low @ chunk.weight
            torch.mm(low.t(), self.hidden, out=grad_weight[chunk.first : stop])
        return self._sum(grad_hidden).to(self.hidden.dtype), grad_weight, grad_bias

    def needs_greater_reference(self, totals: Tensor) -> bool:
        """Whether some token outweighs a target by more than fp32 can say; alike on all ranks.

        The GPU's kernel adds up fp64 powers, which do not overflow here.
        """
        if self.hidden.is_cuda:
            return False
        return bool((~(totals.sum(-1) < 2.0 ** (_MAX_BITS + _GRID_BITS))).any())

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


def _view(room: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The beginning of `room` in that shape; all of it where it is too small to be meant for use."""
    return room[: math.prod(shape)].view(shape) if len(room) >= math.prod(shape) else room
