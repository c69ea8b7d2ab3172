"""add_up_chunk and chunk_gradient for NVIDIA GPUs: the chunk's product is read once and nothing else is written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_POSITIONS, _COLUMNS = 16, 256  # a program's tile


def add_up(product: Tensor, bias: Tensor, offset: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """See `add_up_chunk`."""
    num_positions, num_columns = product.shape
    sums = torch.zeros(num_positions, dtype=torch.float64, device=product.device)
    counts = torch.zeros(num_positions, dtype=torch.float32, device=product.device)
    if num_positions:
        add_up_kernel[(triton.cdiv(num_positions, _POSITIONS),)](
            *(product, bias, offset, threshold, sums, counts, num_positions, num_columns),
            POSITIONS=_POSITIONS,
            COLUMNS=_COLUMNS,
        )
    return sums, counts


def gradient(
    product: Tensor, bias: Tensor, log_sum_exp: Tensor, columns: Tensor, grad_loss: Tensor, out: Tensor
) -> Tensor:
    """See `chunk_gradient`."""
    num_positions, num_columns = product.shape
    of_bias = torch.zeros(num_columns, dtype=torch.float32, device=product.device)
    if num_positions:
        gradient_kernel[(triton.cdiv(num_columns, _COLUMNS),)](
            *(product, bias, log_sum_exp, columns, grad_loss, out, of_bias, num_positions, num_columns),
            POSITIONS=_POSITIONS,
            COLUMNS=_COLUMNS,
        )
    return of_bias


@triton.jit
def add_up_kernel(  # noqa: D103
    product, bias, offset, threshold, sums, counts, num_positions, num_columns,
    POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    here = position < num_positions
    minus = tl.load(offset + position, here, 0.0)
    limit = tl.load(threshold + position, here, 0.0)
    total = tl.zeros([POSITIONS], tl.float64)
    greater = tl.zeros([POSITIONS], tl.float32)
    for first in range(0, num_columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = here[:, None] & (column < num_columns)[None, :]
        at = position.to(tl.int64)[:, None] * num_columns + column[None, :]
        logit = tl.load(product + at, inside, float("-inf")).to(tl.float32)
        logit += tl.load(bias + column, column < num_columns, float("-inf"))[None, :]
        bits = (logit - minus[:, None]) * 1.4426950408889634
        greater += tl.sum(tl.where(inside & (bits > limit[:, None]), 1.0, 0.0), 1)
        # 2 ** bits in fp64, which no real difference of logits overflows: fp32 for the fraction, then shifted
        bounded = tl.minimum(tl.maximum(bits, -1000.0), 1000.0)
        whole = tl.floor(bounded)
        power = ((whole.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
        weight = tl.floor(tl.exp2(bounded - whole).to(tl.float64) * power + 0.5)
        total += tl.sum(tl.where(inside, weight, 0.0), 1)
    tl.store(sums + position, total, here)
    tl.store(counts + position, greater, here)


@triton.jit
def gradient_kernel(  # noqa: D103
    product, bias, log_sum_exp, columns, grad_loss, out, of_bias, num_positions, num_columns,
    POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    own_bias = tl.load(bias + column, column < num_columns, float("-inf"))
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, num_positions, POSITIONS):
        position = first + tl.arange(0, POSITIONS)
        here = position < num_positions
        inside = here[:, None] & (column < num_columns)[None, :]
        at = position.to(tl.int64)[:, None] * num_columns + column[None, :]
        logit = tl.load(product + at, inside, float("-inf")).to(tl.float32) + own_bias[None, :]
        minus = tl.load(log_sum_exp + position, here, 0.0)
        probability = tl.exp2((logit - minus[:, None]) * 1.4426950408889634)
        target = tl.load(columns + position, here, -1)
        value = probability - tl.where(target[:, None] == column[None, :], 1.0, 0.0)
        value *= tl.load(grad_loss + position, here, 0.0)[:, None]
        tl.store(out + at, value.to(out.dtype.element_ty), inside)
        total += tl.sum(tl.where(inside, value, 0.0), 0)
    tl.store(of_bias + column, total, column < num_columns)
