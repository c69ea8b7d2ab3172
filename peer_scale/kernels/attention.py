"""Self-attention on the fused QKV product: torch's fused kernel on GPUs, batched products on the CPU.

On the CPU torch's own `scaled_dot_product_attention` takes three times as long, forward and backward, at the lengths
encoders have (measured at [128, 32] tokens, 4 heads of 64, bf16 and fp32).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peer_scale.kernels.dropout import keep_mask


def self_attention(qkv: Tensor, bias: Tensor, mask: Tensor | None, *, head_size: int, dropout: float = 0.0) -> Tensor:
    """Multi-head attention of every position over those that `mask` allows.

    Args:
        qkv: [S, B, N * 3 * D]: for each of N heads query, key and value of D numbers.
        bias: [N * 3 * D], added to `qkv` first.
        mask: bool [B, S], True where a position may be attended to (at least one a row); None allows all.
        head_size: D.
        dropout: share of the attention probabilities that is dropped; drawn from torch's default generator.

    Returns:
        [S, B, N * D].
    """
    if qkv.device.type == "cpu":
        return _CpuAttention.apply(qkv, bias, mask, head_size, dropout)
    seq_length, batch, _ = qkv.shape
    query, key, value = (qkv + bias).view(seq_length, batch, -1, 3, head_size).permute(3, 1, 2, 0, 4)
    allowed = None if mask is None else mask[:, None, None, :]
    context_BNSD = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout)
    return context_BNSD.permute(2, 0, 1, 3).reshape(seq_length, batch, -1)


class _CpuAttention(torch.autograd.Function):
    """Products in the input's format, softmax in fp32 inside; probabilities and the dropout mask are kept.

    Heads are copied together first: batched products of strided matrices take four times as long.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, mask: Tensor | None, head_size: int, dropout: float) -> Tensor:
        seq_length, batch, width = qkv.shape
        heads = width // (3 * head_size)
        by_head = (qkv + bias.to(qkv.dtype)).view(seq_length, batch, heads, 3, head_size)
        query, key, value = by_head.permute(3, 1, 2, 0, 4).contiguous().flatten(1, 2)
        query.mul_(head_size**-0.5)  # the scale goes where the matrix is small
        scores = torch.bmm(query, key.transpose(1, 2))
        if mask is not None:
            forbidden = torch.zeros(mask.shape, dtype=qkv.dtype).masked_fill_(~mask, -torch.inf)
            scores.view(batch, heads, seq_length, seq_length).add_(forbidden[:, None, None, :])
        probabilities = torch.softmax(scores, -1)
        kept = keep_mask(probabilities.shape, dropout, qkv.dtype) if dropout else None
        dropped = probabilities if kept is None else torch.mul(probabilities, kept, out=scores)
        context = torch.bmm(dropped, value).mul_(1 / (1 - dropout))
        ctx.save_for_backward(query, key, value, probabilities, kept)
        ctx.sizes, ctx.dropout, ctx.bias_dtype = (seq_length, batch, heads, head_size), dropout, bias.dtype
        return context.view(batch, heads, seq_length, head_size).permute(2, 0, 1, 3).reshape(seq_length, batch, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, probabilities, kept = ctx.saved_tensors
        seq_length, batch, heads, head_size = ctx.sizes
        grad_context = grad.view(seq_length, batch, heads, head_size).permute(1, 2, 0, 3).contiguous().flatten(0, 1)
        grad_context.mul_(1 / (1 - ctx.dropout))
        grads = torch.empty((3, *query.shape), dtype=grad.dtype)
        dropped = probabilities if kept is None else probabilities * kept
        torch.bmm(dropped.transpose(1, 2), grad_context, out=grads[2])
        grad_scores = torch.bmm(grad_context, value.transpose(1, 2))
        if kept is not None:
            grad_scores.mul_(kept)
        grad_scores = torch._softmax_backward_data(grad_scores, probabilities, -1, grad.dtype)
        torch.bmm(grad_scores, key, out=grads[0]).mul_(head_size**-0.5)
        torch.bmm(grad_scores.transpose(1, 2), query, out=grads[1])
        by_head = grads.view(3, batch, heads, seq_length, head_size).permute(3, 1, 2, 0, 4)
        grad_qkv = by_head.reshape(seq_length, batch, -1)
        return grad_qkv, grad_qkv.flatten(0, 1).sum(0).to(ctx.bias_dtype), None, None, None
