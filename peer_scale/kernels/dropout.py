"""Dropout masks without a fused kernel."""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from peer_scale.kernels.availability import on_gpu

_LEVELS = 2**16


_CPU = torch.device("cpu")


def keep_mask(shape: Sequence[int], dropout: float, dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
    """1 with probability 1 - dropout (to 2^-17), else 0, by torch's default generator.

    16 random bits an element, four of them in each number drawn, take a twelfth of the time of `bernoulli_`; and a
    product with a mask of the same type takes an eighth of that with a bool mask. On the CPU torch's generator gives
    the seed of a faster one.
    """
    count = prod(shape)
    drawn = -(-count // 4)
    if not on_gpu(device):
        raw = np.random.SFC64(int(torch.randint(2**62, ()))).random_raw(drawn)
        numbers = torch.from_numpy(raw.view(np.int64))
    else:
        numbers = torch.empty(drawn, dtype=torch.int64, device=device).random_(-(2**63), None)
    threshold = round(dropout * _LEVELS) - _LEVELS // 2
    bits = numbers.view(torch.int16)[:count]
    return torch.ge(bits, threshold, out=torch.empty(count, dtype=dtype, device=device)).view(*shape)
