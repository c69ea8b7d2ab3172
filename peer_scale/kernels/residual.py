"""residual + dropout(x + bias), the end of each half of a pre-norm layer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from peer_scale.kernels.availability import use_triton
from peer_scale.kernels.dropout import keep_mask


def bias_dropout_residual(x: Tensor, bias: Tensor | None, residual: Tensor, *, dropout: float) -> Tensor:
    """Add, drop, add: x and residual [..., H], bias [H] or None -> [..., H].

    The dropout mask comes from torch's default generator of x's device.
    """
    if dropout and use_triton(x):
        from peer_scale.kernels.triton_residual import FusedResidual

        return FusedResidual.apply(x, bias, residual, dropout)
    if bias is not None:
        x = x + bias.to(x.dtype)
    if torch.compiler.is_compiling():
        return residual + F.dropout(x, dropout)
    if not dropout:
        return residual + x
    kept = keep_mask(x.shape, dropout, x.dtype, x.device)
    return torch.add(residual, x * kept, alpha=1 / (1 - dropout))
