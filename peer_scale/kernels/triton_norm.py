"""bias_dropout_residual_norm for NVIDIA GPUs."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peer_scale.kernels.triton_dropout import uniforms

ROWS = 16  # backward: rows whose contributions to the parameters' gradients one program adds up


def tile(num_columns: int) -> dict[str, int]:
    """Give a program whole rows, and threads enough to hold them in registers."""
    block = max(4, triton.next_power_of_2(num_columns))  # dropout draws four columns at a time
    return {"BLOCK": block, "num_warps": min(max(block // 128, 4), 16)}


class FusedNorm(torch.autograd.Function):
    """One kernel forward and one backward; the dropout mask is drawn again from its seed and never stored."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor,
        residual: Tensor,
        weight: Tensor,
        norm_bias: Tensor,
        dropout: float,
        eps: float,
    ) -> Tensor:
        x, residual = x.contiguous(), residual.contiguous()
        num_columns = x.shape[-1]
        num_rows = x.numel() // num_columns
        out, summed = torch.empty_like(x), torch.empty_like(x)
        mean, rstd = (torch.empty(num_rows, dtype=torch.float32, device=x.device) for _ in range(2))
        # on the device, so that the host need not wait for it, and a compiled graph draws another one each time
        seed = torch.randint(2**31, (1,), device=x.device) if dropout else None
        if num_rows:
            norm_forward[(num_rows,)](
                *(x, bias, residual, weight, norm_bias, out, summed, mean, rstd),
                *(num_columns, dropout, eps, seed),
                HAS_DROPOUT=dropout > 0,
                **tile(num_columns),
            )
        ctx.save_for_backward(summed, mean, rstd, weight, seed)
        ctx.dropout = dropout
        ctx.dtypes = (bias.dtype, weight.dtype, norm_bias.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        summed, mean, rstd, weight, seed = ctx.saved_tensors
        grad = grad.contiguous()
        num_columns = summed.shape[-1]
        num_rows = summed.numel() // num_columns
        num_programs = triton.cdiv(num_rows, ROWS)
        grad_x, grad_residual = torch.empty_like(summed), torch.empty_like(summed)
        partial = torch.empty((3, num_programs, num_columns), dtype=torch.float32, device=summed.device)
        if num_rows:
            norm_backward[(num_programs,)](
                *(grad, summed, mean, rstd, weight, grad_x, grad_residual, partial),
                *(num_rows, num_columns, num_programs, ctx.dropout, seed),
                ROWS=ROWS,
                HAS_DROPOUT=ctx.dropout > 0,
                **tile(num_columns),
            )
        sums = partial.sum(1)
        of_bias, of_weight, of_norm_bias = (
            sums.to(ctx.dtypes[0]).unbind()  # one kernel instead of three
            if len(set(ctx.dtypes)) == 1
            else (each.to(dtype) for each, dtype in zip(sums, ctx.dtypes, strict=True))
        )
        return grad_x, of_bias, grad_residual, of_weight, of_norm_bias, None, None


@triton.jit
def norm_forward(  # noqa: D103
    x, bias, residual, weight, norm_bias, out, summed, mean, rstd,
    num_columns, dropout, eps, seed,
    BLOCK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    at = row.to(tl.int64) * num_columns + column
    value = tl.load(x + at, inside, 0.0).to(tl.float32) + tl.load(bias + column, inside, 0.0).to(tl.float32)
    if HAS_DROPOUT:
        group = row * tl.cdiv(num_columns, 4) + tl.arange(0, BLOCK // 4)
        value = tl.where(tl.reshape(uniforms(seed, group), [BLOCK]) >= dropout, value / (1 - dropout), 0.0)
    value += tl.load(residual + at, inside, 0.0).to(tl.float32)
    average = tl.sum(value) / num_columns
    centred = tl.where(inside, value - average, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred) / num_columns + eps)
    result = centred * scale * tl.load(weight + column, inside, 0.0).to(tl.float32)
    result += tl.load(norm_bias + column, inside, 0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), inside)
    tl.store(summed + at, value.to(summed.dtype.element_ty), inside)
    tl.store(mean + row, average)
    tl.store(rstd + row, scale)


@triton.jit
def norm_backward(  # noqa: D103
    grad, summed, mean, rstd, weight, grad_x, grad_residual, partial,
    num_rows, num_columns, num_programs, dropout, seed,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    factor = tl.load(weight + column, inside, 0.0).to(tl.float32)
    of_bias = tl.zeros([BLOCK], tl.float32)
    of_weight = tl.zeros([BLOCK], tl.float32)
    of_norm_bias = tl.zeros([BLOCK], tl.float32)
    for step in range(ROWS):
        asked = program * ROWS + step
        row = tl.minimum(asked, num_rows - 1)
        here = inside & (asked + 0 * column < num_rows)
        at = row.to(tl.int64) * num_columns + column
        given = tl.load(grad + at, here, 0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        average = tl.load(mean + row)
        normal = tl.where(here, (tl.load(summed + at, here, 0.0).to(tl.float32) - average) * scale, 0.0)
        scaled = given * factor
        along = tl.sum(scaled * normal) / num_columns
        level = tl.sum(scaled) / num_columns
        of_sum = tl.where(here, (scaled - normal * along - level) * scale, 0.0)
        of_x = of_sum
        if HAS_DROPOUT:
            group = row * tl.cdiv(num_columns, 4) + tl.arange(0, BLOCK // 4)
            of_x = tl.where(tl.reshape(uniforms(seed, group), [BLOCK]) >= dropout, of_sum / (1 - dropout), 0.0)
        tl.store(grad_residual + at, of_sum.to(grad_residual.dtype.element_ty), here)
        tl.store(grad_x + at, of_x.to(grad_x.dtype.element_ty), here)
        of_bias += of_x
        of_weight += given * normal
        of_norm_bias += given
    place = program * num_columns + column
    part = num_programs * num_columns
    tl.store(partial + place, of_bias, inside)
    tl.store(partial + part + place, of_weight, inside)
    tl.store(partial + 2 * part + place, of_norm_bias, inside)
