"""One rank's slice of the vocabulary, of which no more than a chunk of logits is there at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from peer_scale.kernels.availability import on_gpu, use_triton
from peer_scale.kernels.vocab_chunk import BLOCK, chunk_gradient

CPU_CHUNK_SIZE, GPU_CHUNK_SIZE = 2048, 8192
"""Rows of the vocabulary handled at a time: on the CPU a chunk of a few hundred positions stays in the cache, on GPUs
its product and the kernels over it fill the chip."""


class Chunk(NamedTuple):
    """Some rows of a shard: their matrix, their bias in fp32, and buffers for [n, rows] logits."""

    first: int
    weight: Tensor
    bias: Tensor
    product: Tensor
    logits: Tensor
    flags: Tensor


class Shard:
    """One rank's slice of the vocabulary over n positions."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor, group: dist.ProcessGroup | None, chunk_size: int | None
    ) -> None:
        self.hidden, self.weight, self.bias, self.group = hidden, weight, bias.float(), group
        self.num_ranks = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self.num_rows = weight.shape[0]
        self.first = self.rank * self.num_rows
        self.on_gpu = on_gpu(hidden.device)
        if chunk_size is None:
            chunk_size = GPU_CHUNK_SIZE if self.on_gpu else CPU_CHUNK_SIZE
        if self.on_gpu:
            chunk_size += -chunk_size % BLOCK
        self.chunk_size = max(1, min(chunk_size, self.num_rows))
        self._product = hidden.new_empty(hidden.shape[0] * self.chunk_size)
        is_single = hidden.dtype == torch.float32
        # Triton's kernels keep what they work on in registers
        size = 0 if use_triton(hidden) else len(self._product)
        self._logits = self._product if is_single else hidden.new_empty(size, dtype=torch.float32)
        self._flags = hidden.new_empty(0 if self.on_gpu else size, dtype=torch.float32)

    @property
    def chunk_numbers(self) -> int:
        """How many numbers a chunk of logits has."""
        return len(self._product)

    def chunks(self) -> Iterator[Chunk]:
        """Go through the shard, with each chunk's product with the positions."""
        for first in range(0, self.num_rows, self.chunk_size):
            rows = slice(first, min(first + self.chunk_size, self.num_rows))
            shape = (self.hidden.shape[0], rows.stop - first)
            buffers = (_view(buffer, shape) for buffer in (self._product, self._logits, self._flags))
            chunk = Chunk(first, self.weight[rows], self.bias[rows], *buffers)
            torch.mm(self.hidden, chunk.weight.t(), out=chunk.product)
            yield chunk

    def locate(self, threshold: Tensor, sums: Tensor, totals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Say where sums of weights reach beyond a threshold: in which rank and part of its shard, and how far into it.

        Args:
            threshold: fp64 [n], of the sum over the whole vocabulary.
            sums: fp64 [n, parts], of this rank's chunks or blocks.
            totals: fp64 [n, ranks].

        Returns:
            Three [n]: the rank, the part (-1 where it is another rank's), and the threshold within the part.
        """
        ends = totals.cumsum(-1)
        owner = (ends <= threshold[:, None]).sum(-1)
        threshold = threshold - (ends[:, self.rank] - totals[:, self.rank])
        own_ends = sums.cumsum(-1)
        number = (own_ends <= below(threshold, own_ends[:, -1])[:, None]).sum(-1)
        begin = (own_ends - sums).gather(1, number[:, None]).squeeze(1)
        return owner, torch.where(owner == self.rank, number, -1), threshold - begin

    def gradients(self, targets: Tensor, log_sum_exp: Tensor, grad_loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden, weight and bias, chunk by chunk."""
        grad_hidden = torch.zeros_like(self.hidden, dtype=torch.float32)
        grad_weight, grad_bias = torch.empty_like(self.weight), torch.empty_like(self.bias)
        rows, is_own = self.localise(targets)
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

    def localise(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Row of each id in this shard (0 where it is elsewhere), and whether it is here."""
        is_own = (ids >= self.first) & (ids < self.first + self.num_rows)
        return torch.where(is_own, ids - self.first, 0), is_own

    def part_of(self, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Say which rank has each of tokens [n], and in which `size` rows of its shard; -1 where it is another's."""
        rows, is_own = self.localise(ids)
        return ids // self.num_rows, torch.where(is_own, rows // size, -1)

    def exclude(self, logits: Tensor, first: Tensor | int, excluded: Tensor) -> None:
        """Take tokens [k, e] out of logits [k, rows] of this shard's rows from `first` (or [k, 1]) on."""
        columns, is_own = self.localise(excluded)
        columns = columns - first
        inside = is_own & (columns >= 0) & (columns < logits.shape[1])
        # those of other rows would write where one of these may be written: they add nothing instead
        minus = torch.where(inside, -math.inf, 0.0)
        logits.scatter_add_(1, torch.where(inside, columns, 0), minus)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up over the ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def maximum(self, tensor: Tensor) -> Tensor:
        """Take the greatest of the ranks' numbers, in place."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, op: Any) -> Tensor:
        if self.num_ranks > 1:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, stacked along a new first dimension."""
        if self.num_ranks == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.num_ranks)]
        dist.all_gather(parts, tensor, group=self.group)
        return torch.stack(parts)


def below(numbers: Tensor, limit: Tensor) -> Tensor:
    """Give the numbers, or the greatest that is less than `limit`."""
    return torch.minimum(numbers, torch.nextafter(limit, torch.full_like(limit, -math.inf)))


def put_sums(sums: Tensor, number: Tensor, left: Tensor) -> Tensor:
    """Put `left` [n] in place of parts `number` [n] (-1: none) of sums [n, parts].

    Gives the sums over all parts [n], 0 where there was none.
    """
    is_own, part = number >= 0, number.clamp(min=0)[:, None]
    sums.scatter_(1, part, torch.where(is_own, left, sums.gather(1, part).squeeze(1))[:, None])
    return torch.where(is_own, sums.sum(-1), 0.0)


def _view(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Give the beginning of `buffer` in that shape; all of it where it is too small to be meant for use."""
    return buffer[: math.prod(shape)].view(shape) if len(buffer) >= math.prod(shape) else buffer
