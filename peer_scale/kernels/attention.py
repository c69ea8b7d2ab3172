"""Self-attention within each sequence, on the fused QKV product of tokens that stand one after the other.

Nothing is padded where it can be helped: on GPUs a variable-length flash kernel, on the CPU sequences in groups of like
length. One padded call of torch's fused kernel serves what the flash kernels cannot (fp32, a score bias, head sizes).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peer_scale.kernels.availability import on_gpu
from peer_scale.kernels.grouped_attention import GroupedAttention, window_mask
from peer_scale.kernels.optional_parts import FLASH_ATTN, offered
from peer_scale.sequences import Sequences


def self_attention(
    qkv: Tensor,
    bias: Tensor | None,
    sequences: Sequences,
    *,
    head_size: int,
    dropout: float = 0.0,
    score_bias: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Multi-head attention of every token over those of its sequence.

    Args:
        qkv: [T', N * 3 * D], T' >= T: for each of N heads query, key and value of D numbers. Rows beyond T fill up a
            slice of sequence parallelism and count for nothing.
        bias: [N * 3 * D], added to `qkv` first; None for none.
        sequences: T tokens.
        head_size: D.
        dropout: share of the attention probabilities that is dropped; drawn from torch's default generator.
        score_bias: [N, L, L], L the greatest length: added to the scaled score of the query at the first place in a
            sequence for the key at the second; differentiable.
        window: tokens further apart than half of this do not see each other; None for all of the sequence.

    Returns:
        [T', N * D], zeros beyond T.
    """
    if not on_gpu(qkv.device):
        return GroupedAttention.apply(qkv, bias, sequences, head_size, dropout, score_bias, window)
    flash = _suitable_flash(qkv.dtype, head_size, has_score_bias=score_bias is not None)
    num_tokens = sequences.num_tokens
    num_filling = len(qkv) - num_tokens
    biased = qkv[:num_tokens] if num_filling else qkv  # a slice or a padding of nothing costs kernels, too
    if bias is not None:
        biased = biased + bias
    query, key, value = biased.view(num_tokens, -1, 3, head_size).unbind(2)
    if flash is None:
        context = padded_attention(query, key, value, sequences, dropout, score_bias, window)
    else:
        context = flash.run(query, key, value, sequences, dropout, window)
    context = context.reshape(num_tokens, -1)
    return F.pad(context, (0, 0, 0, num_filling)) if num_filling else context


class FlashKernel(NamedTuple):
    """A variable-length kernel by name; `run` takes query, key, value [T, N, D], sequences, dropout and window."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor, Sequences, float, int | None], Tensor]


def describe_attention(device: torch.device, dtype: torch.dtype, head_size: int, *, has_score_bias: bool) -> str:
    """Name the way attention is computed, for the start-up summary."""
    if not on_gpu(device):
        return "in groups of like length"
    flash = _suitable_flash(dtype, head_size, has_score_bias=has_score_bias)
    return "torch's fused kernel on padded sequences" if flash is None else flash.name


@cache
def flash_kernel() -> FlashKernel | None:
    """Find the variable-length kernel of this machine, once: flash-attn where it is installed, else torch's own."""
    with contextlib.suppress(ImportError):
        return FlashKernel("flash-attn, variable length", _flash_attn(offered(FLASH_ATTN)))
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return FlashKernel("torch's flash attention, variable length", _torch_flash)
    return None


def _suitable_flash(dtype: torch.dtype, head_size: int, *, has_score_bias: bool) -> FlashKernel | None:
    is_half = dtype in (torch.float16, torch.bfloat16)
    is_suitable = is_half and not has_score_bias and head_size % 8 == 0 and head_size <= 256
    return flash_kernel() if is_suitable else None


def _flash_attn(varlen: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(
        query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, dropout: float, window: int | None
    ) -> Tensor:
        length, half = sequences.max_length, -1 if window is None else window // 2
        bounds = sequences.boundaries
        return varlen(query, key, value, bounds, bounds, length, length, dropout_p=dropout, window_size=(half, half))

    return run


def _torch_flash(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, dropout: float, window: int | None
) -> Tensor:
    half = None if window is None else window // 2
    bounds, length = sequences.boundaries, sequences.max_length
    # the operator beneath `torch.nn.attention.varlen`, which has no dropout
    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        bounds,
        bounds,
        length,
        length,
        dropout,
        False,
        False,
        window_size_left=half,
        window_size_right=half,
    )[0]


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    dropout: float = 0.0,
    score_bias: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Pad all sequences to the longest, and take torch's fused kernel: query, key and value [T, N, D] -> [T, N, D]."""
    sequence_numbers = torch.arange(len(sequences.lengths), device=query.device)
    tokens_BL, is_token_BL = sequences.of_each(sequence_numbers)
    query, key, value = (each[tokens_BL].transpose(1, 2) for each in (query, key, value))
    mask: Tensor = is_token_BL[:, None, None, :]
    if window is not None or score_bias is not None:
        added = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, -torch.inf)
        if score_bias is not None:
            added = added + score_bias.to(query.dtype)
        if window is not None:
            # a padded query's window may hold no token at all, and must see something
            forbidden = window_mask(sequences.max_length, window, query.device) & is_token_BL[:, None, :, None]
            added = added.masked_fill(forbidden, -torch.inf)
        mask = added
    context_BNLD = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return context_BNLD.transpose(1, 2)[sequences.sequence_ids, sequences.position_ids]
