"""What the streaming generator head does with one chunk of logits: fused on GPUs, few passes on the CPU."""

import math

import torch
from torch import Tensor

from peer_scale.kernels.availability import use_triton

LOG2_E = math.log2(math.e)


def add_up_chunk(
    product: Tensor, bias: Tensor, offset: Tensor, threshold: Tensor, logits: Tensor, flags: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of the weights 2**((product + bias - offset) log2 e), each rounded to a whole number, and a count.

    Args:
        product: [n, rows], in any format.
        bias: fp32 [rows].
        offset: fp32 [n].
        threshold: fp32 [n]; counted is where (product + bias - offset) log2 e is greater.
        logits: Buffer for fp32 [n, rows]; may be `product` itself.
        flags: The same, and not `logits`. Triton uses neither.

    Returns:
        The sums (fp64 [n]) and the counts (fp32 [n]).
    """
    if use_triton(product):
        from peer_scale.kernels.triton_vocab import add_up

        return add_up(product, bias, offset, threshold)
    bits = _shifted(product, bias, offset, logits)
    # flags of the operands' type are made and added up several times faster than booleans
    count = torch.gt(bits, threshold[:, None], out=flags).sum(-1)
    return bits.exp2_().round_().sum(-1, dtype=torch.float64), count


def chunk_gradient(
    product: Tensor,
    bias: Tensor,
    log_sum_exp: Tensor,
    columns: Tensor,
    grad_loss: Tensor,
    logits: Tensor,
    out: Tensor,
) -> Tensor:
    """(softmax - one-hot of the target) x grad_loss for a chunk, into `out` [n, rows]; gives its sum over n (fp32).

    `columns` [n] is the target's place in the chunk, -1 where it is in another.
    """
    if use_triton(product):
        from peer_scale.kernels.triton_vocab import gradient

        return gradient(product, bias, log_sum_exp, columns, grad_loss, out)
    grad = _shifted(product, bias, log_sum_exp, logits).exp2_()
    grad.scatter_add_(1, columns.clamp(min=0)[:, None], -(columns >= 0)[:, None].float())
    grad.mul_(grad_loss[:, None])
    out.copy_(grad)
    return grad.sum(0)


def _shifted(product: Tensor, bias: Tensor, minus: Tensor, logits: Tensor) -> Tensor:
    """Of (product + bias - minus) log2 e, in `logits`."""
    if logits.dtype != product.dtype:
        logits.copy_(product)
    return logits.add_(bias).sub_(minus[:, None]).mul_(LOG2_E)
