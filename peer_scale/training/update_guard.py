"""Updates that do not happen: decided on the device, by the gradients' norm, so that the host waits for nothing."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


class UpdateGuard:
    """Keeps weights, moments and Adam's count of updates as they are where a step's gradients are not finite.

    All ranks decide alike, since they share the norm. DeepSpeed knows it before its optimizers of all ZeRO stages call
    torch's AdamW, whose fused kernel does nothing where its `found_inf` is 1: it was made for loss scaling. With fp16
    that is DeepSpeed's own work, and there is no guard.

    After gradients that were not finite no later update happens either, unless the guard lets the run go on: the host
    finds out one step late, and must find the state in which the bad step began.
    """

    def __init__(self, engine: Any, *, goes_on: bool) -> None:
        """Guard the updates of an engine; with `goes_on` each by itself."""
        self._outer, self._inner, self._goes_on = engine.optimizer, engine.optimizer.optimizer, goes_on
        self._is_held = False
        self._largest_norm: float | None = None
        self._was_bad: Tensor | None = None
        step = self._inner.step

        @functools.wraps(step)
        def step_if_good(*args: Any, **kwargs: Any) -> Any:
            self._inner.found_inf = self._found()
            return step(*args, **kwargs)

        self._inner.step = step_if_good

    def prepare(self, *, hold: bool, largest_norm: float | None = None) -> None:
        """Say before a step whether its update shall not happen, and above which gradient norm it shall not."""
        self._is_held, self._largest_norm = hold, largest_norm

    def release(self) -> None:
        """Forget what was bad, once the state from before it is in place."""
        self._is_held, self._was_bad = False, None

    def _found(self) -> Tensor | None:
        """Give 1 where the update is not to happen, else 0, on the device."""
        norm = self._outer._global_grad_norm
        if norm is None:  # the ds_config has it not computed
            return None
        bad = ~torch.isfinite(norm) | (norm < 0)  # -1 is DeepSpeed's word for it
        if not self._goes_on:
            self._was_bad = bad = bad if self._was_bad is None else bad | self._was_bad
        if self._largest_norm is not None:
            bad = bad | (norm > self._largest_norm)
        if self._is_held:
            bad = torch.ones_like(bad)
        return bad.to(torch.float32).reshape(())
