"""The generator head against float64 numpy: loss, gradients, rank, sample; alone and over two vocabulary shards."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from peer_scale.parallel.vocab import generator_head


def problem(n, vocab, hidden=16, seed=0, padding=0):
    rng = np.random.default_rng(seed)
    states = rng.normal(0, 1, (n, hidden)).astype(np.float32)
    weight = rng.normal(0, 0.7, (vocab, hidden)).astype(np.float32)
    weight[7] = weight[3]  # two tokens that always tie
    bias = rng.normal(0, 0.3, vocab).astype(np.float32)
    bias[7] = bias[3]
    if padding:
        bias[-padding:] = -np.inf
    targets = rng.integers(0, vocab - padding, n)
    targets[: n // 4] = 3
    uniforms = rng.random(n).astype(np.float32)
    return [torch.from_numpy(a) for a in (states, weight, bias, targets, uniforms)]


def oracle(states, weight, bias, targets, uniforms):
    """fp64 throughout; ties are counted on the fp32 logits."""
    logits = states.double() @ weight.double().T + bias.double()
    log_p = logits - torch.logsumexp(logits, 1, keepdim=True)
    loss = -log_p.gather(1, targets[:, None]).squeeze(1)
    cumulative = log_p.exp().cumsum(1).numpy()
    sampled = [
        np.searchsorted(row, u, side="right") for row, u in zip(cumulative, uniforms.double().numpy(), strict=True)
    ]
    single = (states @ weight.T + bias).numpy()
    rank = [1 + int((row > row[t]).sum()) for row, t in zip(single, targets, strict=True)]
    return loss, np.array(sampled), np.array(rank), logits, cumulative


@pytest.mark.parametrize("n", [0, 1, 64])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_against_the_oracle(n, chunk_size):
    states, weight, bias, targets, uniforms = problem(n, 53, padding=3)
    for tensor in (states, weight, bias):
        tensor.requires_grad_()
    output = generator_head(states, weight, bias, targets, uniforms, chunk_size=chunk_size)
    with torch.no_grad():
        loss, sampled, rank, logits, cumulative = oracle(states, weight, bias, targets, uniforms)
    assert all(field.shape == (n,) for field in output)
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(output.original_rank, rank)
    near_edge = np.abs(cumulative - uniforms.numpy()[:, None]).min(1) < 1e-6 if n else np.zeros(0, bool)
    np.testing.assert_array_equal(output.sampled_ids.numpy()[~near_edge], sampled[~near_edge])
    assert (output.sampled_ids < 50).all()
    for field, ids in ((output.original_logit, targets), (output.sampled_logit, output.sampled_ids)):
        torch.testing.assert_close(field.double(), logits.gather(1, ids[:, None]).squeeze(1), rtol=1e-5, atol=1e-5)

    weights = torch.linspace(0.5, 2, n)
    (output.loss * weights).sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (states, weight, bias)]
    reference = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T + exact[2], targets, reduction="none")
    (reference * weights).sum().backward()
    for ours, theirs in zip((states, weight, bias), exact, strict=True):
        if n:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_bf16_follows_its_own_logits():
    states, weight, bias, targets, uniforms = problem(64, 53)
    states, weight = states.bfloat16(), weight.bfloat16()
    output = generator_head(states, weight, bias, targets, uniforms)
    logits = (states @ weight.T).float() + bias
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-5)
    rank = 1 + (logits > logits.gather(1, targets[:, None])).sum(1)
    assert torch.equal(output.original_rank, rank)
    assert output.loss.dtype == torch.float32


def test_sampled_frequencies_are_the_softmax():
    states, weight, bias, _, _ = problem(1, 20)
    draws = 200_000
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(1))
    many = states.expand(draws, -1)
    output = generator_head(many, weight, bias, torch.zeros(draws, dtype=torch.long), uniforms, chunk_size=50_000)
    probabilities = torch.softmax((states.double() @ weight.double().T + bias.double()).squeeze(0), 0)
    counts = torch.bincount(output.sampled_ids, minlength=20).double()
    expected = probabilities * draws
    usual = expected > 5
    statistic = ((counts - expected)[usual] ** 2 / expected[usual]).sum().item()
    degrees = int(usual.sum()) - 1
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5  # five standard deviations of chi-square


def shard_result(n, vocab):
    states, weight, bias, targets, uniforms = problem(n, vocab, padding=3)
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * vocab // size, (rank + 1) * vocab // size)
    weight, bias = weight[mine].clone().requires_grad_(), bias[mine].clone().requires_grad_()
    states.requires_grad_()
    output = generator_head(states, weight, bias, targets, uniforms, group=dist.group.WORLD)
    output.loss.sum().backward()
    return [field.detach() for field in output], states.grad, weight.grad


@pytest.mark.parametrize("n", [1, 64])
def test_two_shards_give_what_one_gives(two_ranks, n):
    states, weight, bias, targets, uniforms = problem(n, 54, padding=3)
    states.requires_grad_(), weight.requires_grad_()
    whole = generator_head(states, weight, bias, targets, uniforms)
    whole.loss.sum().backward()
    parts = two_ranks.run(shard_result, n, 54)
    for fields, _, _ in parts:
        torch.testing.assert_close(fields[0], whole.loss.detach())
        for name in ("sampled_ids", "original_rank"):
            index = whole._fields.index(name)
            assert torch.equal(fields[index], whole[index])
    for _, state_gradient, _ in parts:
        torch.testing.assert_close(state_gradient, states.grad)
    torch.testing.assert_close(torch.cat([gradient for _, _, gradient in parts]), weight.grad)
