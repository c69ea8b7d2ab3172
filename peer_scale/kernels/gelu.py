"""GELU (erf) of x + bias, the middle of a feed-forward block."""

import torch.nn.functional as F
from torch import Tensor

from peer_scale.kernels.availability import use_triton


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """From x [..., H] and bias [H] to [..., H], computed in fp32 inside."""
    if use_triton(x):
        from peer_scale.kernels.triton_gelu import FusedGelu

        return FusedGelu.apply(x, bias)
    return F.gelu(x + bias.to(x.dtype))
