"""Attention on the CPU: batched products over groups of sequences of like length, so that little of them is padding.

torch's own `scaled_dot_product_attention` takes three times as long there, forward and backward, at the lengths
encoders have (measured at [128, 32] tokens, 4 heads of 64, bf16 and fp32).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peer_scale.kernels.dropout import keep_mask
from peer_scale.sequences import Sequences


class Run(NamedTuple):
    """Sequences of one length that follow each other: the tokens [begin, end) of a group's sequences [first, last)."""

    first: int
    last: int
    begin: int
    end: int
    length: int


class Group(NamedTuple):
    """`size` sequences that are computed as if all had `length` tokens, the most that one of them has."""

    size: int
    length: int
    runs: tuple[Run, ...]

    @property
    def shorter_runs(self) -> Iterator[Run]:
        """Those with padding."""
        return (run for run in self.runs if run.length < self.length)


@lru_cache(maxsize=64)
def groups_of_like_length(lengths: tuple[int, ...]) -> tuple[Group, ...]:
    """Cut a micro-batch's sequences, in their order, where the next one is a sixth shorter or at all longer.

    Collation puts the longest first.
    """
    groups: list[Group] = []
    members: list[tuple[int, int]] = []  # length and first token

    def close() -> None:
        if members:
            groups.append(_group(members))
            members.clear()

    begin = 0
    for length in lengths:
        if members and not 0 <= members[0][0] - length <= max(8, members[0][0] // 6):
            close()
        if length:
            members.append((length, begin))
        begin += length
    close()
    return tuple(groups)


def _group(members: list[tuple[int, int]]) -> Group:
    runs: list[Run] = []
    for number, (length, begin) in enumerate(members):
        if runs and runs[-1].length == length:
            runs[-1] = runs[-1]._replace(last=number + 1, end=begin + length)
        else:
            runs.append(Run(number, number + 1, begin, begin + length, length))
    return Group(len(members), members[0][0], tuple(runs))


def window_mask(length: int, window: int, device: torch.device | None = None) -> Tensor:
    """Say which pairs of places are more than half a window apart: bool [L, L]."""
    places = torch.arange(length, device=device)
    return (places[:, None] - places).abs() > window // 2


class GroupedAttention(torch.autograd.Function):
    """Products in the input's format, softmax in fp32 inside; probabilities and the dropout mask are kept.

    Heads are copied together first, where the bias is added too: batched products of strided matrices take four times
    as long.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        bias: Tensor | None,
        sequences: Sequences,
        head_size: int,
        dropout: float,
        score_bias: Tensor | None,
        window: int | None,
    ) -> Tensor:
        num_rows, width = qkv.shape
        heads = width // (3 * head_size)
        by_token = qkv.view(num_rows, heads, 3, head_size)
        added = None if bias is None else bias.to(qkv.dtype).view(heads, 3, head_size)
        context = qkv.new_empty(num_rows, heads, head_size)
        context[sequences.num_tokens :].zero_()
        saved: list[Tensor | None] = []
        groups = groups_of_like_length(sequences.lengths)
        for group in groups:
            operands = _heads_together(by_token, added, group)
            query, key, value = operands.flatten(1, 2)
            query.mul_(head_size**-0.5)  # the scale goes where the matrix is small
            scores = torch.bmm(query, key.transpose(1, 2))
            _adjust_scores(scores.view(group.size, heads, group.length, group.length), group, score_bias, window)
            probabilities = torch.softmax(scores, -1)
            kept = keep_mask(probabilities.shape, dropout, qkv.dtype) if dropout else None
            dropped = probabilities if kept is None else torch.mul(probabilities, kept, out=scores)
            result = torch.bmm(dropped, value).view(group.size, heads, group.length, head_size)
            for run in group.runs:
                _scale_into(_of_run(context, run), _in_group(result, run).transpose(1, 2), 1 / (1 - dropout))
            saved += [operands, probabilities, kept]
        ctx.save_for_backward(*saved)
        ctx.groups, ctx.dropout, ctx.num_tokens = groups, dropout, sequences.num_tokens
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.score_bias = None if score_bias is None else (score_bias.shape, score_bias.dtype)
        return context.view(num_rows, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        num_rows, grad = len(grad), grad.contiguous()
        saved = iter(ctx.saved_tensors)
        scale = 1 / (1 - ctx.dropout)
        grad_qkv = grad_score_bias = None
        if ctx.score_bias is not None:
            grad_score_bias = torch.zeros(ctx.score_bias[0], dtype=torch.float32)
        for group, operands, probabilities, kept in zip(ctx.groups, saved, saved, saved, strict=True):
            heads, head_size = operands.shape[2], operands.shape[4]
            if grad_qkv is None:
                grad_qkv = grad.new_empty(num_rows, heads, 3, head_size)
                grad_qkv[ctx.num_tokens :].zero_()
            by_token = grad.view(num_rows, heads, head_size)
            grad_context = grad.new_empty(group.size, heads, group.length, head_size)
            for run in group.runs:
                _scale_into(_in_group(grad_context, run).transpose(1, 2), _of_run(by_token, run), scale)
            _clear_padding(grad_context, group)
            grad_context = grad_context.flatten(0, 1)
            query, key, value = operands.flatten(1, 2)
            grads = torch.empty_like(operands)
            grad_query, grad_key, grad_value = grads.flatten(1, 2)
            dropped = probabilities if kept is None else probabilities * kept
            torch.bmm(dropped.transpose(1, 2), grad_context, out=grad_value)
            grad_scores = torch.bmm(grad_context, value.transpose(1, 2))
            if kept is not None:
                grad_scores.mul_(kept)
            grad_scores = torch._softmax_backward_data(grad_scores, probabilities, -1, grad.dtype)
            if grad_score_bias is not None:
                of_group = grad_scores.view(group.size, heads, group.length, group.length)
                grad_score_bias[:, : group.length, : group.length] += of_group.sum(0, dtype=torch.float32)
            torch.bmm(grad_scores, key, out=grad_query).mul_(head_size**-0.5)
            torch.bmm(grad_scores.transpose(1, 2), query, out=grad_key)
            for run in group.runs:
                of_run = grads[:, run.first : run.last, :, : run.length]
                _of_run(grad_qkv, run).copy_(of_run.permute(1, 3, 2, 0, 4))
        assert grad_qkv is not None, "there is a token"
        grad_qkv = grad_qkv.view(num_rows, -1)
        grad_bias = None if ctx.bias_dtype is None else grad_qkv.sum(0).to(ctx.bias_dtype)
        if grad_score_bias is not None:
            grad_score_bias = grad_score_bias.to(ctx.score_bias[1])
        return grad_qkv, grad_bias, None, None, None, grad_score_bias, None


def _heads_together(by_token: Tensor, added: Tensor | None, group: Group) -> Tensor:
    """Copy a group's query, key and value, of tokens [T, N, 3, D], plus what is to be added: [3, size, N, L, D]."""
    _, heads, _, head_size = by_token.shape
    operands = by_token.new_empty(3, group.size, heads, group.length, head_size)
    for run in group.runs:
        source = _of_run(by_token, run).permute(3, 0, 2, 1, 4)
        target = operands[:, run.first : run.last, :, : run.length]
        if added is None:
            target.copy_(source)
        else:
            torch.add(source, added.permute(1, 0, 2)[:, None, :, None], out=target)
    for run in group.shorter_runs:
        operands[:, run.first : run.last, :, run.length :].zero_()
    return operands


def _adjust_scores(scores: Tensor, group: Group, score_bias: Tensor | None, window: int | None) -> None:
    """Add the bias to scores [size, N, L, L], and forbid what is padding or too far away."""
    if score_bias is not None:
        scores.add_(score_bias[:, : group.length, : group.length])
    if window is not None and window // 2 < group.length - 1:
        scores.masked_fill_(window_mask(group.length, window), -torch.inf)
        for run in group.shorter_runs:  # a padded query's window may hold no token at all, and must see something
            scores[run.first : run.last, :, run.length :] = 0.0
    for run in group.shorter_runs:
        scores[run.first : run.last, :, :, run.length :] = -torch.inf


def _clear_padding(by_head: Tensor, group: Group) -> None:
    for run in group.shorter_runs:
        by_head[run.first : run.last, :, run.length :].zero_()


def _of_run(by_token: Tensor, run: Run) -> Tensor:
    """Take a run's tokens of [T, ...]: [sequences, length, ...]."""
    return by_token[run.begin : run.end].view(run.last - run.first, run.length, *by_token.shape[1:])


def _in_group(by_head: Tensor, run: Run) -> Tensor:
    """Take a run's sequences of [size, N, L, D] without their padding."""
    return by_head[run.first : run.last, :, : run.length]


def _scale_into(target: Tensor, source: Tensor, scale: float) -> None:
    if scale == 1.0:
        target.copy_(source)
    else:
        torch.mul(source, scale, out=target)
