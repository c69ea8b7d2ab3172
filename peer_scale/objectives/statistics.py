"""What a step reports besides its losses, as plain sums that add up over micro-batches and ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from peer_scale.objectives.tqr import BUFFER_OFFSET, UNKNOWN_LABEL
from peer_scale.samples.examples import Batch

_MASKED_LM = ("mlm_loss", "mlm_correct", "selected", "tokens")
_RANKING = (
    *("tqr_loss", "replaced", "rtd_predicted", "rtd_correct", "rtd_pairs", "rtd_pairs_in_order"),
    *("rank_pairs", "rank_pairs_in_order"),
)


def possible_labels(num_levels: int) -> list[float]:
    """-1, the levels 1..K and the buffers above levels 1..K-2, ascending."""
    buffers = [level + BUFFER_OFFSET for level in range(1, num_levels - 1)]
    return sorted([UNKNOWN_LABEL, *map(float, range(1, num_levels + 1)), *buffers])


class StatisticsLayout:
    """Order of the sums in the vector that travels between ranks, and the figures made of them."""

    def __init__(self, num_levels: int, *, has_ranker: bool) -> None:
        self.num_levels = num_levels
        self.labels = possible_labels(num_levels)
        ranking = [*_RANKING, *map(label_key, self.labels), *(f"correct_{k}" for k in range(1, num_levels + 1))]
        self.names = [*_MASKED_LM, *(ranking if has_ranker else [])]

    def __len__(self) -> int:
        return len(self.names)

    def pack(self, sums: Mapping[str, Tensor]) -> Tensor:
        """The sums as one fp64 vector, without gradient; those that are not given are 0."""
        zero = torch.zeros_like(next(iter(sums.values())), dtype=torch.float64)
        return torch.stack([sums[name].detach().double() if name in sums else zero for name in self.names])

    def figures(self, vector: list[float], tqr_weight: float) -> dict[str, object]:
        """Losses and shares of a step, as metrics.jsonl names them; a share of nothing is None."""
        sums = dict(zip(self.names, vector, strict=True))
        mlm_loss = sums["mlm_loss"] / sums["selected"]
        figures: dict[str, object] = {
            "loss": mlm_loss,
            "mlm_loss": mlm_loss,
            "mlm_accuracy": sums["mlm_correct"] / sums["selected"],
        }
        if "tqr_loss" in sums:
            figures |= self._ranking_figures(sums, mlm_loss, tqr_weight)
        return figures

    def _ranking_figures(self, sums: dict[str, float], mlm_loss: float, tqr_weight: float) -> dict[str, object]:
        tqr_loss = sums["tqr_loss"] / sums["tokens"]
        counts = {label: sums[label_key(label)] for label in self.labels}
        return {
            "loss": mlm_loss + tqr_weight * tqr_loss,
            "tqr_loss": tqr_loss,
            "replaced_fraction": sums["replaced"] / sums["tokens"],
            "rtd_precision": _share(sums["rtd_correct"], sums["rtd_predicted"]),
            "rtd_recall": _share(sums["rtd_correct"], sums["replaced"]),
            "rtd_auc": _share(sums["rtd_pairs_in_order"], sums["rtd_pairs"]),
            "rank_concordance": _share(sums["rank_pairs_in_order"], sums["rank_pairs"]),
            "rank_label_fractions": {f"{label:g}": count / sums["selected"] for label, count in counts.items()},
            "level_accuracy": {
                str(level): _share(sums[f"correct_{level}"], counts[float(level)])
                for level in range(1, self.num_levels + 1)
            },
        }


def label_key(label: float) -> str:
    """Name of the sum that counts `label`."""
    return f"label_{label:g}"


def masked_lm_statistics(
    mlm_loss: Tensor, original_rank: Tensor, is_selected: Tensor, is_token: Tensor
) -> dict[str, Tensor]:
    """Sums of the generator's pass; the original token is the best guess where its rank is 1."""
    return {
        "mlm_loss": mlm_loss,
        "mlm_correct": ((original_rank == 1) & is_selected).sum(),
        "selected": is_selected.sum(),
        "tokens": is_token.sum(),
    }


def ranking_statistics(
    tqr_loss: Tensor, scores: Tensor, thresholds: Tensor, labels: Tensor, batch: Batch, corrupted_ids: Tensor
) -> dict[str, Tensor]:
    """Sums of the ranker's pass: RTD over all tokens; labels, levels and pairs at the selected positions.

    A pair is two tokens of one sequence, in order where the better one has the greater score. Half of the pairs of an
    ignorant ranker are, whatever the mix. Of RTD one is replaced and one is not: the share in order is the area under
    the ROC curve. Of ranks both are replaced, and their levels are known and differ.
    """
    num_levels = len(thresholds) + 1
    is_replaced = corrupted_ids != batch.input_ids
    flagged = (scores < thresholds[-1]) & batch.is_token
    sums = {
        "tqr_loss": tqr_loss,
        "replaced": is_replaced.sum(),
        "rtd_predicted": flagged.sum(),
        "rtd_correct": (flagged & is_replaced).sum(),
    }
    scores_BP = scores.gather(1, batch.positions)
    replaced_BP = batch.is_selected & is_replaced.gather(1, batch.positions)
    is_original = batch.is_token & ~is_replaced
    sums["rtd_pairs"] = (replaced_BP.sum(1) * is_original.sum(1)).sum()
    is_below = (scores_BP[:, :, None] < scores[:, None, :]) & replaced_BP[:, :, None] & is_original[:, None, :]
    sums["rtd_pairs_in_order"] = is_below.sum()
    labels_BP = torch.where(batch.is_selected, labels.gather(1, batch.positions), torch.nan)
    is_level = (labels_BP >= 1) & (labels_BP < num_levels) & (labels_BP == labels_BP.round())
    is_pair = (labels_BP[:, :, None] < labels_BP[:, None, :]) & is_level[:, :, None] & is_level[:, None, :]
    sums["rank_pairs"] = is_pair.sum()
    sums["rank_pairs_in_order"] = (is_pair & (scores_BP[:, :, None] < scores_BP[:, None, :])).sum()
    predicted = 1 + (scores_BP[..., None] > thresholds).sum(-1)
    for label in possible_labels(num_levels):
        has_label = labels_BP == torch.tensor(label, dtype=labels_BP.dtype)
        sums[label_key(label)] = has_label.sum()
        if label >= 1 and label.is_integer():
            sums[f"correct_{int(label)}"] = (has_label & (predicted == label)).sum()
    return sums


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
