"""Matrix products of the model's parts, forward, 2 FLOPs per multiply-add."""

from peer_scale.models.config import EncoderShape, ModelConfig


def layer_matmul_flops(shape: EncoderShape, tokens: float, token_pairs: float) -> float:
    """Count one layer's forward pass: QKV, output and FFN by tokens; scores and weighted values by pairs of them.

    `token_pairs` is the sum of the sequences' squared lengths. Whole numbers give a whole number.
    """
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    per_token = 2 * 3 * hidden * hidden + 2 * hidden * hidden + 2 * 2 * hidden * ffn
    return per_token * tokens + 2 * 2 * hidden * token_pairs


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
