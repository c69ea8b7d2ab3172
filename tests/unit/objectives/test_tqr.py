"""Labels and loss against a brute-force numpy reading of Table 2 and Eq. 5."""

import math

import numpy as np
import pytest
import torch

from peer_scale.errors import UserError
from peer_scale.models.heads import ordered_thresholds
from peer_scale.objectives.tqr import rank_labels, tqr_loss


def oracle_label(original, difference, rank, num_levels, taus, top_t, delta):
    """Table 2 read row by row, each interval tested on its own."""
    if original:
        return num_levels
    if rank > top_t:
        return -1
    matches = []
    edge = {k: np.float32(-math.log(taus[k - 1])) for k in range(1, num_levels - 1)}
    buffer_edge = {k: np.float32(-math.log(taus[k - 1] * (1 + delta))) for k in range(1, num_levels - 1)}
    if num_levels == 2 or difference >= edge[1]:
        matches.append(num_levels - 1)
    for k in range(1, num_levels - 1):
        level = num_levels - 1 - k
        if buffer_edge[k] <= difference < edge[k]:
            matches.append(level + 0.1)
        lowest = edge[k + 1] if k + 1 in edge else np.float32(-np.inf)
        if lowest <= difference < buffer_edge[k]:
            matches.append(level)
    assert len(matches) == 1, "the rows of Table 2 must not overlap or leave gaps"
    return matches[0]


def oracle_loss(scores, thresholds, labels, gammas, warmup):
    """Eq. 5 with plain sigmoids, token by token."""
    num_levels = len(thresholds) + 1
    total = 0.0
    for score, label in zip(scores, labels, strict=True):
        at_most = [1 / (1 + math.exp(score - xi)) for xi in thresholds]
        total += math.log(at_most[-1]) if label <= num_levels - 1 else math.log(1 - at_most[-1])
        if warmup or label == -1:
            continue
        for r in range(1, num_levels - 1):
            if label <= r:
                total += gammas[r - 1] * math.log(at_most[r - 1])
            elif label > r + 0.1 + 1e-6:
                total += gammas[r - 1] * math.log(1 - at_most[r - 1])
    return -total


def random_setting(rng):
    num_levels = int(rng.integers(2, 7))
    delta = float(rng.choice([0.0, 1.0, 3.0, 9.0, float(rng.uniform(0, 4))]))
    taus, tau = [], 1.0
    for _ in range(num_levels - 2):
        taus.append(tau)
        tau *= (1 + delta) * float(rng.choice([1.0, 2.0])) + (0.5 if delta == 0 else 0.0)
    return num_levels, taus, delta


def random_tokens(rng, count, num_levels, taus, delta):
    """Logits of which a third have differences exactly on an edge of the table."""
    original_logit = rng.normal(0, 3, count).astype(np.float32)
    difference = rng.normal(0, 3, count).astype(np.float32)
    edges = [-math.log(t) for t in taus] + [-math.log(t * (1 + delta)) for t in taus] + [0.0]
    on_edge = rng.random(count) < 1 / 3
    original_logit[on_edge] = 0.0
    difference[on_edge] = rng.choice(np.array(edges, np.float32), on_edge.sum())
    sampled_logit = (original_logit + difference).astype(np.float32)
    return original_logit, sampled_logit, rng.random(count) < 0.2, rng.integers(1, 8, count)


@pytest.mark.parametrize("seed", range(40))
def test_labels_follow_table_2(seed):
    rng = np.random.default_rng(seed)
    num_levels, taus, delta = random_setting(rng)
    top_t = int(rng.integers(1, 6))
    original_logit, sampled_logit, is_original, rank = random_tokens(rng, 300, num_levels, taus, delta)
    expected = [
        oracle_label(o, np.float32(s - base), r, num_levels, taus, top_t, delta)
        for o, s, base, r in zip(is_original, sampled_logit, original_logit, rank, strict=True)
    ]
    labels = rank_labels(
        torch.from_numpy(is_original).view(30, 10),
        torch.from_numpy(original_logit).view(30, 10),
        torch.from_numpy(sampled_logit).view(30, 10),
        torch.from_numpy(rank).view(30, 10),
        num_levels=num_levels,
        taus=tuple(taus),
        top_t=top_t,
        delta=delta,
    )
    assert labels.shape == (30, 10)
    assert labels.dtype == torch.float32
    np.testing.assert_array_equal(labels.flatten().numpy(), np.array(expected, np.float32))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("warmup", [False, True])
def test_loss_is_equation_5(seed, warmup):
    rng = np.random.default_rng(seed)
    num_levels, _, _ = random_setting(rng)
    possible = [-1.0, *range(1, num_levels + 1), *(k + 0.1 for k in range(1, num_levels - 1))]
    labels = rng.choice(np.array(possible, np.float32), 60)
    scores = rng.normal(0, 2, 60)
    thresholds = np.sort(rng.normal(0, 2, num_levels - 1))
    gammas = rng.uniform(0.1, 2, max(num_levels - 2, 1))
    expected = oracle_loss(scores, thresholds, labels, gammas, warmup)
    loss = tqr_loss(
        torch.from_numpy(scores),
        torch.from_numpy(thresholds),
        torch.from_numpy(labels),
        gamma=list(gammas),
        warmup=warmup,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("num_levels", [2, 3, 5])
def test_gradients_by_finite_differences(num_levels):
    torch.manual_seed(num_levels)
    scores = torch.randn(40, dtype=torch.float64, requires_grad=True)
    thresholds = torch.linspace(-1, 0.5, num_levels - 1, dtype=torch.float64).requires_grad_()
    possible = [-1.0, *range(1, num_levels + 1), *(k + 0.1 for k in range(1, num_levels - 1))]
    labels = torch.tensor(possible)[torch.randint(len(possible), (40,))]
    assert torch.autograd.gradcheck(lambda s, xi: tqr_loss(s, xi, labels), (scores, thresholds))


def test_two_levels_are_replaced_token_detection():
    scores, labels = torch.randn(50), torch.randint(1, 3, (50,)).float()
    threshold = torch.tensor([0.3])
    bce = torch.nn.functional.binary_cross_entropy_with_logits(
        threshold - scores, (labels == 1).float(), reduction="sum"
    )
    assert tqr_loss(scores, threshold, labels).item() == pytest.approx(bce.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_levels": 1, "taus": ()}, "at least 2"),
        ({"num_levels": 4, "taus": (1.0,)}, "take 2 values"),
        ({"num_levels": 4, "taus": (1.0, 3.0), "delta": 3.0}, "tau_1 (1 + delta)"),
        ({"num_levels": 4, "taus": (2.0, 1.0), "delta": 0.0}, "tau_1 (1 + delta)"),
        ({"num_levels": 3, "taus": (0.0,)}, "above 0"),
        ({"delta": -1.0}, "at least 0"),
    ],
)
def test_impossible_levels_are_refused(settings, said):
    one = torch.ones(1)
    with pytest.raises(UserError) as error:
        rank_labels(one.bool(), one, one, one, **settings)
    assert said in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4, 1e6])
def test_thresholds_increase_whatever_the_step(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        free = (torch.randn(5, generator=generator) * scale).to(dtype)
        thresholds = ordered_thresholds(free)
        assert (thresholds[1:] > thresholds[:-1]).all()
        assert thresholds[-1] == free[-1].float()
