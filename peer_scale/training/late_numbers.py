"""Numbers that a step leaves on the device, for the host to read when later steps are under way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LateNumbers:
    """A tensor's numbers on their way to the host.

    To read a GPU's tensor is to wait for all that was launched before, the next step included. Here the copy, into
    page-locked memory, is launched at once, and the reader waits for that copy alone.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers
        self._copied: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def tolist(self) -> Any:
        """Give the numbers, once they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers.tolist()

    def __float__(self) -> float:
        return float(self.tolist())
