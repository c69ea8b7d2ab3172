"""bias_gelu for NVIDIA GPUs."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = {"ROWS": 32, "COLUMNS": 64, "num_warps": 8}


class FusedGelu(torch.autograd.Function):
    """Keeps its input only; the bias's gradient is added up in the same pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        num_columns = x.shape[-1]
        num_rows = x.numel() // num_columns
        ctx.save_for_backward(x, bias)
        # columns first: programs that run together read rows from end to end
        ctx.grid = (triton.cdiv(num_columns, TILE["COLUMNS"]), triton.cdiv(num_rows, TILE["ROWS"]))
        if num_rows:
            gelu_forward[ctx.grid](x, bias, out, num_rows, num_columns, **TILE)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        num_columns = x.shape[-1]
        num_rows = x.numel() // num_columns
        partial = torch.empty((ctx.grid[1], num_columns), dtype=torch.float32, device=x.device)
        if num_rows:
            gelu_backward[ctx.grid](grad.contiguous(), x, bias, grad_x, partial, num_rows, num_columns, **TILE)
        return grad_x, partial.sum(0).to(bias.dtype)


@triton.jit
def gelu_forward(x, bias, out, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: D103
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < num_columns)
    at = row.to(tl.int64) * num_columns + column
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    value += tl.load(bias + column, column < num_columns, 0.0).to(tl.float32)
    result = 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))
    tl.store(out + at, result.to(out.dtype.element_ty), inside)


@triton.jit
def gelu_backward(  # noqa: D103
    grad, x, bias, grad_x, partial, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < num_columns)
    at = row.to(tl.int64) * num_columns + column
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    value += tl.load(bias + column, column < num_columns, 0.0).to(tl.float32)
    slope = 0.5 * (1 + tl.erf(value * 0.7071067811865476)) + value * 0.3989422804014327 * tl.exp(-0.5 * value * value)
    result = tl.where(inside, tl.load(grad + at, inside, 0.0).to(tl.float32) * slope, 0.0)
    tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), inside)
    where = tl.program_id(1) * num_columns + column
    tl.store(partial + where, tl.sum(result, 0)[None, :], column < num_columns)
