"""Dropout masks without a fused kernel."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_LEVELS = 2**16


def keep_mask(shape: Sequence[int], dropout: float, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """1 with probability 1 - dropout (to 2^-17), else 0, from torch's default generator.

    16 random bits an element, four of them in each number drawn, take an eighth of the time of `bernoulli_`; and a
    product with a mask of the same type takes an eighth of that with a bool mask.
    """
    count = prod(shape)
    bits = (
        torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(-(2**63), None).view(torch.int16)[:count]
    )
    threshold = round(dropout * _LEVELS) - _LEVELS // 2
    return torch.ge(bits, threshold, out=torch.empty(count, dtype=dtype, device=device)).view(*shape)
