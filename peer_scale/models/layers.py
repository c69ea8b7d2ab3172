"""Transformer layers as BERT and ELECTRA have them (LayerNorm after the residual), on megatron-core's parallel linears.

Shapes: S sequence length, B micro-batch, H hidden size, E embedding size, N attention heads of this tensor-parallel
rank, D head size. Hidden states are sequence-first, [S, B, H], as Megatron's layers expect.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.parallel.topology import Topology


def column_parallel(input_size: int, output_size: int, topology: Topology) -> ColumnParallelLinear:
    """A linear layer whose output features are split over the tensor-parallel ranks."""
    layer = ColumnParallelLinear(
        input_size,
        output_size,
        config=topology.layer_config(),
        init_method=None,
        gather_output=False,
        tp_group=topology.group("tp"),
    )
    set_tensor_model_parallel_attributes(layer.weight, True, 0, 1)
    return layer


def row_parallel(input_size: int, output_size: int, topology: Topology) -> RowParallelLinear:
    """A linear layer whose input features are split over the tensor-parallel ranks; its output is whole on each."""
    layer = RowParallelLinear(
        input_size,
        output_size,
        config=topology.layer_config(),
        init_method=None,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=topology.group("tp"),
    )
    set_tensor_model_parallel_attributes(layer.weight, True, 1, 1)
    return layer


class Embeddings(nn.Module):
    """Sum of word, position and type embeddings, then LayerNorm and dropout: ids [B, S] -> [S, B, E]."""

    def __init__(self, config: ModelConfig, topology: Topology) -> None:
        super().__init__()
        self.word = VocabParallelEmbedding(
            padded_vocab_size(config.vocab_size, topology.size("tp")),
            config.embedding_size,
            init_method=None,
            config=topology.layer_config(),
            tp_group=topology.group("tp"),
        )
        set_tensor_model_parallel_attributes(self.word.weight, True, 0, 1)
        self.position = nn.Embedding(config.max_position_embeddings, config.embedding_size)
        self.token_type = nn.Embedding(config.num_token_types, config.embedding_size)
        self.norm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, ids_BS: Tensor, token_types_BS: Tensor) -> Tensor:
        positions = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        embedded_BSE = self.word(ids_BS) + self.position(positions) + self.token_type(token_types_BS)
        return self.dropout(self.norm(embedded_BSE)).transpose(0, 1)


class SelfAttention(nn.Module):
    """Multi-head attention over all non-pad positions: [S, B, H] -> [S, B, H].

    The rows of the fused QKV matrix are ordered [head, (q, k, v), D], so a split of the rows is a split of the heads.
    """

    def __init__(self, shape: EncoderShape, config: ModelConfig, topology: Topology) -> None:
        super().__init__()
        self.head_size = shape.head_size
        self.dropout = config.attention_dropout
        self.qkv = column_parallel(shape.hidden_size, 3 * shape.hidden_size, topology)
        self.dense = row_parallel(shape.hidden_size, shape.hidden_size, topology)

    def forward(self, hidden_SBH: Tensor, mask_B11S: Tensor | None) -> Tensor:
        seq_length, batch, _ = hidden_SBH.shape
        qkv = self.qkv(hidden_SBH)[0].view(seq_length, batch, -1, 3, self.head_size)
        query_BNSD, key_BNSD, value_BNSD = qkv.permute(3, 1, 2, 0, 4)
        dropout = self.dropout if self.training else 0.0
        context_BNSD = F.scaled_dot_product_attention(
            query_BNSD, key_BNSD, value_BNSD, attn_mask=mask_B11S, dropout_p=dropout
        )
        return self.dense(context_BNSD.permute(2, 0, 1, 3).reshape(seq_length, batch, -1))[0]


class FeedForward(nn.Module):
    """Two linear layers with a GELU (erf) between them: [S, B, H] -> [S, B, H]."""

    def __init__(self, shape: EncoderShape, topology: Topology) -> None:
        super().__init__()
        self.up = column_parallel(shape.hidden_size, shape.ffn_hidden_size, topology)
        self.down = row_parallel(shape.ffn_hidden_size, shape.hidden_size, topology)

    def forward(self, hidden_SBH: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(hidden_SBH)[0]))[0]


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each followed by dropout, residual and LayerNorm: [S, B, H] -> [S, B, H]."""

    def __init__(self, shape: EncoderShape, config: ModelConfig, topology: Topology) -> None:
        super().__init__()
        self.attention = SelfAttention(shape, config, topology)
        self.attention_norm = nn.LayerNorm(shape.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(shape, topology)
        self.feed_forward_norm = nn.LayerNorm(shape.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_SBH: Tensor, mask_B11S: Tensor | None) -> Tensor:
        attended = self.attention_norm(hidden_SBH + self.dropout(self.attention(hidden_SBH, mask_B11S)))
        return self.feed_forward_norm(attended + self.dropout(self.feed_forward(attended)))


def padded_vocab_size(vocab_size: int, tensor_parallel: int, multiple: int = 8) -> int:
    """Rows of the word-embedding table: a multiple of `multiple` for every tensor-parallel rank."""
    step = multiple * tensor_parallel
    return -(-vocab_size // step) * step
