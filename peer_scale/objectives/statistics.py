"""How well replaced tokens are told from original ones: plain sums that add up over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from peer_scale.samples.examples import Batch

RTD_SUMS = ("replaced", "rtd_predicted", "rtd_correct", "rtd_pairs", "rtd_pairs_in_order")


def rtd_sums(scores: Tensor, threshold: Tensor, is_replaced: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Sum up replaced-token detection over all tokens, and over pairs of tokens.

    A pair is a replaced and an original token of one sequence, in order where the original has the greater score: the
    share in order is the area under the ROC curve, and half of the pairs of an ignorant network are.

    Args:
        scores: [T], greater for better tokens.
        threshold: a scalar; a token with a lower score is called replaced.
        is_replaced: [T].
        batch: the micro-batch; only its selected positions can be replaced.
    """
    flagged = scores < threshold
    others, is_other = batch.sequences.of_each(batch.selected.sequence_ids)
    is_pair = is_replaced[batch.positions][:, None] & ~is_replaced[others] & is_other
    return {
        "replaced": is_replaced.sum(),
        "rtd_predicted": flagged.sum(),
        "rtd_correct": (flagged & is_replaced).sum(),
        "rtd_pairs": is_pair.sum(),
        "rtd_pairs_in_order": (is_pair & (scores[batch.positions][:, None] < scores[others])).sum(),
    }


def rtd_metrics(sums: Mapping[str, float]) -> dict[str, object]:
    """Make the shares of `rtd_sums`; a share of nothing is None."""
    return {
        "replaced_fraction": sums["replaced"] / sums["tokens"],
        "rtd_precision": share(sums["rtd_correct"], sums["rtd_predicted"]),
        "rtd_recall": share(sums["rtd_correct"], sums["replaced"]),
        "rtd_auc": share(sums["rtd_pairs_in_order"], sums["rtd_pairs"]),
    }


def share(part: float, whole: float) -> float | None:
    """Divide, where there is something to divide by."""
    return part / whole if whole else None
