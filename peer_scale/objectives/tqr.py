"""Token quality ranking: the labels of Table 2 and the loss of Eq. 5."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peer_scale.objectives.config import check_levels

UNKNOWN_LABEL = -1.0
BUFFER_OFFSET = 0.1


def rank_labels(
    is_original: Tensor,
    original_logit: Tensor,
    sampled_logit: Tensor,
    original_rank: Tensor,
    *,
    num_levels: int = 3,
    taus: Sequence[float] = (1.0,),
    top_t: int = 3,
    delta: float = 3.0,
    buffer_offset: float = BUFFER_OFFSET,
) -> Tensor:
    """Rank label of each token after Table 2, elementwise over tensors of one (any) shape.

    Args:
        is_original: bool; the sampled token equals the original.
        original_logit: logit of the original token.
        sampled_logit: logit of the sampled token.
        original_rank: 1 + number of tokens with a strictly greater logit than the original's.
        num_levels: K >= 2.
        taus: tau_1 < ... < tau_{K-2}.
        top_t: T; where the original ranks below it, the level is unknown (-1).
        delta: width of the buffers; 0 for none.
        buffer_offset: what is added to a level's label in the buffer above it.

    Returns:
        fp32: K for originals, -1, levels 1..K-1, or k + buffer_offset in the buffer above level k.

    Raises:
        UserError: K < 2, a wrong number of taus, or tau_k (1 + delta) > tau_{k+1}.
    """
    check_levels(num_levels, tuple(taus), delta)
    difference = sampled_logit.float() - original_logit.float()
    labels = torch.ones_like(difference)
    for level in range(1, num_levels - 1):
        tau = taus[num_levels - 2 - level]  # tau_{K-1-level} parts this level from the next
        labels = torch.where(difference >= -math.log(tau * (1 + delta)), level + buffer_offset, labels)
        labels = torch.where(difference >= -math.log(tau), float(level + 1), labels)
    labels = torch.where(original_rank > top_t, UNKNOWN_LABEL, labels)
    return torch.where(is_original, float(num_levels), labels)


def tqr_loss(
    scores: Tensor,
    thresholds: Tensor,
    labels: Tensor,
    *,
    gamma: float | Sequence[float] = 0.5,
    buffer_offset: float = BUFFER_OFFSET,
    warmup: bool = False,
) -> Tensor:
    """Eq. 5 summed (not averaged) over all given tokens; a scalar in fp32 (or fp64, if the scores are).

    Args:
        scores: w.h of each token, any shape.
        thresholds: xi_1 < ... < xi_{K-1}; their number gives K.
        labels: of `rank_labels`, shaped as scores.
        gamma: weight of each level term r = 1..K-2, or one for all.
        buffer_offset: as in `rank_labels`.
        warmup: only the first term, ELECTRA's loss (Eq. 4).
    """
    return token_losses(scores, thresholds, labels, gamma=gamma, buffer_offset=buffer_offset, warmup=warmup).sum()


def token_losses(
    scores: Tensor,
    thresholds: Tensor,
    labels: Tensor,
    *,
    gamma: float | Sequence[float] = 0.5,
    buffer_offset: float = BUFFER_OFFSET,
    warmup: bool = False,
) -> Tensor:
    """The summands of `tqr_loss`, one a token, shaped as scores."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    scores, thresholds = scores.to(dtype), thresholds.to(dtype)
    num_levels = len(thresholds) + 1
    losses = F.binary_cross_entropy_with_logits(
        thresholds[-1] - scores, (labels <= num_levels - 1).to(dtype), reduction="none"
    )
    if warmup:
        return losses
    gammas = [gamma] * (num_levels - 2) if isinstance(gamma, int | float) else list(gamma) * (num_levels - 2)
    for level in range(1, num_levels - 1):
        logit = thresholds[level - 1] - scores
        # halfway between the buffer's label and the next level's: no rounding of either can matter
        is_above = labels > level + (1 + buffer_offset) / 2
        is_below = (labels <= level) & (labels != UNKNOWN_LABEL)
        losses = losses - gammas[level - 1] * (is_below * F.logsigmoid(logit) + is_above * F.logsigmoid(-logit))
    return losses
