"""The layers on top of an encoder: the MLM head's transform and the ranking (TQR) head."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peer_scale.models.config import ModelConfig, padded_vocab_size
from peer_scale.models.norms import plain_norm
from peer_scale.parallel.megatron import mark_sharded
from peer_scale.parallel.tensor_parallel import TensorParallel


class MaskedLMHead(nn.Module):
    """Dense + GELU + norm down to the embedding size, and the bias of the vocabulary: [n, H] -> [n, E].

    The output matrix is the word-embedding table, so it is not here.
    """

    def __init__(self, config: ModelConfig, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.dense = nn.Linear(config.generator.hidden_size, config.embedding_size, bias=config.linear_bias)
        self.norm = plain_norm(config.embedding_size, config)
        rows = padded_vocab_size(config.vocab_size, tensor_parallel.size) // tensor_parallel.size
        self.bias = nn.Parameter(torch.zeros(rows))
        mark_sharded(self.bias, dim=0)
        self.first_row = rows * tensor_parallel.rank
        is_padding = torch.arange(self.first_row, self.first_row + rows) >= config.vocab_size
        self.register_buffer("is_padding", is_padding, persistent=False)

    @torch.no_grad()
    def begin_with_frequencies(self, counts: Tensor) -> None:
        """Set the biases to the logarithms of relative frequencies, from counts [V]; each is counted once more."""
        frequencies = (counts.double() + 1) / (counts.sum() + len(counts))
        own = frequencies.log()[self.first_row :][: len(self.bias)]
        self.bias[: len(own)] = own.to(self.bias)

    def forward(self, hidden_nH: Tensor) -> tuple[Tensor, Tensor]:
        """Give transformed states [n, E] and bias [rows], -inf on padding rows: never sampled, ranked or counted."""
        return self.norm(F.gelu(self.dense(hidden_nH))), self.bias.masked_fill(self.get_buffer("is_padding"), -math.inf)


class RankingHead(nn.Module):
    """ELECTRA's dense + GELU, then one score w.h a token and K-1 increasing thresholds (Eq. 3): [..., H] -> [...].

    The thresholds are built from free numbers so that they increase strictly whatever values an optimizer step gives:
    xi_{K-1} is the last of them and each lower one lies below its neighbour by softplus of its own, plus a sliver that
    stays representable in fp32 when the numbers grow large.

    Of pre-norm models a norm follows the GELU, as in the heads of ModernBERT.
    """

    _INITIAL_GAP = 1.0

    def __init__(self, hidden_size: int, num_levels: int, config: ModelConfig) -> None:
        super().__init__()
        assert num_levels >= 2, "a ranker has at least two levels"
        self.dense = nn.Linear(hidden_size, hidden_size, bias=config.linear_bias)
        self.norm = plain_norm(hidden_size, config) if config.is_pre_norm else nn.Identity()
        self.score = nn.Linear(hidden_size, 1, bias=False)
        free = torch.full((num_levels - 1,), math.log(math.expm1(self._INITIAL_GAP)))
        free[-1] = 0.0
        self.free_thresholds = nn.Parameter(free)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Give the scores w.h [...] and thresholds [K-1], both fp32."""
        transformed = self.norm(F.gelu(self.dense(hidden)))
        scores = F.linear(transformed.float(), self.score.weight.float()).squeeze(-1)
        return scores, ordered_thresholds(self.free_thresholds)


def ordered_thresholds(free: Tensor) -> Tensor:
    """xi_1 < ... < xi_{K-1} in fp32 from K-1 free numbers; the last one is xi_{K-1} itself (exported as RTD's bias)."""
    thresholds = [free[-1].float()]
    for raw_gap in free[:-1].float().flip(0):
        above = thresholds[0]
        sliver = 1e-3 * (1.0 + above.detach().abs())
        thresholds.insert(0, above - F.softplus(raw_gap) - sliver)
    return torch.stack(thresholds)
