"""The figures that are reported, counted again one token at a time."""

import numpy as np
import pytest
import torch

from batches import Rows
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.objectives.masked_lm import MaskedLanguageModel
from peer_scale.objectives.objective import SumsLayout
from peer_scale.objectives.statistics import Places, rtd_metrics, rtd_sums
from peer_scale.objectives.task import PretrainingTask
from peer_scale.objectives.tqr import TokenQualityRanking, rank_labels, ranking_sums
from peer_scale.objectives.works import GlobalCounts, StepInfo
from peer_scale.parallel.topology import single_process_topology


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
    slots = torch.rand(rows, width)
    batch = Rows(ids, ids, ids, is_token, positions, is_selected, slots, slots[..., None]).batch()

    layout = SumsLayout(TokenQualityRanking(num_levels=levels, taus=(1.0, 6.0), delta=3.0, tqr_weight=50.0))
    sums = ranking_sums(scores[is_token], thresholds, labels[is_token], Places.of(batch))
    of_tokens = rtd_sums(scores[is_token], thresholds[-1], (corrupted != ids)[is_token], Places.of(batch))
    assert of_tokens.items() <= sums.items()
    of_generator = {"mlm_loss": 30.0, "mlm_correct": ((ranks == 1) & is_selected).sum()}
    of_generator |= {"selected_square": 4.0, "selected_variation": 1.0}
    counts = {"tqr_loss": 60.0, "selected": is_selected.sum(), "tokens": is_token.sum()}
    counts["token_pairs"] = is_token.sum(1).square().sum()
    sums |= of_generator | counts
    assert sums.keys() == set(layout.names) and len(layout) == len(layout.names)
    figures = layout.metrics([float(sums[name]) for name in layout.names])

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
    assert figures["varying_share"] == 0.25
    assert all(figures[name] == value for name, value in rtd_metrics({k: float(v) for k, v in sums.items()}).items())


def test_a_share_of_nothing_is_none():
    layout = SumsLayout(TokenQualityRanking())
    counts = {"selected": 3.0, "tokens": 10.0, "label_3": 3.0}
    figures = layout.metrics([counts.get(name, 0.0) for name in layout.names])
    undefined = {name for name, value in figures.items() if value is None}
    assert undefined == {"varying_share", "rtd_precision", "rtd_recall", "rtd_auc", "rank_concordance"}
    assert figures["level_accuracy"] == {"1": None, "2": None, "3": 0.0}
    assert figures["loss"] == 0


WIDTH, VOCAB = 6, 30


def generator_sums(states, rows, task):
    """What the MLM head counts of hidden states at the selected positions."""
    step = StepInfo(GlobalCounts(rows.is_selected.sum().float(), rows.is_token.sum().float()))
    _, sums, _ = task(("mlm_head",), rows.batch(), step, {"selected": states[rows.is_selected]})
    return dict(zip(task.sums.names, sums.tolist(), strict=True))


@pytest.fixture
def generator_problem():
    """States [B, P, H] at selected positions of which some do not count, their rows, and the task."""
    torch.manual_seed(1)
    shape = EncoderShape(num_layers=1, hidden_size=WIDTH, ffn_hidden_size=8, num_attention_heads=1)
    model = ModelConfig(shape, None, vocab_size=VOCAB, embedding_size=WIDTH, max_position_embeddings=16)
    task = PretrainingTask(model, MaskedLanguageModel(), single_process_topology().tensor_parallel)
    torch.nn.init.normal_(task.model.embeddings.word.weight)
    rows, length, width = 5, 16, 4
    ids = torch.randint(VOCAB, (rows, length))
    positions = torch.stack([torch.randperm(length)[:width] for _ in range(rows)])
    is_selected = torch.arange(width) < torch.tensor([4, 3, 1, 2, 4])[:, None]
    everything = torch.ones_like(ids, dtype=torch.bool)
    states = torch.randn(rows, width, WIDTH) + 2 * torch.randn(rows, 1, WIDTH)
    slots = torch.rand(rows, width)
    return states, Rows(ids, ids, ids, everything, positions, is_selected, slots, slots[..., None]), task


def test_varying_share(generator_problem):
    states, batch, task = generator_problem
    sums = generator_sums(states, batch, task)
    square = variation = 0.0
    for of_row, is_selected in zip(states.double().numpy(), batch.is_selected.numpy(), strict=True):
        chosen = of_row[is_selected]
        square += (chosen**2).sum()
        variation += ((chosen - chosen.mean(0)) ** 2).sum()
    assert sums["selected_square"] == pytest.approx(square, rel=1e-6)
    assert sums["selected_variation"] == pytest.approx(variation, rel=1e-6)
    metrics = MaskedLanguageModel().metrics(sums | {"selected": 14.0})
    assert 0.05 < metrics["varying_share"] < 0.95
    assert metrics["varying_share"] == pytest.approx(variation / square, rel=1e-6)


def test_varying_share_does_not_depend_on_the_layout(generator_problem):
    states, batch, task = generator_problem
    whole = generator_sums(states, batch, task)
    pieces = [generator_sums(states[rows], batch.part(rows), task) for rows in (slice(3), slice(3, 5))]
    for name in ("selected_square", "selected_variation", "mlm_correct", "mlm_loss"):
        assert sum(piece[name] for piece in pieces) == pytest.approx(whole[name], rel=1e-6)


def test_states_that_are_the_same_everywhere_do_not_vary(generator_problem):
    states, batch, task = generator_problem
    sums = generator_sums(states[:, :1].expand_as(states), batch, task)
    assert abs(sums["selected_variation"]) < 1e-6 * sums["selected_square"]
    sums = generator_sums(states, batch._replace(is_selected=torch.arange(4).expand(5, 4) < 1), task)
    assert abs(sums["selected_variation"]) < 1e-6 * sums["selected_square"], "one position has nothing to differ from"


def test_mlm_accuracy_is_how_often_the_original_is_likeliest(generator_problem):
    states, batch, task = generator_problem
    head_states, bias = task.model.head("mlm_head")(states)
    logits = (head_states.double() @ task.model.embeddings.word.weight.double().T + bias).detach().numpy()[..., :VOCAB]
    likeliest = torch.from_numpy(np.argmax(logits, -1))
    ids = batch.input_ids.clone()
    for row, slot in ((0, 0), (0, 2), (2, 0), (3, 3)):  # the last does not count
        ids[row, batch.positions[row, slot]] = likeliest[row, slot]
    is_hit = (ids.gather(1, batch.positions) == likeliest) & batch.is_selected
    assert is_hit.sum() >= 3
    assert generator_sums(states, batch._replace(input_ids=ids), task)["mlm_correct"] == is_hit.sum()
