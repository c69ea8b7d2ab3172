"""gated_activation for NVIDIA GPUs."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = {"ROWS": 32, "COLUMNS": 64, "num_warps": 8}


class FusedGate(torch.autograd.Function):
    """Keeps its input only; the bias's gradient is added up in the same pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, is_gelu: bool) -> Tensor:
        x = x.contiguous()
        num_columns = x.shape[-1] // 2
        num_rows = x.numel() // x.shape[-1]
        out = x.new_empty((*x.shape[:-1], num_columns))
        ctx.save_for_backward(x, bias)
        # columns first: programs that run together read rows from end to end
        ctx.grid = (triton.cdiv(num_columns, TILE["COLUMNS"]), triton.cdiv(num_rows, TILE["ROWS"]))
        ctx.constants = {"IS_GELU": is_gelu, "HAS_BIAS": bias is not None, **TILE}
        if num_rows:
            gate_forward[ctx.grid](x, bias, out, num_rows, num_columns, **ctx.constants)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, bias = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        num_columns = x.shape[-1] // 2
        num_rows = x.numel() // x.shape[-1]
        partial = None
        if bias is not None:
            partial = torch.empty((ctx.grid[1], 2 * num_columns), dtype=torch.float32, device=x.device)
        if num_rows:
            arguments = grad.contiguous(), x, bias, grad_x, partial, num_rows, num_columns
            gate_backward[ctx.grid](*arguments, **ctx.constants)
        return grad_x, None if partial is None else partial.sum(0).to(bias.dtype), None


@triton.jit
def gate_forward(  # noqa: D103
    x, bias, out, num_rows, num_columns,
    IS_GELU: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < num_columns)
    at = row.to(tl.int64) * 2 * num_columns + column
    gate = tl.load(x + at, inside, 0.0).to(tl.float32)
    value = tl.load(x + at + num_columns, inside, 0.0).to(tl.float32)
    if HAS_BIAS:
        gate += tl.load(bias + column, column < num_columns, 0.0).to(tl.float32)
        value += tl.load(bias + num_columns + column, column < num_columns, 0.0).to(tl.float32)
    share = 0.5 * (1 + tl.erf(gate * 0.7071067811865476)) if IS_GELU else tl.sigmoid(gate)
    result = gate * share * value
    tl.store(out + row.to(tl.int64) * num_columns + column, result.to(out.dtype.element_ty), inside)


@triton.jit
def gate_backward(  # noqa: D103
    grad, x, bias, grad_x, partial, num_rows, num_columns,
    IS_GELU: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < num_columns)
    at = row.to(tl.int64) * 2 * num_columns + column
    gate = tl.load(x + at, inside, 0.0).to(tl.float32)
    value = tl.load(x + at + num_columns, inside, 0.0).to(tl.float32)
    if HAS_BIAS:
        gate += tl.load(bias + column, column < num_columns, 0.0).to(tl.float32)
        value += tl.load(bias + num_columns + column, column < num_columns, 0.0).to(tl.float32)
    if IS_GELU:
        share = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    else:
        share = tl.sigmoid(gate)
        slope = share * (1 + gate * (1 - share))
    given = tl.load(grad + row.to(tl.int64) * num_columns + column, inside, 0.0).to(tl.float32)
    of_gate, of_value = given * value * slope, given * gate * share
    tl.store(grad_x + at, of_gate.to(grad_x.dtype.element_ty), inside)
    tl.store(grad_x + at + num_columns, of_value.to(grad_x.dtype.element_ty), inside)
    if HAS_BIAS:
        where = partial + tl.program_id(1) * 2 * num_columns + column
        tl.store(where, tl.sum(of_gate, 0)[None, :], column < num_columns)
        tl.store(where + num_columns, tl.sum(of_value, 0)[None, :], column < num_columns)
