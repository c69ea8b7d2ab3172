"""ZeRO's update with norms that nobody reads: DeepSpeed's own numbers, also where a norm is not finite."""

import math
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime import bf16_optimizer, utils
from deepspeed.runtime.zero import stage_1_and_2

from peer_scale.training.engine import gradient_norm
from peer_scale.training.unread_norms import leave_norms_unread

NAMES = [
    *((stage_1_and_2, name) for name in ("is_invalid_grad_norm", "mask_nan_or_inf_with_val_inplace")),
    *((bf16_optimizer, name) for name in ("is_invalid_grad_norm", "clip_tensors_by_global_norm")),
    (utils, "mask_nan_or_inf_with_val_inplace"),
]


def within_a_step(function):
    """Run a function where an optimizer's step would be."""
    optimizer = SimpleNamespace(step=function)
    leave_norms_unread(optimizer)
    return optimizer.step()


def test_only_within_a_step():
    plain = [getattr(module, name) for module, name in NAMES]
    within = within_a_step(lambda: [getattr(module, name) for module, name in NAMES])
    assert all(ours is not theirs for ours, theirs in zip(within, plain, strict=True)), "DeepSpeed still has them all"
    with pytest.raises(ZeroDivisionError):
        within_a_step(lambda: 1 / 0)
    assert [getattr(module, name) for module, name in NAMES] == plain


@pytest.mark.parametrize("norm", [0.25, 0.999999, 1.0, 3.7, math.inf, math.nan])
def test_the_same_numbers(norm):
    def clipped():
        grads, total = [torch.linspace(-2, 3, 7), torch.linspace(0.1, 9, 4)], torch.tensor(norm)
        utils.mask_nan_or_inf_with_val_inplace(total)
        if total >= 0:
            bf16_optimizer.clip_tensors_by_global_norm(grads, max_norm=1.0, global_norm=total)
        return [*grads, total]

    assert all(map(torch.equal, within_a_step(clipped), clipped()))


@pytest.mark.parametrize(("norm", "expected"), [(0.5, 0.5), (-1.0, math.inf), (math.inf, math.inf), (0.0, 0.0)])
def test_a_norm_that_is_not_finite_is_said_to_be_infinite(norm, expected):
    engine = SimpleNamespace(get_global_grad_norm=lambda: torch.tensor(norm))
    assert float(gradient_norm(engine)) == expected
    assert gradient_norm(SimpleNamespace(get_global_grad_norm=lambda: None)) is None
    assert gradient_norm(SimpleNamespace(get_global_grad_norm=lambda: math.inf)) == math.inf
