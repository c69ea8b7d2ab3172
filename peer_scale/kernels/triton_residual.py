"""bias_dropout_residual under dropout for NVIDIA GPUs."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peer_scale.kernels.triton_dropout import uniforms

TILE = {"ROWS": 32, "COLUMNS": 64, "num_warps": 8}


class FusedResidual(torch.autograd.Function):
    """One kernel forward and one backward, which draws the dropout mask again from its seed; nothing else is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor, dropout: float) -> Tensor:
        x, residual = x.contiguous(), residual.contiguous()
        out = torch.empty_like(x)
        num_columns = x.shape[-1]
        num_rows = x.numel() // num_columns
        seed = torch.randint(2**31, (1,), device=x.device)
        ctx.save_for_backward(seed)
        ctx.dropout, ctx.bias_dtype = dropout, None if bias is None else bias.dtype
        # columns first: programs that run together read rows from end to end
        ctx.grid = (triton.cdiv(num_columns, TILE["COLUMNS"]), triton.cdiv(num_rows, TILE["ROWS"]))
        if num_rows:
            arguments = x, bias, residual, out, seed, dropout, num_rows, num_columns
            residual_forward[ctx.grid](*arguments, HAS_BIAS=bias is not None, **TILE)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        (seed,) = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = torch.empty_like(grad)
        num_columns = grad.shape[-1]
        num_rows = grad.numel() // num_columns
        partial = None
        if ctx.bias_dtype is not None:
            partial = torch.empty((ctx.grid[1], num_columns), dtype=torch.float32, device=grad.device)
        if num_rows:
            arguments = grad, grad_x, partial, seed, ctx.dropout, num_rows, num_columns
            residual_backward[ctx.grid](*arguments, HAS_BIAS=partial is not None, **TILE)
        return grad_x, None if partial is None else partial.sum(0).to(ctx.bias_dtype), grad, None


@triton.jit
def residual_forward(  # noqa: D103
    x, bias, residual, out, seed, dropout, num_rows, num_columns,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < num_columns)
    at = row.to(tl.int64) * num_columns + column
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + column, column < num_columns, 0.0).to(tl.float32)
    group = row * tl.cdiv(num_columns, 4) + (tl.program_id(0) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4))[None, :]
    kept = tl.reshape(uniforms(seed, group), [ROWS, COLUMNS]) >= dropout
    value = tl.where(kept, value / (1 - dropout), 0.0) + tl.load(residual + at, inside, 0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton.jit
def residual_backward(  # noqa: D103
    grad, grad_x, partial, seed, dropout, num_rows, num_columns,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < num_columns)
    at = row.to(tl.int64) * num_columns + column
    given = tl.load(grad + at, inside, 0.0).to(tl.float32)
    group = row * tl.cdiv(num_columns, 4) + (tl.program_id(0) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4))[None, :]
    kept = tl.reshape(uniforms(seed, group), [ROWS, COLUMNS]) >= dropout
    result = tl.where(kept, given / (1 - dropout), 0.0)
    tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), inside)
    if HAS_BIAS:
        where = tl.program_id(1) * num_columns + column
        tl.store(partial + where, tl.sum(result, 0)[None, :], column < num_columns)
