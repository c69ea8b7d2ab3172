"""Scores of candidates over vocabulary shards, and their gradients, against the dense product in float64."""

import pytest
import torch
import torch.distributed as dist

from peer_scale.models.multi_word_selection import candidate_scores

VOCAB, WIDTH, NUM_CANDIDATES = 24, 8, 5
DTYPES = ((torch.float32, 1e-6), (torch.bfloat16, 2.0**-7))


def problem(n, dtype):
    """States, table, candidates with ids that many positions share and one that a position has twice, and gradients."""
    generator = torch.Generator().manual_seed(n)
    states = torch.randn(n, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype)
    candidates = torch.randint(VOCAB, (n, NUM_CANDIDATES), generator=generator)
    candidates[: n // 2, 0] = 7  # of the first of two shards
    candidates[n // 3 :, 1] = 19  # of the second
    candidates[:1, 2] = candidates[:1, 0]
    return states, weight, candidates, torch.randn(n, NUM_CANDIDATES, generator=generator)


def run(states, weight, candidates, upstream, group=None):
    leaves = [states.requires_grad_(), weight.requires_grad_()]
    scores = candidate_scores(*leaves, candidates, group=group)
    return scores.detach(), *torch.autograd.grad(scores, leaves, upstream)


def dense(states, weight, candidates, upstream):
    """Through the scores of all tokens and one-hot rows; gradients by their formulas."""
    states, weight, upstream = states.double(), weight.double(), upstream.double()
    one_hot = torch.nn.functional.one_hot(candidates, VOCAB).double()
    scores = torch.einsum("ncv,nv->nc", one_hot, states @ weight.T)
    of_logits = torch.einsum("ncv,nc->nv", one_hot, upstream)
    return scores, of_logits @ weight, of_logits.T @ states


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("n", [0, 1, 40])
def test_alone(n, dtype, tolerance):
    found, expected = run(*problem(n, dtype)), dense(*problem(n, dtype))
    assert [tensor.dtype for tensor in found] == [torch.float32, dtype, dtype]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=10 * tolerance)


def of_shard(n, dtype):
    states, weight, candidates, upstream = problem(n, dtype)
    shard = weight.chunk(dist.get_world_size())[dist.get_rank()].clone()
    return run(states, shard, candidates, upstream, dist.group.WORLD)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_over_shards(dtype, tolerance, two_ranks):
    n = 40
    (scores, of_states, *first), (*others, second) = two_ranks.run(of_shard, n, dtype)
    assert torch.equal(scores, others[0]) and torch.equal(of_states, others[1])
    expected = dense(*problem(n, dtype))
    for one, other in zip((scores, of_states, torch.cat([*first, second])), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=10 * tolerance)


def test_a_rerun_has_the_same_bits():
    first, second = run(*problem(40, torch.float32)), run(*problem(40, torch.float32))
    assert all(map(torch.equal, first, second))
