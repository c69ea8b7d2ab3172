"""The generator's output layer over vocabulary shards: loss, sample, and what the rank labels need of the logits.

Each rank holds a slice of the vocabulary; what travels between ranks is a few numbers a position, never logits.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Softmax weights are rounded to multiples of 2**-30 before they are added: such sums are exact in fp64, so the token
# that a uniform number picks does not depend on how the vocabulary is split or in which order it is added up.
_MASS_SCALE = 2.0**30


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
        chunk_size: positions handled at a time, which bounds the logits in memory; None takes all at once.

    Returns:
        `loss` (fp32) is differentiable in hidden, weight and bias; the rest carries no gradient. `original_rank` is
        1 + the number of tokens with a strictly greater logit (Section 3.2.1).
    """
    if chunk_size is None or hidden.shape[0] <= chunk_size:
        return GeneratorOutput(*_GeneratorHead.apply(hidden, weight, bias, targets, uniforms, group))
    chunks = zip(*(tensor.split(chunk_size) for tensor in (hidden, targets, uniforms)), strict=True)
    outputs = [_GeneratorHead.apply(h, weight, bias, t, u, group) for h, t, u in chunks]
    return GeneratorOutput(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))


class _GeneratorHead(torch.autograd.Function):
    """Vocabulary sharded over `group`, positions replicated. Forward: 5 reductions of [n]; backward: 1 of [n, h]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        uniforms: Tensor,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, ...]:
        shards = _Shards(group, weight.shape[0], hidden.device)
        logits = (hidden @ weight.t()).float() + bias.float()
        own_targets, is_own = shards.localise(targets)
        original_logit = shards.sum(torch.where(is_own, _pick(logits, own_targets), 0.0))
        rank = 1 + shards.sum((logits > original_logit[:, None]).sum(-1))

        maximum = shards.max(logits.amax(-1) if logits.shape[1] else logits.new_full(targets.shape, -torch.inf))
        exp = torch.exp(logits - maximum[:, None])
        log_sum_exp = maximum + shards.sum(exp.sum(-1)).log()
        sampled_ids, sampled_logit = _sample(exp, logits, uniforms, shards)

        ctx.save_for_backward(hidden, weight, logits.to(hidden.dtype), bias, log_sum_exp, own_targets, is_own)
        ctx.shards = shards
        ctx.mark_non_differentiable(sampled_ids, original_logit, sampled_logit, rank)
        return log_sum_exp - original_logit, sampled_ids, original_logit, sampled_logit, rank

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, logits, bias, log_sum_exp, own_targets, is_own = ctx.saved_tensors
        grad = torch.exp(logits.float() - log_sum_exp[:, None])
        if grad.shape[0]:
            grad.scatter_add_(1, own_targets[:, None], -is_own[:, None].float())
        grad *= grad_loss[:, None]
        low = grad.to(hidden.dtype)
        grad_hidden = ctx.shards.sum(low @ weight)
        return grad_hidden, low.t() @ hidden, grad.sum(0).to(bias.dtype), None, None, None


class _Shards:
    """One rank's slice of the vocabulary and the reductions over all slices."""

    def __init__(self, group: dist.ProcessGroup | None, rows: int, device: torch.device) -> None:
        self.group = group
        self.count = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self.rows = rows
        self.first = self.rank * rows
        self.device = device

    def localise(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Row of each id in this slice (0 where it is elsewhere), and whether it is here."""
        is_own = (ids >= self.first) & (ids < self.first + self.rows)
        return torch.where(is_own, ids - self.first, 0), is_own

    def sum(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def gather(self, tensor: Tensor) -> Tensor:
        """[n] of every rank side by side: [n, ranks]."""
        if self.count == 1:
            return tensor[:, None]
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(parts, tensor, group=self.group)
        return torch.stack(parts, dim=1)

    def _reduce(self, tensor: Tensor, op: Any) -> Tensor:
        if self.count > 1:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor


def _pick(table: Tensor, columns: Tensor) -> Tensor:
    return table.gather(1, columns[:, None]).squeeze(1)


def _sample(exp: Tensor, logits: Tensor, uniforms: Tensor, shards: _Shards) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sample and its logit, [n] each, from unnormalised weights [n, V/tp] in [0, 1]."""
    mass = (exp * _MASS_SCALE).round_()
    totals = shards.gather(mass.sum(-1, dtype=torch.float64))
    ends = totals.cumsum(-1)
    threshold = (uniforms.double() * ends[:, -1]).floor()
    owner = (ends <= threshold[:, None]).sum(-1)
    before = ends[:, shards.rank] - totals[:, shards.rank]
    is_own = owner == shards.rank
    cumulative = mass.cumsum(-1, dtype=torch.float64)
    column = torch.searchsorted(cumulative, (threshold - before)[:, None], right=True).squeeze(1)
    column = torch.where(is_own, column.clamp(max=max(shards.rows - 1, 0)), 0)
    ids = shards.sum(torch.where(is_own, column + shards.first, 0))
    return ids, shards.sum(torch.where(is_own, _pick(logits, column), 0.0))
