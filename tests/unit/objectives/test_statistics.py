"""The figures that are reported, counted again one token at a time."""

import torch

from peer_scale.objectives.statistics import StatisticsLayout, masked_lm_statistics, ranking_statistics
from peer_scale.objectives.tqr import rank_labels
from peer_scale.samples.examples import Batch


def test_figures_against_a_plain_count():
    torch.manual_seed(0)
    rows, length, width, levels = 18, 24, 8, 4
    ids = torch.randint(5, 50, (rows, length))
    is_token = torch.arange(length) < torch.tensor([24, 24, 20, 24, 11, 24] * 3)[:, None]
    positions = torch.stack([torch.randperm(11)[:width] for _ in range(rows)])
    is_selected = torch.arange(width) < torch.tensor([8, 8, 6, 8, 3, 8] * 3)[:, None]
    positions[~is_selected] = 0
    sampled = torch.where(torch.rand(rows, width) < 0.3, ids.gather(1, positions), torch.randint(5, 50, (rows, width)))
    sampled = torch.where(is_selected, sampled, ids.gather(1, positions))
    corrupted = ids.scatter(1, positions, sampled)
    ranks = torch.randint(1, 6, (rows, width))
    chosen = rank_labels(
        sampled == ids.gather(1, positions),
        torch.zeros(rows, width),
        torch.randn(rows, width) * 4,
        ranks,
        num_levels=levels,
        taus=(1.0, 6.0),
        delta=3.0,
    )
    labels = torch.full((rows, length), float(levels)).scatter(1, positions, chosen)
    scores, thresholds = torch.randn(rows, length), torch.tensor([-0.5, 0.0, 0.4])
    batch = Batch(ids, ids, ids, is_token, positions, is_selected, torch.rand(rows, width))

    layout = StatisticsLayout(levels, has_ranker=True)
    sums = masked_lm_statistics(torch.tensor(30.0), ranks.flatten(), is_selected.flatten(), is_token)
    sums |= ranking_statistics(torch.tensor(60.0), scores, thresholds, labels, batch, corrupted)
    figures = layout.figures(layout.pack(sums).tolist(), tqr_weight=50.0)

    selected = [(r, p) for r in range(rows) for p in range(width) if is_selected[r, p]]
    tokens = [(r, c) for r in range(rows) for c in range(length) if is_token[r, c]]
    label_of = {(r, p): round(labels[r, positions[r, p]].item(), 1) for r, p in selected}
    score_of = {(r, p): scores[r, positions[r, p]].item() for r, p in selected}
    replaced = {(r, c) for r, c in tokens if corrupted[r, c] != ids[r, c]}
    flagged = {(r, c) for r, c in tokens if scores[r, c] < 0.4}
    pairs = [
        score_of[a] < score_of[b]
        for a in selected
        for b in selected
        if a[0] == b[0] and label_of[a] < label_of[b] and {label_of[a], label_of[b]} <= {1.0, 2.0, 3.0}
    ]
    assert pairs
    assert figures["mlm_loss"] == 30 / len(selected)
    assert figures["tqr_loss"] == 60 / len(tokens)
    assert figures["loss"] == 30 / len(selected) + 50 * 60 / len(tokens)
    assert figures["mlm_accuracy"] == sum(ranks[r, p].item() == 1 for r, p in selected) / len(selected)
    assert figures["replaced_fraction"] == len(replaced) / len(tokens)
    assert figures["rtd_precision"] == len(flagged & replaced) / len(flagged)
    assert figures["rtd_recall"] == len(flagged & replaced) / len(replaced)
    both = [(a, b) for a in replaced for b in {*tokens} - replaced if a[0] == b[0]]
    assert figures["rtd_auc"] == sum(scores[a].item() < scores[b].item() for a, b in both) / len(both)
    assert figures["rank_concordance"] == sum(pairs) / len(pairs)
    for name, share in figures["rank_label_fractions"].items():
        assert share == sum(label == float(name) for label in label_of.values()) / len(selected)
    assert sum(figures["rank_label_fractions"].values()) == 1
    for level in range(1, levels + 1):
        own = [score_of[key] for key, label in label_of.items() if label == level]
        right = [1 + sum(score > xi for xi in thresholds.tolist()) == level for score in own]
        assert figures["level_accuracy"][str(level)] == (sum(right) / len(right) if right else None)
