"""The way of GPUs over a vocabulary: sums of weights by blocks of 64 tokens, and no step whose size depends on values.

The weight of a token is exp(its logit - the target's), as on the CPU, but in fp64 and not rounded: within 690 nats of
the target's every sum has all its digits, however little it weighs beside others, so nothing needs to be measured anew.
Where a number falls among the blocks' sums is searched for; then the products with one block's rows are made again for
each position. Such a product's last bit may differ from that in the sums, which shifts the edge of a token's share by
that much, and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peer_scale.kernels.vocab_chunk import BLOCK, LOG2_E, add_up_blocks, powers
from peer_scale.models.vocab_shard import Shard, below, put_sums

_LEAST_SHARE = 2.0**-36
"""A number below this picks as this does: 0 must not pick the first token that is not quite impossible."""


class BlockWeights:
    """The weights of a vocabulary's tokens at n positions.

    Attributes:
        original_logit: fp32 [n], the targets'.
        original_rank: int64 [n], 1 + the number of tokens with a greater logit.
        log_sum_exp: fp32 [n].
    """

    def __init__(self, shard: Shard, targets: Tensor) -> None:
        self._shard, self._targets = shard, targets
        rows, is_own = shard.localise(targets)
        self.original_logit = shard.sum(torch.where(is_own, self._logits_of(rows), 0.0))
        count = len(targets)
        device = targets.device
        self._sums = torch.empty((count, -(-shard.num_rows // BLOCK)), dtype=torch.float64, device=device)
        greater = torch.zeros(count, dtype=torch.int32, device=device)
        limit = (1 + self.original_logit.abs()) * 2**-20  # what differs by a product's rounding is not greater
        for chunk in shard.chunks():
            begin = chunk.first // BLOCK
            sums = self._sums[:, begin : begin - (-chunk.product.shape[1] // BLOCK)]
            add_up_blocks(chunk.product, chunk.bias, self.original_logit, limit, sums, greater)
        gathered = shard.gather(torch.stack([self._sums.sum(-1), greater.double()]))
        self.original_rank = 1 + gathered[:, 1].sum(0).long()
        self._totals = gathered[:, 0].t()
        self.log_sum_exp = self.original_logit + self._totals.sum(-1).log2().div(LOG2_E).float()

    def sample(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Draw inverse-CDF samples and give their logits, [n] each, by the same product as the targets'."""
        _, number, rest = self._locate(uniforms)
        row = self._search(self._weights(number), number, rest)
        picked = torch.stack([(row + self._shard.first).double(), self._logits_of(row).double()])
        picked = self._shard.sum(torch.where(number >= 0, picked, 0.0))
        return picked[0].long(), picked[1].float()

    def negatives(self, uniforms: Tensor) -> Tensor:
        """Draw a token for each of the numbers [n, k], one after the other, and take it out: ids [n, k].

        The target is out from the beginning. The block that a token is taken from is added up again without it.
        """
        self._sums, self._totals = self._sums.clone(), self._totals.clone()
        excluded = self._targets[:, None]
        owner, number = self._shard.part_of(self._targets, BLOCK)
        left = self._weights(number, excluded).sum(-1)
        self._update(owner, self._shard.sum(put_sums(self._sums, number, left)))
        for column in uniforms.unbind(1):
            owner, number, rest = self._locate(column)
            weights = self._weights(number, excluded)
            row = self._search(weights, number, rest)
            left = weights.scatter_(1, row[:, None] % BLOCK, 0.0).sum(-1)
            ids = torch.where(number >= 0, (row + self._shard.first).double(), 0.0)
            ids, total = self._shard.sum(torch.stack([ids, put_sums(self._sums, number, left)]))
            excluded = torch.cat([excluded, ids.long()[:, None]], 1)
            self._update(owner, total)
        return excluded[:, 1:].contiguous()

    def _logits_of(self, rows: Tensor) -> Tensor:
        """Of each position with one row of its own, as the diagonals of small products: fp32 [n]."""
        shard, padding = self._shard, -len(rows) % BLOCK
        hidden = torch.nn.functional.pad(shard.hidden, (0, 0, 0, padding)).view(-1, BLOCK, shard.hidden.shape[1])
        weight = torch.nn.functional.pad(shard.weight[rows], (0, 0, 0, padding)).view_as(hidden)
        product = (hidden @ weight.mT).diagonal(dim1=1, dim2=2).flatten()[: len(rows)]
        return product.float() + shard.bias[rows]

    def _locate(self, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        threshold = uniforms.double().clamp(min=_LEAST_SHARE) * self._totals.cumsum(-1)[:, -1]
        return self._shard.locate(threshold, self._sums, self._totals)

    def _weights(self, number: Tensor, excluded: Tensor | None = None) -> Tensor:
        """Compute the weights in each position's own block again: fp64 [n, 64], none for tokens `excluded` [n, e].

        Where `number` is -1 they are those of some block.
        """
        shard = self._shard
        first = number.clamp(min=0)[:, None] * BLOCK
        rows = first + torch.arange(BLOCK, device=number.device)
        inside = rows < shard.num_rows
        rows = rows.clamp(max=shard.num_rows - 1)
        # positions whose blocks' rows fill as much memory as a chunk
        step = max(1, shard.chunk_numbers // (BLOCK * shard.hidden.shape[1]))
        products = [
            torch.bmm(shard.weight[some], states[:, :, None]).squeeze(2)
            for some, states in zip(rows.split(step), shard.hidden.split(step), strict=True)
        ]
        logits = torch.where(inside, torch.cat(products).float() + shard.bias[rows], -torch.inf)
        if excluded is not None:
            shard.exclude(logits, first, excluded)
        return powers((logits - self.original_logit[:, None]) * LOG2_E)

    def _search(self, weights: Tensor, number: Tensor, rest: Tensor) -> Tensor:
        """Find the rows [n] of the shard at which the sums of blocks' weights [n, 64] from the left exceed `rest`."""
        ends = weights.cumsum(-1)
        # weights made again may differ in a last bit: stay within what has any weight
        column = (ends <= below(rest, ends[:, -1])[:, None]).sum(-1)
        row = number.clamp(min=0) * BLOCK + column
        return row.clamp(max=self._shard.num_rows - 1)

    def _update(self, owner: Tensor, total: Tensor) -> None:
        self._totals.scatter_(1, owner[:, None], total[:, None])
