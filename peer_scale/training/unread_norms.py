"""What in ZeRO's update makes the host wait for the device: replaced here and nowhere else.

To see whether the gradients' norm is finite, DeepSpeed reads it on the host before it updates, and once more for each
group of parameters before it clips. There the host waits until the whole step is computed, and the device idles until
the next one is launched. Where the loss is not scaled, the device itself leaves the update out (`UpdateGuard`), and the
host finds out one step later (`BadSteps`), before anything is saved.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime import bf16_optimizer, utils
from deepspeed.runtime.zero import stage3, stage_1_and_2
from torch import Tensor


def leave_norms_unread(optimizer: Any) -> None:
    """Have `optimizer`, of any ZeRO stage, clip and update without asking the host about the norm.

    The numbers are the same where the norm is finite.
    """
    step = optimizer.step

    @functools.wraps(step)
    def step_without_reading(*args: Any, **kwargs: Any) -> Any:
        with _replaced():
            return step(*args, **kwargs)

    optimizer.step = step_without_reading


@contextlib.contextmanager
def _replaced() -> Iterator[None]:
    """Put our functions in the place of DeepSpeed's, as far as its version has them."""
    ours = [
        (stage_1_and_2, "is_invalid_grad_norm", _no),
        (stage3, "is_invalid_grad_norm", _no),
        (bf16_optimizer, "is_invalid_grad_norm", _no),
        (bf16_optimizer, "clip_tensors_by_global_norm", _clip),
        (stage3, "mask_nan_or_inf_with_val_inplace", _mark_invalid),
        (stage_1_and_2, "mask_nan_or_inf_with_val_inplace", _mark_invalid),
        (utils, "mask_nan_or_inf_with_val_inplace", _mark_invalid),
    ]
    theirs = [(module, name, getattr(module, name)) for module, name, _ in ours if hasattr(module, name)]
    try:
        for module, name, function in ours:
            setattr(module, name, function)
        yield
    finally:
        for module, name, function in theirs:
            setattr(module, name, function)


def _no(_: Tensor) -> bool:
    return False


def _mark_invalid(norm: Tensor, device: object = None, val: float = -1.0) -> None:
    """Put `val` in the place of what is not finite; DeepSpeed's function sends that number from the host each time."""
    norm.masked_fill_(~torch.isfinite(norm), val)


def _clip(
    input_tensors: Sequence[Tensor], max_norm: float, global_norm: Tensor, mpu: object = None, eps: float = 1e-6
) -> Tensor:
    """Scale gradients down to `max_norm`; DeepSpeed's function asks first whether the norm is greater."""
    scale = (max_norm / (global_norm + eps)).clamp(max=1.0)
    for tensor in input_tensors:
        tensor.detach().mul_(scale)
    return global_norm
