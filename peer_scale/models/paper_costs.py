"""Forward FLOPs of the model's parts in the accounting of PEER's Tables 3 and 4, that of google-research/electra.

2 FLOPs per multiply-add, element-wise work included; an embedding look-up counts as a product with a one-hot vector;
15.625 % of the positions pass the MLM head.
"""

from typing import Final

from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.models.costs import (
    Blocks,
    layer_matmul_flops,
    mlm_head_matmul_flops,
    projection_matmul_flops,
    score_head_matmul_flops,
)

# operations per element where it is no matrix product, and the share of positions under the MLM head
_DROPOUT: Final = 4
_LAYER_NORM: Final = 5
_GELU: Final = 8
_SOFTMAX: Final = 5
_OUTPUT_FRACTION: Final = 0.15625


def paper_layer_flops(model: ModelConfig, shape: EncoderShape, seq_length: int) -> float:
    """Count one layer's forward pass over a sequence."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    biases = 3 * hidden + hidden + ffn + hidden
    attention_weights = (1 + _SOFTMAX + _DROPOUT) * seq_length * shape.num_attention_heads  # 1: the scaling
    dropouts_and_residuals = 2 * (_DROPOUT + 1) * hidden
    # The released accounting counts the LayerNorm after attention for one element only; kept, so that totals are equal.
    layer_norms = _LAYER_NORM + _LAYER_NORM * hidden
    per_token = biases + attention_weights + dropouts_and_residuals + layer_norms + _GELU * ffn
    return layer_matmul_flops(shape, seq_length, seq_length**2, Blocks.of(model)) + per_token * seq_length


def paper_embedding_flops(model: ModelConfig, shape: EncoderShape, seq_length: int) -> float:
    """Count word, position and type look-ups as one-hot products, their sum, LayerNorm, dropout and the projection."""
    one_hot = 2 * (model.vocab_size + seq_length + model.num_token_types)
    per_token = (one_hot + 2 + _LAYER_NORM + _DROPOUT) * model.embedding_size
    if model.embedding_size != shape.hidden_size:
        per_token += shape.hidden_size  # the projection's bias
    return projection_matmul_flops(model, shape) * seq_length + per_token * seq_length


def paper_mlm_head_flops(model: ModelConfig, shape: EncoderShape, seq_length: int) -> float:
    """Count dense with bias, GELU and LayerNorm, vocabulary product, softmax, and 2 per word for the target."""
    per_position = (
        mlm_head_matmul_flops(model, shape)
        + (1 + _GELU + _LAYER_NORM) * model.embedding_size
        + (_SOFTMAX + 2) * model.vocab_size
    )
    return _OUTPUT_FRACTION * seq_length * per_position


def paper_binary_head_flops(shape: EncoderShape, seq_length: int) -> float:
    """Count dense with bias and GELU, then one score, on every position."""
    return seq_length * (score_head_matmul_flops(shape) + (1 + _GELU) * shape.hidden_size)


def paper_generator_flops(model: ModelConfig, seq_length: int) -> float:
    """Count the generator's embeddings, layers and head; its pass through shared layers counts half.

    PEER's and TEAMS's printed numbers come out only so.
    """
    generator = model.generator
    layers = generator.num_layers - 0.5 * model.num_shared_layers
    return (
        layers * paper_layer_flops(model, generator, seq_length)
        + paper_embedding_flops(model, generator, seq_length)
        + paper_mlm_head_flops(model, generator, seq_length)
    )


def paper_ranker_flops(model: ModelConfig, shape: EncoderShape, seq_length: int) -> float:
    """Count the embeddings and layers of a network of `shape` and a binary head on every position."""
    return (
        shape.num_layers * paper_layer_flops(model, shape, seq_length)
        + paper_embedding_flops(model, shape, seq_length)
        + paper_binary_head_flops(shape, seq_length)
    )
