"""add_up_blocks and chunk_gradient for NVIDIA GPUs: the chunk's product is read once.

Both kernels cut the chunk in both directions, so that there are programs enough for every multiprocessor.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SUMS_TILE = {"POSITIONS": 32, "num_warps": 8}
# so many tiles below each other are one program's, which adds up the bias's gradient over them
GRADIENT_TILE = {"POSITIONS": 16, "COLUMNS": 128, "TILES": 8, "num_warps": 8}


def add_up(
    product: Tensor, bias: Tensor, reference: Tensor, limit: Tensor, sums: Tensor, counts: Tensor, block: int
) -> None:
    """See `add_up_blocks`; a block has `block` columns."""
    num_positions, num_columns = product.shape
    if num_positions:
        add_up_kernel[(triton.cdiv(num_columns, block), triton.cdiv(num_positions, SUMS_TILE["POSITIONS"]))](
            *(product, bias, reference, limit, sums, counts, num_positions, num_columns, sums.stride(0)),
            COLUMNS=block,
            **SUMS_TILE,
        )


def gradient(
    product: Tensor, bias: Tensor, log_sum_exp: Tensor, columns: Tensor, grad_loss: Tensor, out: Tensor
) -> Tensor:
    """See `chunk_gradient`."""
    num_positions, num_columns = product.shape
    grad_loss = grad_loss.contiguous()  # a sum's is one number expanded
    rows = GRADIENT_TILE["POSITIONS"] * GRADIENT_TILE["TILES"]
    grid = (triton.cdiv(num_columns, GRADIENT_TILE["COLUMNS"]), triton.cdiv(num_positions, rows))
    partial = torch.empty((grid[1], num_columns), dtype=torch.float32, device=product.device)
    if num_positions:
        gradient_kernel[grid](
            *(product, bias, log_sum_exp, columns, grad_loss, out, partial, num_positions, num_columns),
            **GRADIENT_TILE,
        )
    return partial.sum(0)


@triton.jit
def add_up_kernel(  # noqa: D103
    product, bias, reference, limit, sums, counts, num_positions, num_columns, sums_stride,
    POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = position < num_positions
    inside = here[:, None] & (column < num_columns)[None, :]
    row = position.to(tl.int64)
    logit = tl.load(product + row[:, None] * num_columns + column[None, :], inside, float("-inf")).to(tl.float32)
    logit += tl.load(bias + column, column < num_columns, float("-inf"))[None, :]
    bits = (logit - tl.load(reference + position, here, 0.0)[:, None]) * 1.4426950408889634
    greater = tl.where(bits > tl.load(limit + position, here, 0.0)[:, None], 1, 0)
    tl.atomic_add(counts + position, tl.sum(greater, 1), here, sem="relaxed")  # whole numbers: in any order
    # 2 ** bits in fp64, which no real difference of logits overflows: fp32 for the fraction, then shifted
    bounded = tl.minimum(tl.maximum(bits, -1000.0), 1000.0)
    whole = tl.floor(bounded)
    power = ((whole.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    weight = tl.exp2(bounded - whole).to(tl.float64) * power
    total = tl.sum(tl.where(bits >= -1000.0, weight, 0.0), 1)
    tl.store(sums + row * sums_stride + tl.program_id(0), total, here)


@triton.jit
def gradient_kernel(  # noqa: D103
    product, bias, log_sum_exp, columns, grad_loss, out, partial, num_positions, num_columns,
    POSITIONS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    own_bias = tl.load(bias + column, column < num_columns, float("-inf"))
    total = tl.zeros([COLUMNS], tl.float32)
    for tile in range(TILES):
        position = (tl.program_id(1) * TILES + tile) * POSITIONS + tl.arange(0, POSITIONS)
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
    tl.store(partial + tl.program_id(1) * num_columns + column, total, column < num_columns)
