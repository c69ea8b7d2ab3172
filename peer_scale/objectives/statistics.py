"""How well replaced tokens are told from original ones: plain sums that add up over micro-batches and ranks.

A statistic is a function of tensors and `Places`, so that it can be compiled; works call it by `WorkContext.tally`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from peer_scale.samples.examples import Batch

RTD_SUMS = ("replaced", "rtd_predicted", "rtd_correct", "rtd_pairs", "rtd_pairs_in_order")


class Places(NamedTuple):
    """Where a micro-batch's tokens lie: what of `Batch` statistics need, without the lengths that differ each time.

    Attributes:
        positions: int64 [n], where among the T tokens the selected ones are.
        boundaries: int32 [B + 1], where each sequence begins, and T.
        max_length: length of the longest sequence.
        selected_ids: int64 [n], the number of each selected token's sequence.
        selected_boundaries: int32 [B + 1], where each sequence's selected tokens begin, and n.
        max_selected: how many a sequence has at most.
    """

    positions: Tensor
    boundaries: Tensor
    max_length: int
    selected_ids: Tensor
    selected_boundaries: Tensor
    max_selected: int

    @classmethod
    def of(cls, batch: Batch) -> Places:
        """Take them from a micro-batch."""
        sequences, selected = batch.sequences, batch.selected
        return cls(
            batch.positions,
            sequences.boundaries,
            sequences.max_length,
            selected.sequence_ids,
            selected.boundaries,
            selected.max_length,
        )


def rtd_sums(scores: Tensor, threshold: Tensor, is_replaced: Tensor, places: Places) -> dict[str, Tensor]:
    """Sum up replaced-token detection over all tokens, and over pairs of tokens.

    A pair is a replaced and an original token of one sequence, in order where the original has the greater score: the
    share in order is the area under the ROC curve, and half of the pairs of an ignorant network are.

    Args:
        scores: [T], greater for better tokens.
        threshold: a scalar; a token with a lower score is called replaced.
        is_replaced: [T].
        places: of the micro-batch; only its selected positions can be replaced.
    """
    from peer_scale.sequences import tokens_of_each

    flagged = scores < threshold
    others, is_other = tokens_of_each(places.selected_ids, places.boundaries, places.max_length)
    is_pair = is_replaced[places.positions][:, None] & ~is_replaced[others] & is_other
    return {
        "replaced": is_replaced.sum(),
        "rtd_predicted": flagged.sum(),
        "rtd_correct": (flagged & is_replaced).sum(),
        "rtd_pairs": is_pair.sum(),
        "rtd_pairs_in_order": (is_pair & (scores[places.positions][:, None] < scores[others])).sum(),
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
