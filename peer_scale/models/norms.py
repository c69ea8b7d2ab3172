"""LayerNorm or RMSNorm, before a layer's blocks or after them."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peer_scale.kernels.norm import bias_dropout_residual_norm
from peer_scale.kernels.residual import bias_dropout_residual
from peer_scale.models.config import ModelConfig
from peer_scale.parallel.sequence import own_random_stream, whole_gradients
from peer_scale.parallel.tensor_parallel import TensorParallel


def plain_norm(size: int, config: ModelConfig) -> nn.Module:
    """Make the norm of embeddings and heads, where every tensor-parallel rank has all tokens."""
    if config.norm == "rms_norm":
        return nn.RMSNorm(size, eps=config.layer_norm_eps)
    return nn.LayerNorm(size, eps=config.layer_norm_eps, bias=config.norm_bias)


class Norm(nn.Module):
    """A norm over hidden states [T, H], which under sequence parallelism are this rank's slice of the tokens."""

    def __init__(self, hidden_size: int, config: ModelConfig, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.tensor_parallel = tensor_parallel
        self.eps, self.is_rms = config.layer_norm_eps, config.norm == "rms_norm"
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if config.has_norm_bias else None

    def forward(self, hidden_TH: Tensor) -> Tensor:
        weight, bias = with_whole_gradients((self.weight, self.bias), self.tensor_parallel)
        assert weight is not None, "a norm has a weight"
        return self.normalized(hidden_TH, weight, bias)

    def normalized(self, hidden_TH: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Normalize with a weight and a bias that stand for the module's own."""
        if self.is_rms:
            return F.rms_norm(hidden_TH, weight.shape, weight, self.eps)
        return F.layer_norm(hidden_TH, weight.shape, weight, bias, self.eps)


class ResidualNorm(Norm):
    """The norm of residual + dropout(output + bias), all [T, H]: the end of a block of a post-norm layer."""

    def __init__(self, hidden_size: int, config: ModelConfig, tensor_parallel: TensorParallel) -> None:
        super().__init__(hidden_size, config, tensor_parallel)
        self.dropout = config.hidden_dropout

    def forward(self, output: Tensor, output_bias: Tensor | None, residual: Tensor) -> Tensor:  # type: ignore[override]
        parameters = (output_bias, self.weight, self.bias)
        output_bias, weight, bias = with_whole_gradients(parameters, self.tensor_parallel)
        assert weight is not None, "a norm has a weight"
        dropout = self.dropout if self.training else 0.0
        with split_random_stream(dropout, self.tensor_parallel):
            if output_bias is not None and bias is not None:
                return bias_dropout_residual_norm(
                    output, output_bias, residual, weight, bias, dropout=dropout, eps=self.eps
                )
            summed = bias_dropout_residual(output, output_bias, residual, dropout=dropout)
        return self.normalized(summed, weight, bias)


class ResidualSum(nn.Module):
    """The sum residual + dropout(output + bias), all [T, H]: the end of a block of a pre-norm layer."""

    def __init__(self, config: ModelConfig, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.tensor_parallel = tensor_parallel
        self.dropout = config.hidden_dropout

    def forward(self, output: Tensor, output_bias: Tensor | None, residual: Tensor) -> Tensor:
        (output_bias,) = with_whole_gradients((output_bias,), self.tensor_parallel)
        dropout = self.dropout if self.training else 0.0
        with split_random_stream(dropout, self.tensor_parallel):
            return bias_dropout_residual(output, output_bias, residual, dropout=dropout)


def with_whole_gradients(
    parameters: tuple[Tensor | None, ...], tensor_parallel: TensorParallel
) -> tuple[Tensor | None, ...]:
    """Give the replicated parameters, those that are there, to a layer that may see a slice of the tokens."""
    present = tuple(parameter for parameter in parameters if parameter is not None)
    given = iter(whole_gradients(present, tensor_parallel) if present else ())
    return tuple(None if parameter is None else next(given) for parameter in parameters)


def split_random_stream(dropout: float, tensor_parallel: TensorParallel) -> contextlib.AbstractContextManager[None]:
    """Let each tensor-parallel rank draw its own numbers, where there is dropout of a slice of the tokens."""
    is_split = tensor_parallel.sequence_parallel and dropout
    return own_random_stream(tensor_parallel) if is_split else contextlib.nullcontext()
