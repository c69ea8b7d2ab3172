"""Matrix products of the model's parts, forward, 2 FLOPs per multiply-add."""

from __future__ import annotations

from dataclasses import dataclass

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


def layer_matmul_flops(shape: EncoderShape, tokens: float, token_pairs: float, blocks: Blocks = _BERT) -> float:
    """Count one layer's forward pass: QKV, output and FFN by tokens; scores and weighted values by pairs of them.

    `token_pairs` is the sum of the sequences' squared lengths. Whole numbers give a whole number. Of layers with local
    and global attention in turn it is their mean.
    """
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    per_token = 2 * 3 * hidden * hidden + 2 * hidden * hidden + (3 if blocks.is_gated else 2) * 2 * hidden * ffn
    if blocks.window is not None:
        share_global = -(-shape.num_layers // blocks.global_every) / shape.num_layers
        local = _pairs_within(blocks.window, tokens, token_pairs)
        token_pairs = share_global * token_pairs + (1 - share_global) * local
    return per_token * tokens + 2 * 2 * hidden * token_pairs


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
