"""What the streaming generator head does with one chunk of logits: fused on GPUs, few passes on the CPU."""

import math

import torch
from torch import Tensor

from peer_scale.kernels.availability import use_triton

LOG2_E = math.log2(math.e)
BLOCK = 64
"""Columns of a chunk whose weights are added up together where a token is searched for among them."""
_MAX_BITS = 1000.0


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
        flags: The same, and not `logits`.

    Returns:
        The sums (fp64 [n]) and the counts (fp32 [n]).
    """
    bits = _shifted(product, bias, offset, logits)
    # flags of the operands' type are made and added up several times faster than booleans
    count = torch.gt(bits, threshold[:, None], out=flags).sum(-1)
    return bits.exp2_().round_().sum(-1, dtype=torch.float64), count


def add_up_blocks(
    product: Tensor, bias: Tensor, reference: Tensor, limit: Tensor, sums: Tensor, counts: Tensor
) -> None:
    """Add up the weights 2**((product + bias - reference) log2 e) by blocks of 64 columns, and count; for GPUs.

    Args:
        product: [n, rows], in any format.
        bias: fp32 [rows].
        reference: fp32 [n].
        limit: fp32 [n]; counted is where (product + bias - reference) log2 e is greater.
        sums: fp64 [n, ceil(rows / 64)], filled; rows may be apart.
        counts: int32 [n], to which the counts are added.
    """
    if use_triton(product):
        from peer_scale.kernels.triton_vocab import add_up

        add_up(product, bias, reference, limit, sums, counts, BLOCK)
        return
    bits = (product.float() + bias).sub_(reference[:, None]).mul_(LOG2_E)
    counts += (bits > limit[:, None]).sum(-1, dtype=torch.int32)
    by_block = torch.nn.functional.pad(powers(bits), (0, -bits.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    torch.sum(by_block, -1, out=sums)


def powers(bits: Tensor) -> Tensor:
    """2**bits in fp64: 0 where bits are below -1000, and as of 1000 where they are above."""
    return torch.exp2(bits.double().clamp_(max=_MAX_BITS)).masked_fill_(bits < -_MAX_BITS, 0.0)


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
