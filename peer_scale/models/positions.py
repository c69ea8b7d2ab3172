"""Positions within attention: rotary angles of queries and keys, and T5's bias of the scores.

Shapes: T tokens, N attention heads of this tensor-parallel rank, D head size, L length of the longest sequence.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.parallel.megatron import mark_sharded
from peer_scale.parallel.tensor_parallel import TensorParallel


def rotate(qkv: Tensor, position_ids: Tensor, *, head_size: int, base: float, num_positions: int) -> Tensor:
    """Turn queries and keys by angles that grow with a token's place (Su et al. 2021); values stay.

    The numbers i and i + D/2 of a head are a pair; at place p it is turned by p / base ** (2i / D).

    Args:
        qkv: [T', N * 3 * D], T' >= T: for each head query, key and value. Changed in place where nothing is compiled.
        position_ids: int64 [T], each token's place in its sequence. Rows beyond T are left alone.
        head_size: D, even.
        base: of the angles.
        num_positions: greater than every place.

    Returns:
        `qkv`, turned.
    """
    if torch.compiler.is_compiling():
        return _turned(qkv, position_ids, head_size, base)
    cos, sin = _angles(num_positions, head_size, base, qkv.device)
    return _Rotation.apply(qkv, cos[position_ids], sin[position_ids], head_size)


@functools.lru_cache(maxsize=8)
def _angles(num_positions: int, head_size: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Give cosine and sine of each place's angles, fp32 [places, D / 2] each."""
    frequencies = 1.0 / base ** (torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size)
    angles = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, head_size: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.head_size = head_size
        ctx.mark_dirty(qkv)
        _turn(qkv, cos, sin, head_size)
        return qkv

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad = grad.clone()
        _turn(grad, cos, -sin, ctx.head_size)
        return grad, None, None, None


def _turned(qkv: Tensor, position_ids: Tensor, head_size: int, base: float) -> Tensor:
    """Give what `_turn` makes of `qkv`, as a plain composition without tables."""
    num_tokens = len(position_ids)
    frequencies = 1.0 / base ** (torch.arange(0, head_size, 2, dtype=torch.float32, device=qkv.device) / head_size)
    angles = (position_ids[:, None].float() * frequencies)[:, None, None]
    by_half = qkv[:num_tokens].view(num_tokens, -1, 3, 2, head_size // 2)
    first, second = by_half[:, :, :2].unbind(3)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), 3).to(qkv.dtype)
    whole = torch.cat((turned, by_half[:, :, 2:]), 2).view(num_tokens, -1)
    return whole if len(qkv) == num_tokens else torch.cat((whole, qkv[num_tokens:]))


def _turn(qkv: Tensor, cos: Tensor, sin: Tensor, head_size: int) -> None:
    """Turn the first rows of `qkv`, as many as there are angles, in place."""
    num_tokens = len(cos)
    query_and_key = qkv[:num_tokens].view(num_tokens, -1, 3, 2, head_size // 2)[:, :, :2]
    first, second = query_and_key.unbind(3)
    cos, sin = cos[:, None, None], sin[:, None, None]  # in fp32, and so are the products
    turned_first, turned_second = first * cos - second * sin, second * cos + first * sin
    first.copy_(turned_first)
    second.copy_(turned_second)


class RelativeBias(nn.Embedding):
    """T5's bias of the attention scores: a number per head for each bucket of distances (Raffel et al. 2020).

    Each layer has its own table: one for all, as T5 has it, would have to live on several pipeline stages.
    """

    def __init__(self, shape: EncoderShape, config: ModelConfig, tensor_parallel: TensorParallel) -> None:
        super().__init__(config.relative_attention_num_buckets, shape.num_attention_heads // tensor_parallel.size)
        self.max_distance = config.relative_attention_max_distance
        assert isinstance(self.weight, nn.Parameter)
        mark_sharded(self.weight, dim=1)

    def forward(self, length: int) -> Tensor:  # type: ignore[override]
        """Give the bias [N, L, L] of each query (first) for each key (second)."""
        distances = torch.arange(1 - length, length, device=self.weight.device)
        buckets = distance_buckets(distances, self.num_embeddings, self.max_distance)
        return _ByDistance.apply(self.weight[buckets].t(), length)


def distance_buckets(distances: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Give the bucket of each distance (place of the key minus that of the query), as T5 counts them.

    Half of the buckets are for keys after the query. Of each half, one half is for one distance each, and the other for
    ranges that grow up to `max_distance`, from where on all distances share the last bucket.
    """
    per_side = num_buckets // 2
    num_exact = per_side // 2
    absolute = distances.abs()
    grown = torch.log(absolute.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    far = (num_exact + (grown * (per_side - num_exact)).long()).clamp(max=per_side - 1)
    return torch.where(absolute < num_exact, absolute, far) + per_side * (distances > 0)


class _ByDistance(torch.autograd.Function):
    """From a number per head and distance [N, 2L - 1] to the matrices [N, L, L] whose diagonals they are."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, length: int) -> Tensor:
        ctx.length = length
        # row i begins at the distance -i, which is L - 1 - i places into the distances
        return values.contiguous().unfold(1, length, 1).flip(1).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # rows of 2L - 1 numbers each, every one shifted by one place against the next, have the diagonals as columns
        heads, length = len(grad), ctx.length
        padded = nn.functional.pad(grad.flip(1), (0, length))
        shifted = padded.view(heads, -1)[:, :-length].view(heads, length, 2 * length - 1)
        return shifted.sum(1), None
