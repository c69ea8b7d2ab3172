"""Which fused kernels run here, and why others do not."""

import importlib.metadata
import importlib.util

import torch
from torch import Tensor


def use_triton(tensor: Tensor) -> bool:
    """Say whether our Triton kernels run on this tensor; their CPU twins have the same interface."""
    return tensor.is_cuda and importlib.util.find_spec("triton") is not None


def fused_kernels(device: torch.device) -> dict[str, str]:
    """Say what runs on `device` beside attention, by name, for a summary."""
    if device.type != "cuda":
        ours = f"for the CPU; Triton's are for GPUs; {apex_state()}"
        return {
            "bias+dropout+residual+norm": ours,
            "bias+gelu": "torch's gelu",
            "generator head": "streaming, for the CPU",
            "adam": "torch's fused AdamW",
        }
    has_triton = importlib.util.find_spec("triton") is not None
    ours = "Triton" if has_triton else "plain torch: triton is not installed"
    return {
        "bias+dropout+residual+norm": f"{ours}; {apex_state()}",
        "bias+gelu": ours,
        "generator head": f"streaming; {ours}",
        "adam": "torch's fused AdamW",
    }


def apex_state() -> str:
    """Say whether NVIDIA Apex is there; PyPI's `apex` is another program of that name."""
    try:
        from apex.normalization import FusedLayerNorm  # noqa: F401
    except ImportError:
        try:
            version = importlib.metadata.version("apex")
        except importlib.metadata.PackageNotFoundError:
            return "NVIDIA Apex is not installed"
        return f"the installed apex {version} is not NVIDIA Apex"
    return "NVIDIA Apex is installed; its LayerNorm alone would take more passes than ours"
