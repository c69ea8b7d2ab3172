"""ELECTRA's own head: dropout and one linear layer on the state of the first token, without a pooler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LinearHead(nn.Module):
    """Takes the place of `ElectraClassificationHead` in training."""

    def __init__(self, hidden_size: int, num_outputs: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(hidden_size, num_outputs)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map hidden states [B, S, H] to [B, C]."""
        return self.out_proj(self.dropout(features[:, 0]))


@torch.no_grad()
def write_into_transformers_head(linear: LinearHead, theirs: Any) -> None:
    """Have transformers' head (dense [H, H], GELU, out_proj) compute what the linear one computes, exactly.

    GELU(x) - GELU(-x) = x: the dense layer gives each output and its negative, and `out_proj` takes their difference.

    Raises:
        ValueError: there are more outputs than half the hidden size.
    """
    weight, bias = linear.out_proj.weight, linear.out_proj.bias
    num_outputs, hidden_size = weight.shape
    if 2 * num_outputs > hidden_size:
        raise ValueError(f"{num_outputs} classes are more than half of the hidden size {hidden_size}")
    for parameter in theirs.parameters():
        parameter.zero_()
    theirs.dense.weight[:num_outputs] = weight
    theirs.dense.weight[num_outputs : 2 * num_outputs] = -weight
    numbers = torch.arange(num_outputs)
    theirs.out_proj.weight[numbers, numbers] = 1.0
    theirs.out_proj.weight[numbers, num_outputs + numbers] = -1.0
    theirs.out_proj.bias.copy_(bias)
