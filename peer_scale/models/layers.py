"""Transformer layers as BERT and ELECTRA have them (LayerNorm after the residual), on megatron-core's parallel linears.

Shapes: T tokens of a micro-batch's sequences, one after the other, H hidden size, E embedding size, N attention heads
of this tensor-parallel rank, D head size.
"""

import contextlib

import torch.nn.functional as F
from torch import Tensor, nn

from peer_scale.kernels.attention import self_attention
from peer_scale.kernels.gelu import bias_gelu
from peer_scale.kernels.norm import bias_dropout_residual_norm
from peer_scale.models.config import EncoderShape, ModelConfig, padded_vocab_size
from peer_scale.parallel.megatron import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    layer_config,
    mark_sharded,
)
from peer_scale.parallel.sequence import (
    gather_tokens_for_split_weights,
    own_random_stream,
    reduce_scatter_tokens,
    whole_gradients,
)
from peer_scale.parallel.tensor_parallel import TensorParallel
from peer_scale.sequences import Sequences


class ColumnLinear(ColumnParallelLinear):
    """Output features split over the tensor-parallel ranks: [T, I] -> [T, O/tp] and the bias, not yet added.

    Under sequence parallelism the input is this rank's slice of the tokens and the output is of all of them.
    """

    def __init__(self, input_size: int, output_size: int, tensor_parallel: TensorParallel) -> None:
        super().__init__(
            input_size,
            output_size,
            config=layer_config(tensor_parallel),
            init_method=None,
            gather_output=False,
            skip_bias_add=True,
            disable_grad_reduce=tensor_parallel.sequence_parallel,
            tp_group=tensor_parallel.group,
        )
        self.tensor_parallel = tensor_parallel
        mark_sharded(self.weight, dim=0)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(gather_tokens_for_split_weights(hidden, self.tensor_parallel))


class RowLinear(RowParallelLinear):
    """Input features split over the tensor-parallel ranks: [T, I/tp] -> [T, O] and the bias, not yet added.

    Under sequence parallelism the output is this rank's slice of the tokens.
    """

    def __init__(self, input_size: int, output_size: int, tensor_parallel: TensorParallel) -> None:
        super().__init__(
            input_size,
            output_size,
            config=layer_config(tensor_parallel),
            init_method=None,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=tensor_parallel.group,
        )
        self.tensor_parallel = tensor_parallel
        mark_sharded(self.weight, dim=1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if not self.tensor_parallel.sequence_parallel:
            return super().forward(hidden)
        return reduce_scatter_tokens(F.linear(hidden, self.weight), self.tensor_parallel), self.bias


class Embeddings(nn.Module):
    """Sum of word, position and type embeddings, then LayerNorm and dropout: ids [T] -> [T, E]."""

    def __init__(self, config: ModelConfig, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.word = VocabParallelEmbedding(
            padded_vocab_size(config.vocab_size, tensor_parallel.size),
            config.embedding_size,
            init_method=None,
            config=layer_config(tensor_parallel),
            tp_group=tensor_parallel.group,
        )
        mark_sharded(self.word.weight, dim=0)
        self.position = nn.Embedding(config.max_position_embeddings, config.embedding_size)
        self.token_type = nn.Embedding(config.num_token_types, config.embedding_size)
        self.norm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, ids_T: Tensor, token_types_T: Tensor, sequences: Sequences) -> Tensor:
        embedded_TE = self.word(ids_T) + self.position(sequences.position_ids) + self.token_type(token_types_T)
        return self.dropout(self.norm(embedded_TE))


class SelfAttention(nn.Module):
    """Multi-head attention within each sequence: [T, H] -> [T, H] and the output's bias, not yet added.

    The rows of the fused QKV matrix are ordered [head, (q, k, v), D], so a split of the rows is a split of the heads.
    """

    def __init__(self, shape: EncoderShape, config: ModelConfig, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.tensor_parallel = tensor_parallel
        self.head_size = shape.head_size
        self.dropout = config.attention_dropout
        self.qkv = ColumnLinear(shape.hidden_size, 3 * shape.hidden_size, tensor_parallel)
        self.dense = RowLinear(shape.hidden_size, shape.hidden_size, tensor_parallel)

    def forward(self, hidden_TH: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
        qkv, bias = self.qkv(hidden_TH)
        dropout = self.dropout if self.training else 0.0
        with own_random_stream(self.tensor_parallel) if dropout else contextlib.nullcontext():
            context_TH = self_attention(qkv, bias, sequences, head_size=self.head_size, dropout=dropout)
        return self.dense(context_TH)


class FeedForward(nn.Module):
    """Two linear layers with a GELU (erf) between them: [T, H] -> [T, H] and the bias, not yet added."""

    def __init__(self, shape: EncoderShape, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.up = ColumnLinear(shape.hidden_size, shape.ffn_hidden_size, tensor_parallel)
        self.down = RowLinear(shape.ffn_hidden_size, shape.hidden_size, tensor_parallel)

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        output, bias = self.up(hidden_TH)
        return self.down(bias_gelu(output, bias))


class ResidualNorm(nn.LayerNorm):
    """LayerNorm of residual + dropout(output + bias), all [T, H]."""

    def __init__(self, hidden_size: int, config: ModelConfig, tensor_parallel: TensorParallel) -> None:
        super().__init__(hidden_size, eps=config.layer_norm_eps)
        self.tensor_parallel = tensor_parallel
        self.dropout = config.hidden_dropout

    def forward(self, output: Tensor, output_bias: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        output_bias, weight, bias = whole_gradients((output_bias, self.weight, self.bias), self.tensor_parallel)
        dropout = self.dropout if self.training else 0.0
        is_split = self.tensor_parallel.sequence_parallel and dropout
        with own_random_stream(self.tensor_parallel) if is_split else contextlib.nullcontext():
            return bias_dropout_residual_norm(
                output, output_bias, residual, weight, bias, dropout=dropout, eps=self.eps
            )


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each followed by dropout, residual and LayerNorm: [T, H] -> [T, H].

    Under sequence parallelism the hidden states are this rank's slice of the tokens.
    """

    def __init__(self, shape: EncoderShape, config: ModelConfig, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.attention = SelfAttention(shape, config, tensor_parallel)
        self.attention_norm = ResidualNorm(shape.hidden_size, config, tensor_parallel)
        self.feed_forward = FeedForward(shape, tensor_parallel)
        self.feed_forward_norm = ResidualNorm(shape.hidden_size, config, tensor_parallel)

    def forward(self, hidden_TH: Tensor, sequences: Sequences) -> Tensor:
        attended = self.attention_norm(*self.attention(hidden_TH, sequences), hidden_TH)
        return self.feed_forward_norm(*self.feed_forward(attended), attended)
