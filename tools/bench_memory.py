"""How much memory a call needs beyond what is there before it, on a GPU or by the kernel's count on Linux."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def working_memory(action: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the peak of `action` less those before it; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    try:
        _give_back_freed_memory()
        (_PROCESS / "clear_refs").write_text("5")  # the peak begins anew
        before = _resident("VmRSS")
    except (OSError, AttributeError):  # not Linux with glibc
        return None
    action()
    return _resident("VmHWM") - before


def _give_back_freed_memory() -> None:
    ctypes.CDLL(None).malloc_trim(0)


def _resident(key: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
