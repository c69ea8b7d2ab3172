"""LayerNorm(residual + dropout(x + bias)), the end of each half of a Transformer layer, in one piece."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peer_scale.kernels.availability import use_triton
from peer_scale.kernels.dropout import keep_mask


def bias_dropout_residual_norm(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor, *, dropout: float, eps: float
) -> Tensor:
    """Add, drop, add, normalise over the last dimension: x and residual [..., H], the rest [H] -> [..., H].

    Statistics are fp32, the output is in x's format. The dropout mask comes from torch's default generator of x's
    device, so recomputation from its saved state draws the same one. torch.compile gets a plain composition to fuse.
    """
    if torch.compiler.is_compiling():
        summed = residual + F.dropout(x + bias.to(x.dtype), dropout)
        return F.layer_norm(summed, weight.shape, weight, norm_bias, eps)
    if use_triton(x):
        from peer_scale.kernels.triton_norm import FusedNorm

        return FusedNorm.apply(x, bias, residual, weight, norm_bias, dropout, eps)
    return _CpuNorm.apply(x, bias, residual, weight, norm_bias, dropout, eps)


class _CpuNorm(torch.autograd.Function):
    """Fewer and cheaper passes over memory than the composition; keeps the sum that was normalised, and the mask."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor,
        residual: Tensor,
        weight: Tensor,
        norm_bias: Tensor,
        dropout: float,
        eps: float,
    ) -> Tensor:
        summed = x + bias.to(x.dtype)
        kept = keep_mask(x.shape, dropout, x.dtype, x.device) if dropout else None
        scale = 1 / (1 - dropout)
        if kept is None:
            summed += residual
        else:
            summed = torch.add(residual, summed.mul_(kept), alpha=scale, out=summed)
        out, mean, rstd = torch.native_layer_norm(summed, weight.shape, weight, norm_bias, eps)
        ctx.save_for_backward(summed, mean, rstd, weight, norm_bias, kept)
        ctx.scale, ctx.bias_dtype = scale, bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        summed, mean, rstd, weight, norm_bias, kept = ctx.saved_tensors
        grad_sum, grad_weight, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), summed, weight.shape, mean, rstd, weight, norm_bias, [True, True, True]
        )
        grad_x = grad_sum if kept is None else torch.mul(grad_sum, kept).mul_(ctx.scale)
        grad_bias = grad_x.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_bias, grad_sum, grad_weight, grad_norm_bias, None, None
