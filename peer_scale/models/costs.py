"""Matrix products of the model's parts, forward, 2 FLOPs per multiply-add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from peer_scale.models.config import EncoderShape, ModelConfig


@dataclass(frozen=True)
class Blocks:
    """What of a model's blocks its layers' costs depend on, beside the sizes; the defaults are BERT's.

    Attributes:
        is_gated: whether feed-forward blocks have a third matrix.
        window: of the layers with local attention.
        global_every: layers 0, N, 2N, ... see the whole sequence.
    """

    is_gated: bool = False
    window: int | None = None
    global_every: int = 1

    @staticmethod
    def of(model: ModelConfig) -> Blocks:
        """Take them from the model."""
        return Blocks(model.is_gated, model.attention_window, model.global_attention_every_n)


_BERT = Blocks()


class Product(NamedTuple):
    """A linear layer's matrix; tensor-parallel ranks divide its outputs or its inputs among themselves."""

    inputs: int
    outputs: int
    splits: Literal["outputs", "inputs"]


def layer_products(shape: EncoderShape, blocks: Blocks = _BERT) -> tuple[Product, ...]:
    """List a layer's matrices in the order of its forward pass: QKV, output, and the feed-forward block's two."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    return (
        Product(hidden, 3 * hidden, "outputs"),
        Product(hidden, hidden, "inputs"),
        Product(hidden, (2 if blocks.is_gated else 1) * ffn, "outputs"),
        Product(ffn, hidden, "inputs"),
    )


def attention_matmul_flops(shape: EncoderShape, tokens: float, token_pairs: float, blocks: Blocks = _BERT) -> float:
    """Count the scores and weighted values of one layer's forward pass, which go by pairs of tokens.

    `token_pairs` is the sum of the sequences' squared lengths. Of layers with local and global attention in turn the
    result is their mean.
    """
    if blocks.window is not None:
        share_global = -(-shape.num_layers // blocks.global_every) / shape.num_layers
        local = _pairs_within(blocks.window, tokens, token_pairs)
        token_pairs = share_global * token_pairs + (1 - share_global) * local
    return 2 * 2 * shape.hidden_size * token_pairs


def layer_matmul_flops(shape: EncoderShape, tokens: float, token_pairs: float, blocks: Blocks = _BERT) -> float:
    """Count one layer's forward pass: its matrices by tokens, and attention by pairs of them.

    Whole numbers give a whole number. `token_pairs` is as `attention_matmul_flops` has it.
    """
    per_token = sum(2 * matrix.inputs * matrix.outputs for matrix in layer_products(shape, blocks))
    return per_token * tokens + attention_matmul_flops(shape, tokens, token_pairs, blocks)


def _pairs_within(window: int, tokens: float, token_pairs: float) -> float:
    """Count the pairs of tokens of one sequence at most half a window apart, each with itself included.

    Exact for sequences of one length; others count as if all had the length at which a token has as many others.
    """
    half, length = window // 2, token_pairs / tokens
    if half >= length - 1:
        return token_pairs
    return tokens * (2 * half + 1) - tokens / length * half * (half + 1)  # less what lies beyond both ends


def projection_matmul_flops(model: ModelConfig, shape: EncoderShape) -> int:
    """Count, per token, the projection from embedding to hidden size, which is there only where they differ."""
    if model.embedding_size == shape.hidden_size:
        return 0
    return 2 * model.embedding_size * shape.hidden_size


def mlm_head_matmul_flops(model: ModelConfig, shape: EncoderShape) -> int:
    """Count, per position, the MLM head: dense to embedding size, then the product with the word embeddings."""
    return 2 * model.embedding_size * (shape.hidden_size + model.vocab_size)


def score_head_matmul_flops(shape: EncoderShape) -> int:
    """Count, per position, the RTD or TQR head: dense, then the product with one weight vector."""
    return 2 * shape.hidden_size * (shape.hidden_size + 1)
