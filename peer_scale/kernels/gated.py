"""The middle of a gated feed-forward block (Shazeer 2020): one half of what goes in is activated, times the other."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peer_scale.kernels.availability import use_triton


def gated_activation(x: Tensor, bias: Tensor | None, activation: Literal["geglu", "swiglu"]) -> Tensor:
    """From gate and value [..., 2F], with a bias [2F] or None, to activation(gate) * value [..., F]."""
    if use_triton(x):
        from peer_scale.kernels.triton_gated import FusedGate

        return FusedGate.apply(x, bias, activation == "geglu")
    if bias is not None:
        x = x + bias.to(x.dtype)
    if torch.compiler.is_compiling():
        gate, value = x.chunk(2, -1)
        return (F.gelu(gate) if activation == "geglu" else F.silu(gate)) * value
    return _Gated.apply(x, activation == "geglu")


class _Gated(torch.autograd.Function):
    """Keeps the product that goes in and nothing else: the activation is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, is_gelu: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.is_gelu = is_gelu
        gate, value = x.chunk(2, -1)
        return (F.gelu(gate) if is_gelu else F.silu(gate)).mul_(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        gate, value = x.chunk(2, -1)
        grads = torch.empty_like(x)
        of_gate, of_value = grads.chunk(2, -1)
        activated = F.gelu(gate) if ctx.is_gelu else F.silu(gate)
        torch.mul(grad, activated, out=of_value)
        backward = torch.ops.aten.gelu_backward if ctx.is_gelu else torch.ops.aten.silu_backward
        of_gate.copy_(backward(grad * value, gate))
        return grads, None
