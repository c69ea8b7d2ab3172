"""The CPU's way over a vocabulary: sums of weights by chunk, and positions in groups by the chunk they fall in.

The weight of a token is exp(its logit - the target's), so that no maximum is needed first and the loss is the logarithm
of the sum of weights. Weights are rounded to multiples of 2**-34 before they are added in fp64: up to a loss of 13 nats
such sums are exact, so the token that a uniform number picks depends on the logits alone, not on how the vocabulary is
cut into shards and chunks or in which order it is added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from peer_scale.kernels.vocab_chunk import BLOCK, LOG2_E, add_up_chunk
from peer_scale.models.vocab_shard import Shard, below, put_sums

_GRID_BITS = 34
_LEAST_BITS = 12  # what is left must weigh at least 2**-12 of what weights are measured by
# weights beyond this many bits over the target's are measured from the greatest logit instead
_MAX_BITS = 80.0


class ChunkWeights:
    """The weights of a vocabulary's tokens at n positions.

    Attributes:
        original_logit: fp32 [n], the targets'.
        original_rank: int64 [n], 1 + the number of tokens with a greater logit.
        log_sum_exp: fp32 [n].
    """

    def __init__(self, shard: Shard, targets: Tensor) -> None:
        self._shard, self._targets = shard, targets
        self.original_logit = reference = self._target_logits()
        sums, self.original_rank, totals = self._add_up(reference)
        if _has_overflow(totals):
            reference = self._greatest()
            sums, self.original_rank, totals = self._add_up(reference)
        self.log_sum_exp = reference + (totals.sum(-1).log2() - _GRID_BITS).div(LOG2_E).float()
        self._reference, self._sums, self._totals = reference, sums, totals

    def sample(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Draw inverse-CDF samples and give their logits, [n] each; only the chunk that is hit is computed again."""
        _, number, rest = self._locate(uniforms)

        def search(first: int, here: Tensor) -> Tensor:
            logits, weights = self._weights(first, here, self._reference[here])
            column = _first_beyond(weights, rest[here])
            row = torch.arange(len(here))
            return torch.stack([(column + first + self._shard.first).double(), logits[row, column].double()])

        picked = self._shard.sum(self._by_chunk(number, search, 2))
        return picked[0].long(), picked[1].float()

    def negatives(self, uniforms: Tensor) -> Tensor:
        """Draw a token for each of the numbers [n, k], one after the other, and take it out: ids [n, k].

        The target is out from the beginning. The chunk that a token is taken from is added up again without it. To
        subtract its weight would not do: it may be so much greater than all that is left that its rounding outweighs
        that. Where what is left weighs little against what the weights are measured by, the grid would distort it: such
        rows are measured anew, from the greatest logit left.
        """
        self._reference, self._sums = self._reference.clone(), self._sums.clone()
        self._totals = self._totals.clone()
        excluded = self._targets[:, None]
        owner, number = self._shard.part_of(self._targets, self._shard.chunk_size)

        def add_up(first: int, here: Tensor) -> Tensor:
            _, weights = self._weights(first, here, self._reference[here], excluded[here])
            return weights.sum(-1, dtype=torch.float64)[None]

        (left,) = self._by_chunk(number, add_up, 1)
        self._update(owner, self._shard.sum(put_sums(self._sums, number, left)))
        for column in uniforms.unbind(1):
            self._measure_anew(excluded)
            excluded = torch.cat([excluded, self._draw(column, excluded)[:, None]], 1)
        return excluded[:, 1:].contiguous()

    def _target_logits(self) -> Tensor:
        """Each position's target's logit [n], by a product of the same kind as all others."""
        shard = self._shard
        rows, is_own = shard.localise(self._targets)
        needed, column = torch.unique(rows, return_inverse=True)
        product = shard.hidden.new_empty(0)
        found = []
        # few columns at a time: memory as for a chunk; and never so few that another kernel computes them
        for first in range(0, len(needed), shard.chunk_size):
            some = needed[first : first + shard.chunk_size]
            padded = torch.cat([some, some.new_zeros(-len(some) % BLOCK)])
            product = shard.hidden @ shard.weight[padded].t()
            inside = (column >= first) & (column < first + len(some))
            own_column = torch.where(inside, column - first, 0)
            found.append(torch.where(inside, product.gather(1, own_column[:, None]).squeeze(1).float(), 0.0))
        values = sum(found, torch.zeros(len(rows))) + shard.bias[rows]
        return shard.sum(torch.where(is_own, values, 0.0))

    def _add_up(self, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pass once: weights by chunk [n, chunks], targets' ranks [n], weights by tensor-parallel rank [n, ranks]."""
        offset = reference - _GRID_BITS / LOG2_E
        threshold = (self.original_logit - offset) * LOG2_E
        threshold = threshold + (1 + self.original_logit.abs()) * 2**-20
        threshold = torch.nextafter(threshold, threshold.new_tensor(math.inf))
        sums = [reference.new_zeros(len(reference), dtype=torch.float64)]  # so that an empty shard has one, too
        greater = torch.zeros_like(reference)
        for chunk in self._shard.chunks():
            total, count = add_up_chunk(chunk.product, chunk.bias, offset, threshold, chunk.logits, chunk.flags)
            sums.append(total)
            greater += count
        by_chunk = torch.stack(sums, 1)[:, 1:]
        gathered = self._shard.gather(torch.stack([by_chunk.sum(-1), greater.double()]))
        return by_chunk, 1 + gathered[:, 1].sum(0).long(), gathered[:, 0].t()

    def _greatest(self) -> Tensor:
        """Give the greatest logit of each position [n]."""
        greatest = self.original_logit.clone()
        for chunk in self._shard.chunks():
            greatest = torch.maximum(greatest, (chunk.product.float() + chunk.bias).amax(-1))
        return self._shard.maximum(greatest)

    def _locate(self, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        threshold = (uniforms.double() * self._totals.cumsum(-1)[:, -1]).floor()
        return self._shard.locate(threshold, self._sums, self._totals)

    def _by_chunk(self, number: Tensor, compute: Callable[[int, Tensor], Tensor], num_results: int) -> Tensor:
        """Compute something of each position's own chunk: fp64 [num_results, n], zeros where it is another rank's.

        `compute` gets a chunk's first row and some positions [k], and gives [num_results, k].
        """
        found = torch.zeros((num_results, len(number)), dtype=torch.float64)
        for index, first in enumerate(range(0, self._shard.num_rows, self._shard.chunk_size)):
            here = (number == index).nonzero().squeeze(1)
            if len(here):
                found[:, here] = compute(first, here)
        return found

    def _weights(
        self, first: int, positions: Tensor, reference: Tensor, excluded: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the chunk that begins at `first` again: logits and weights [k, rows], none for tokens `excluded`."""
        shard = self._shard
        rows = slice(first, first + shard.chunk_size)
        # as many rows as a small product kernel would not be chosen for
        padded = torch.cat([positions, positions.new_zeros(max(0, 16 - len(positions)))])
        product = (shard.hidden[padded] @ shard.weight[rows].t())[: len(positions)]
        logits = product.float() + shard.bias[rows]
        if excluded is not None:
            shard.exclude(logits, first, excluded)
        offset = reference - _GRID_BITS / LOG2_E
        return logits, (logits - offset[:, None]).mul_(LOG2_E).exp2_().round_()

    def _draw(self, uniforms: Tensor, excluded: Tensor) -> Tensor:
        """Draw a token that is not among `excluded` [n, e], and take it out of the sums: its id [n]."""
        owner, number, rest = self._locate(uniforms)

        def search(first: int, here: Tensor) -> Tensor:
            _, weights = self._weights(first, here, self._reference[here], excluded[here])
            column = _first_beyond(weights, rest[here])
            weights.scatter_(1, column[:, None], 0.0)
            return torch.stack([(column + first + self._shard.first).double(), weights.sum(-1, dtype=torch.float64)])

        ids, left = self._by_chunk(number, search, 2)
        ids, total = self._shard.sum(torch.stack([ids, put_sums(self._sums, number, left)]))
        self._update(owner, total)
        return ids.long()

    def _update(self, owner: Tensor, total: Tensor) -> None:
        self._totals.scatter_(1, owner[:, None], total[:, None])

    def _measure_anew(self, excluded: Tensor) -> None:
        too_light = self._totals.sum(-1) < 2.0 ** (_GRID_BITS - _LEAST_BITS)
        rows = too_light.nonzero().squeeze(1)  # alike on all ranks
        if len(rows):
            found = self._measure_from_greatest(rows, excluded[rows])
            self._reference[rows], self._sums[rows], self._totals[rows] = found

    def _measure_from_greatest(self, positions: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Measure weights from the greatest logit that is not excluded: reference [k], by chunk and by rank."""
        hidden = self._shard.hidden[positions]
        others = torch.full((len(positions),), -math.inf)
        for logits in self._logits_without(hidden, excluded):
            others = torch.maximum(others, logits.amax(-1))
        reference = self._shard.maximum(others)
        offset = reference - _GRID_BITS / LOG2_E
        sums = [
            logits.sub_(offset[:, None]).mul_(LOG2_E).exp2_().round_().sum(-1, dtype=torch.float64)
            for logits in self._logits_without(hidden, excluded)
        ]
        by_chunk = torch.stack(sums, 1)
        return reference, by_chunk, self._shard.gather(by_chunk.sum(-1)).t()

    def _logits_without(self, hidden: Tensor, excluded: Tensor) -> Iterator[Tensor]:
        shard = self._shard
        for first in range(0, shard.num_rows, shard.chunk_size):
            rows = slice(first, first + shard.chunk_size)
            logits = (hidden @ shard.weight[rows].t()).float() + shard.bias[rows]
            shard.exclude(logits, first, excluded)
            yield logits


def _has_overflow(totals: Tensor) -> bool:
    """Say whether some token outweighs a target by more than fp32 can say; alike on all ranks."""
    return bool((~(totals.sum(-1) < 2.0 ** (_MAX_BITS + _GRID_BITS))).any())


def _first_beyond(weights: Tensor, threshold: Tensor) -> Tensor:
    """Find the columns [k] at which the sums of `weights` [k, rows] from the left exceed `threshold`, [k]."""
    blocks = torch.nn.functional.pad(weights, (0, -weights.shape[1] % BLOCK)).view(len(weights), -1, BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    # recomputed weights may differ in a last bit: stay within what has any weight
    threshold = below(threshold, ends[:, -1])
    block = (ends <= threshold[:, None]).sum(-1)
    row = torch.arange(len(weights))
    chosen = blocks[row, block].double()
    within = chosen.cumsum(-1) + (ends[row, block] - chosen.sum(-1))[:, None]
    column = block * BLOCK + (within <= threshold[:, None]).sum(-1)
    return column.clamp(max=weights.shape[1] - 1)
