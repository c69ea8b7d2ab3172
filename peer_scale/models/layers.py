"""Transformer layers on megatron-core's parallel linears: BERT's and ELECTRA's, or of other blocks (`ModelConfig`).

Shapes: T tokens of a micro-batch's sequences, one after the other, H hidden size, E embedding size, N attention heads
of this tensor-parallel rank, D head size.
"""

import contextlib

import torch.nn.functional as F
from torch import Tensor, nn

from peer_scale.kernels.attention import self_attention
from peer_scale.kernels.gated import gated_activation
from peer_scale.kernels.gelu import bias_gelu
from peer_scale.models.config import EncoderShape, ModelConfig, padded_vocab_size
from peer_scale.models.norms import Norm, ResidualNorm, ResidualSum, plain_norm
from peer_scale.models.positions import RelativeBias, rotate
from peer_scale.parallel.megatron import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    layer_config,
    mark_sharded,
)
from peer_scale.parallel.sequence import (
    gathered_linear,
    own_random_stream,
    reduce_scatter_tokens,
)
from peer_scale.parallel.tensor_parallel import TensorParallel
from peer_scale.sequences import Sequences


class ColumnLinear(ColumnParallelLinear):
    """Output features split over the tensor-parallel ranks: [T, I] -> [T, O/tp] and the bias, not yet added.

    Under sequence parallelism the input is this rank's slice of the tokens and the output is of all of them.
    """

    def __init__(
        self, input_size: int, output_size: int, tensor_parallel: TensorParallel, *, has_bias: bool = True
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            config=layer_config(tensor_parallel),
            init_method=None,
            bias=has_bias,
            gather_output=False,
            skip_bias_add=True,
            disable_grad_reduce=tensor_parallel.sequence_parallel,
            tp_group=tensor_parallel.group,
        )
        self.tensor_parallel = tensor_parallel
        mark_sharded(self.weight, dim=0)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        return self.product(hidden, self.weight), self.bias

    def product(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Multiply with this rank's rows [O/tp, I] of the weight."""
        if self.tensor_parallel.size == 1:
            return F.linear(hidden, weight)
        if self.tensor_parallel.sequence_parallel:
            return gathered_linear(hidden, weight, self.tensor_parallel)
        return ColumnParallelLinear.forward(self, hidden, weight)[0]


class GatedColumnLinear(ColumnLinear):
    """Gate and value of a gated feed-forward block in one product: [T, I] -> [T, 2 * O/tp] and the bias, not yet added.

    The weight is [2, O/tp, I], the gate's rows first, so that tensor-parallel ranks have parts of a whole along one
    dimension, and each has matching rows of both.
    """

    def __init__(
        self, input_size: int, output_size: int, tensor_parallel: TensorParallel, *, has_bias: bool = True
    ) -> None:
        super().__init__(input_size, 2 * output_size, tensor_parallel, has_bias=has_bias)
        for name, parameter in dict(self.named_parameters()).items():
            by_half = nn.Parameter(parameter.detach().unflatten(0, (2, -1)))
            mark_sharded(by_half, dim=1)
            self.register_parameter(name, by_half)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        return self.product(hidden, self.weight.flatten(0, 1)), None if self.bias is None else self.bias.flatten()


class RowLinear(RowParallelLinear):
    """Input features split over the tensor-parallel ranks: [T, I/tp] -> [T, O] and the bias, not yet added.

    Under sequence parallelism the output is this rank's slice of the tokens.
    """

    def __init__(
        self, input_size: int, output_size: int, tensor_parallel: TensorParallel, *, has_bias: bool = True
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            config=layer_config(tensor_parallel),
            init_method=None,
            bias=has_bias,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=tensor_parallel.group,
        )
        self.tensor_parallel = tensor_parallel
        mark_sharded(self.weight, dim=1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        if self.tensor_parallel.size == 1:
            return F.linear(hidden, self.weight), self.bias
        if self.tensor_parallel.sequence_parallel:
            return reduce_scatter_tokens(F.linear(hidden, self.weight), self.tensor_parallel), self.bias
        return super().forward(hidden)


class Embeddings(nn.Module):
    """Sum of word, position and type embeddings, then the norm and dropout: ids [T] -> [T, E].

    Of positions and types only where the model has tables of them.
    """

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
        self.position = self.token_type = None
        if config.position_embedding == "absolute":
            self.position = nn.Embedding(config.max_position_embeddings, config.embedding_size)
        if config.num_token_types:
            self.token_type = nn.Embedding(config.num_token_types, config.embedding_size)
        self.norm = plain_norm(config.embedding_size, config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, ids_T: Tensor, token_types_T: Tensor, sequences: Sequences) -> Tensor:
        embedded_TE = self.word(ids_T)
        if self.position is not None:
            embedded_TE = embedded_TE + self.position(sequences.position_ids)
        if self.token_type is not None:
            embedded_TE = embedded_TE + self.token_type(token_types_T)
        return self.dropout(self.norm(embedded_TE))


class SelfAttention(nn.Module):
    """Multi-head attention within each sequence: [T, H] -> [T, H] and the output's bias, not yet added.

    The rows of the fused QKV matrix are ordered [head, (q, k, v), D], so a split of the rows is a split of the heads.
    """

    def __init__(self, shape: EncoderShape, config: ModelConfig, tensor_parallel: TensorParallel, number: int) -> None:
        super().__init__()
        self.tensor_parallel = tensor_parallel
        self.head_size = shape.head_size
        self.dropout = config.attention_dropout
        self.window = config.window_of(number)
        self.num_positions = config.max_position_embeddings
        self.rotary_base = config.rotary_base_of(number) if config.position_embedding == "rotary" else None
        width, has_bias = shape.hidden_size, config.linear_bias
        self.qkv = ColumnLinear(width, 3 * width, tensor_parallel, has_bias=has_bias)
        has_relative_bias = config.position_embedding == "t5_bias"
        self.relative_bias = RelativeBias(shape, config, tensor_parallel) if has_relative_bias else None
        self.dense = RowLinear(width, width, tensor_parallel, has_bias=has_bias)

    def forward(self, hidden_TH: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor | None]:
        return self.dense(self.attend(*self.project(hidden_TH, sequences.position_ids), sequences))

    def project(self, hidden_TH: Tensor, position_ids_T: Tensor) -> tuple[Tensor, Tensor | None]:
        """Make query, key and value of every head, [T, N * 3 * D], and the bias that is not yet added."""
        qkv, bias = self.qkv(hidden_TH)
        if self.rotary_base is not None:
            if bias is not None:
                qkv, bias = qkv + bias, None
            qkv = rotate(
                qkv,
                position_ids_T,
                head_size=self.head_size,
                base=self.rotary_base,
                num_positions=self.num_positions,
            )
        return qkv, bias

    def attend(self, qkv: Tensor, bias: Tensor | None, sequences: Sequences) -> Tensor:
        """Let each token see those of its sequence: [T, N * 3 * D] -> [T, N * D]."""
        dropout = self.dropout if self.training else 0.0
        with own_random_stream(self.tensor_parallel) if dropout else contextlib.nullcontext():
            return self_attention(
                qkv,
                bias,
                sequences,
                head_size=self.head_size,
                dropout=dropout,
                score_bias=None if self.relative_bias is None else self.relative_bias(sequences.max_length),
                window=self.window,
            )


class FeedForward(nn.Module):
    """Two linear layers with a GELU (erf) or a gate between them: [T, H] -> [T, H] and the bias, not yet added."""

    def __init__(self, shape: EncoderShape, config: ModelConfig, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        width, inner, has_bias = shape.hidden_size, shape.ffn_hidden_size, config.linear_bias
        self.activation = config.activation
        linear = GatedColumnLinear if config.is_gated else ColumnLinear
        self.up = linear(width, inner, tensor_parallel, has_bias=has_bias)
        self.down = RowLinear(inner, width, tensor_parallel, has_bias=has_bias)

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = self.up(hidden_TH)
        if self.activation != "gelu":
            return self.down(gated_activation(output, bias, self.activation))
        return self.down(F.gelu(output) if bias is None else bias_gelu(output, bias))


class TransformerLayer(nn.Module):
    """Attention and feed-forward, with a norm, dropout and residual each: [T, H] -> [T, H].

    Post-norm layers normalize the sum of a block and its input. Pre-norm layers normalize what goes into a block; the
    first of a network leaves that out before attention where its input comes from the embeddings' own norm, as
    ModernBERT does. Under sequence parallelism the hidden states are this rank's slice of the tokens.
    """

    def __init__(self, shape: EncoderShape, config: ModelConfig, tensor_parallel: TensorParallel, number: int) -> None:
        """Build layer `number` of its network, shared layers included."""
        super().__init__()
        self.is_pre_norm = config.is_pre_norm
        has_normed_input = number == 0 and config.embedding_size == shape.hidden_size
        norm = Norm if config.is_pre_norm else ResidualNorm
        self.attention = SelfAttention(shape, config, tensor_parallel, number)
        self.attention_norm: nn.Module = (
            nn.Identity()
            if config.is_pre_norm and has_normed_input
            else norm(shape.hidden_size, config, tensor_parallel)
        )
        self.feed_forward = FeedForward(shape, config, tensor_parallel)
        self.feed_forward_norm = norm(shape.hidden_size, config, tensor_parallel)
        self.residual = ResidualSum(config, tensor_parallel)

    def forward(self, hidden_TH: Tensor, sequences: Sequences) -> Tensor:
        qkv, bias = self.before_attention(hidden_TH, sequences.position_ids)
        return self.after_attention(self.attention.attend(qkv, bias, sequences), hidden_TH)

    def before_attention(self, hidden_TH: Tensor, position_ids_T: Tensor) -> tuple[Tensor, Tensor | None]:
        """Make what the attention works on: see `SelfAttention.project`."""
        normed = self.attention_norm(hidden_TH) if self.is_pre_norm else hidden_TH
        return self.attention.project(normed, position_ids_T)

    def after_attention(self, context_TH: Tensor, hidden_TH: Tensor) -> Tensor:
        """Run all that follows the attention: its context and the layer's input [T, H] -> [T, H]."""
        attended = self.attention.dense(context_TH)
        if self.is_pre_norm:
            hidden_TH = self.residual(*attended, hidden_TH)
            return self.residual(*self.feed_forward(self.feed_forward_norm(hidden_TH)), hidden_TH)
        hidden_TH = self.attention_norm(*attended, hidden_TH)
        return self.feed_forward_norm(*self.feed_forward(hidden_TH), hidden_TH)
