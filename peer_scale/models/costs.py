"""Matrix products of the model's parts, forward, 2 FLOPs per multiply-add."""

from peer_scale.models.config import EncoderShape, ModelConfig


def layer_matmul_flops(shape: EncoderShape, seq_length: int) -> int:
    """Count one layer's forward pass over a sequence: QKV, scores, weighted values, output, FFN."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    per_token = 2 * 3 * hidden * hidden + 2 * 2 * hidden * seq_length + 2 * hidden * hidden + 2 * 2 * hidden * ffn
    return per_token * seq_length


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
