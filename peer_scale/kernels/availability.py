"""Which fused kernels run here, and why others do not."""

import importlib.util

import torch
from torch import Tensor


def use_triton(tensor: Tensor) -> bool:
    """Say whether our Triton kernels run on this tensor; their CPU twins have the same interface."""
    return tensor.is_cuda and importlib.util.find_spec("triton") is not None


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
    has_triton = importlib.util.find_spec("triton") is not None
    ours = "Triton" if has_triton else "plain torch: triton is not installed"
    return {
        "bias+dropout+residual+norm": ours,
        "bias+gelu": ours,
        "generator head": f"streaming; {ours}",
        "adam": "torch's fused AdamW",
    }
