"""Which of a few candidates stood at a position: the branch's top and the scores over vocabulary shards."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.models.heads import RankingHead
from peer_scale.models.networks import last_norm, layer_stack
from peer_scale.models.norms import plain_norm
from peer_scale.parallel.sequence import gather_tokens
from peer_scale.parallel.tensor_parallel import TensorParallel
from peer_scale.sequences import Sequences


class DetectionBranch(nn.Module):
    """Layers of its own on top of the trunk, then ELECTRA's head: [T, H] -> scores [T] and one threshold."""

    def __init__(
        self, shape: EncoderShape, config: ModelConfig, num_layers: int, tensor_parallel: TensorParallel
    ) -> None:
        super().__init__()
        self.tensor_parallel = tensor_parallel
        self.layers = layer_stack(range(num_layers), shape, config, tensor_parallel, below=shape.num_layers)
        self.final_norm = last_norm(shape, config, tensor_parallel)
        self.head = RankingHead(shape.hidden_size, 2, config)

    def forward(self, hidden_TH: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
        for layer in self.layers.values():
            hidden_TH = layer(hidden_TH, sequences)
        hidden_TH = self.final_norm(hidden_TH)
        return self.head(gather_tokens(hidden_TH, sequences.num_tokens, self.tensor_parallel))


class SelectionBranch(nn.Module):
    """Layers of its own on top of the trunk, then dense + GELU + LayerNorm at selected positions: [T, H] -> [n, E].

    The candidates' scores are products with their rows of the word table, so they are not here.
    """

    def __init__(
        self, shape: EncoderShape, config: ModelConfig, num_layers: int, tensor_parallel: TensorParallel
    ) -> None:
        super().__init__()
        self.tensor_parallel = tensor_parallel
        self.layers = layer_stack(range(num_layers), shape, config, tensor_parallel, below=shape.num_layers)
        self.final_norm = last_norm(shape, config, tensor_parallel)
        self.dense = nn.Linear(shape.hidden_size, config.embedding_size, bias=config.linear_bias)
        self.norm = plain_norm(config.embedding_size, config)

    def forward(self, hidden_TH: Tensor, sequences: Sequences, positions_n: Tensor) -> Tensor:
        for layer in self.layers.values():
            hidden_TH = layer(hidden_TH, sequences)
        hidden_TH = self.final_norm(hidden_TH)
        selected = gather_tokens(hidden_TH, sequences.num_tokens, self.tensor_parallel)[positions_n]
        return self.norm(F.gelu(self.dense(selected)))


def candidate_scores(
    states: Tensor, weight: Tensor, candidates: Tensor, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Score each position's candidates by the products of its state and their rows of the word table.

    Args:
        states: [n, E], the same on every rank of `group`.
        weight: [V/tp, E], this rank's rows of the table.
        candidates: [n, c] token ids of the whole vocabulary.
        group: the tensor-parallel ranks in the order of their shards; None for one.

    Returns:
        fp32 [n, c], the same on every rank; differentiable in states and weight. Each rank works on the candidates in
        its shard. Forward all-reduces the scores, backward the gradient of the states.
    """
    return _CandidateScores.apply(states, weight, candidates, group)


class _CandidateScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, candidates: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        num_rows = weight.shape[0]
        first = 0 if group is None else group.rank() * num_rows
        is_own = (candidates >= first) & (candidates < first + num_rows)
        rows = torch.where(is_own, candidates - first, 0)
        ctx.save_for_backward(states, weight, rows, is_own)
        ctx.group = group
        scores = torch.einsum("nce,ne->nc", weight[rows].float(), states.float())
        return _sum(torch.where(is_own, scores, 0.0), group)

    @staticmethod
    def backward(ctx: Any, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, rows, is_own = ctx.saved_tensors
        grad_own = torch.where(is_own, grad_scores, 0.0)
        grad_states = _sum(torch.einsum("nc,nce->ne", grad_own, weight[rows].float()), ctx.group)
        of_rows = grad_own[:, :, None] * states.float()[:, None, :]
        # adds up the rows of equal ids in a fixed order, on every device
        grad_weight = torch.ops.aten.embedding_dense_backward(of_rows, rows, weight.shape[0], -1, False)
        return grad_states.to(states.dtype), grad_weight.to(weight.dtype), None, None


def _sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor
