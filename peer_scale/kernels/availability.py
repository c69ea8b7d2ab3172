"""Which fused kernels run here, and why others do not; and whether a computation takes its way for GPUs."""

import contextlib
import importlib.util
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None

# None: the tensors' device decides; else everything takes the way for GPUs, and this says whether with Triton's kernels
_TRITON_EVERYWHERE: ContextVar[bool | None] = ContextVar("triton_everywhere", default=None)


@contextlib.contextmanager
def gpu_branches(*, triton: bool) -> Iterator[None]:
    """Take the ways for GPUs on any device within, with our Triton kernels or without: for tests on the CPU.

    On the CPU's tensors Triton's kernels run in its interpreter only (TRITON_INTERPRET=1 before its import). Backward
    has to run within, too, and on this thread. What torch.compile has traced does not see this.
    """
    token = _TRITON_EVERYWHERE.set(triton)
    try:
        yield
    finally:
        _TRITON_EVERYWHERE.reset(token)


def on_gpu(device: torch.device) -> bool:
    """Say whether what is computed on this device takes the way for GPUs: few launches, and no waiting for values."""
    return device.type == "cuda" or _triton_everywhere() is not None


def use_triton(tensor: Tensor) -> bool:
    """Say whether our Triton kernels run on this tensor; their twins in plain torch have the same interface.

    Not where torch.compile traces: what it makes of plain torch is as fused, and together with what is around it.
    """
    if torch.compiler.is_compiling():
        return False
    everywhere = _triton_everywhere()
    return tensor.is_cuda and _HAS_TRITON if everywhere is None else everywhere


def _triton_everywhere() -> bool | None:
    # a context variable would break torch.compile's graph
    return None if torch.compiler.is_compiling() else _TRITON_EVERYWHERE.get()


def fused_kernels(device: torch.device) -> dict[str, str]:
    """Say what runs on `device` beside attention, by name, for a summary."""
    if device.type != "cuda":
        ours = "for the CPU; Triton's are for GPUs"
        return {
            "bias+dropout+residual+norm": ours,
            "bias+gelu": "torch's gelu",
            "generator head": "streaming, for the CPU",
            "adam": "torch's fused AdamW",
        }
    ours = "Triton" if _HAS_TRITON else "plain torch: triton is not installed"
    return {
        "bias+dropout+residual+norm": ours,
        "bias+gelu": ours,
        "generator head": f"streaming; {ours}",
        "adam": "torch's fused AdamW",
    }
