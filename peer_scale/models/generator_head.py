"""The generator's output layer over vocabulary shards: loss, sample, and what the rank labels need of the logits.

Each rank holds a slice of the vocabulary and goes through it chunk by chunk: no rank ever holds more than one chunk of
logits, and what travels between ranks is a few numbers per position.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from peer_scale.models.vocab_shard import Shard
from peer_scale.models.weights_by_block import BlockWeights
from peer_scale.models.weights_by_chunk import ChunkWeights

REDUCED_BYTES, GATHERED_BYTES = 20, 16
"""What a tensor-parallel rank reduces and gathers per position, forward; backward reduces the gradient of hidden."""

EXCLUSION_REDUCED_BYTES, DRAW_REDUCED_BYTES = 8, 16
"""What it reduces besides to exclude the target from the negatives, and for each negative."""


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
            takes 2048 on the CPU and 8192 on GPUs, where it is a multiple of 64.
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
    *fields, negatives = _GeneratorHead.apply(
        hidden, weight, bias, targets, uniforms, negative_uniforms, group, chunk_size
    )
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
        chunk_size: int | None,
    ) -> tuple[Tensor | None, ...]:
        shard = Shard(hidden, weight, bias, group, chunk_size)
        weights = (BlockWeights if shard.on_gpu else ChunkWeights)(shard, targets)
        sampled_ids, sampled_logit = weights.sample(uniforms)
        fields = sampled_ids, weights.original_logit, sampled_logit, weights.original_rank
        negatives = None if negative_uniforms is None else weights.negatives(negative_uniforms)
        ctx.mark_non_differentiable(*fields, *([] if negatives is None else [negatives]))
        ctx.save_for_backward(hidden, weight, bias, targets, weights.log_sum_exp)
        ctx.group, ctx.chunk_size = group, chunk_size
        return weights.log_sum_exp - weights.original_logit, *fields, negatives

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_sum_exp = ctx.saved_tensors
        shard = Shard(hidden, weight, bias, ctx.group, ctx.chunk_size)
        return *shard.gradients(targets, log_sum_exp, grad_loss), None, None, None, None, None
