"""The generator head's way for GPUs, on the CPU's tensors: against float64 numpy, the CPU's way, and over shards.

Without Triton: its kernels are held against these ways in tests/unit/kernels.
"""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from peer_scale.kernels.availability import gpu_branches
from peer_scale.models.generator_head import DRAW_REDUCED_BYTES, EXCLUSION_REDUCED_BYTES, generator_head
from sync_detector import no_device_wait
from test_generator_head import DISCRETE, DTYPES, KINDS, Oracle, Traffic, problem, upstream
from test_negatives import CASES, LAWS, draw, one_after_the_other, p_value, plackett_luce, planted

K = 5
VOCAB = 320  # five blocks
HARD = ("all others but padding", "target sure", "two negatives sure", "one surer than the other")


def run_head(tensors, chunk_size=None, group=None, k=K):
    """Fields, negatives and gradients, on the way for GPUs, which never waits for the device."""
    *leaves, targets, uniforms = tensors
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    grad = upstream(len(targets))
    numbers = torch.rand(len(targets), k, generator=torch.Generator().manual_seed(1))
    with gpu_branches(triton=False), no_device_wait():
        output = generator_head(
            *leaves, targets, uniforms, group=group, chunk_size=chunk_size, negative_uniforms=numbers
        )
        gradients = torch.autograd.grad(output.loss, leaves, grad)
    return type(output)(*(field.detach() for field in output)), output.negatives, gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 96])
def test_against_the_oracle(n, dtype, kind):
    for vocab in (64, VOCAB):
        tensors = problem(n, kind, dtype, vocab=vocab)
        oracle = Oracle(*tensors)
        outputs = [run_head(tensors, chunk_size) for chunk_size in (None, 1, 100, 130)]
        for output, negatives, gradients in outputs:
            assert output.loss.dtype == torch.float32 and all(field.shape == (n,) for field in output)
            oracle.check(output)
            oracle.check_gradients(upstream(n), *gradients, dtype)
            for name in DISCRETE:
                assert torch.equal(getattr(output, name), getattr(outputs[0][0], name))
            assert torch.equal(negatives, outputs[0][1])
            torch.testing.assert_close(output.loss, outputs[0][0].loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_on_the_cpu(dtype):
    """In fp32 to 1e-6 of the greatest number; samples are the same but where a number falls on an edge."""
    torch.manual_seed(0)
    n, vocab, hidden = 201, 1003, 64
    matrices = torch.randn(n, hidden).to(dtype), (torch.randn(vocab, hidden) / 8).to(dtype), torch.randn(vocab) / 4
    matrices[2][1000:] = -math.inf
    targets, uniforms, numbers = torch.randint(1000, (n,)), torch.rand(n), torch.rand(n, K)
    found = {}
    for is_gpu in (False, True):
        leaves = [matrix.clone().requires_grad_() for matrix in matrices]
        with gpu_branches(triton=False) if is_gpu else torch.enable_grad():
            output = generator_head(*leaves, targets, uniforms, negative_uniforms=numbers)
            found[is_gpu] = output, torch.autograd.grad(output.loss, leaves, upstream(n))
    (cpu, cpu_grads), (gpu, gpu_grads) = found[False], found[True]
    tolerance = 1e-6 if dtype == torch.float32 else 2.0**-7
    for name in ("loss", "original_logit"):
        one, other = getattr(cpu, name), getattr(gpu, name)
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1, one.abs().max().item()))
    same = cpu.sampled_ids == gpu.sampled_ids
    assert same.float().mean() > 0.99
    torch.testing.assert_close(cpu.sampled_logit[same], gpu.sampled_logit[same], rtol=tolerance, atol=4 * tolerance)
    assert (cpu.original_rank == gpu.original_rank).float().mean() > (0.99 if dtype == torch.float32 else 0.9)
    assert (cpu.negatives == gpu.negatives).all(1).float().mean() > 0.97
    for one, other in zip(cpu_grads, gpu_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1, one.abs().max().item()))


def sharded_heads(cases):
    rank, size = dist.get_rank(), dist.get_world_size()
    results = []
    for case in cases:
        hidden, weight, bias, targets, uniforms = problem(*case, vocab=VOCAB)
        shard = hidden, weight.chunk(size)[rank], bias.chunk(size)[rank], targets, uniforms
        results.append(run_head(shard, 64, dist.group.WORLD))
    return results


@pytest.mark.heavy
def test_over_shards(four_ranks):
    """The same samples, ranks and negatives whatever the number of shards, whose blocks begin elsewhere."""
    cases = [(1, "plain"), *[(96, kind, dtype) for kind, dtype in zip(KINDS, 2 * DTYPES, strict=True)]]
    by_rank = four_ranks.run(sharded_heads, cases)
    for case, of_ranks in zip(cases, zip(*by_rank, strict=True), strict=True):
        tensors = problem(*case, vocab=VOCAB)
        oracle = Oracle(*tensors)
        alone, negatives, _ = run_head(tensors)
        for fields, drawn, _ in of_ranks:
            oracle.check(fields)
            assert torch.equal(drawn, negatives)
            for name in DISCRETE:
                assert torch.equal(getattr(fields, name), getattr(alone, name)), (case, name)
        joined = [torch.cat([gradients[i] for *_, gradients in of_ranks]) for i in (1, 2)]
        oracle.check_gradients(upstream(case[0]), of_ranks[0][2][0], *joined, tensors[0].dtype)


def bytes_sent(n):
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, bias, targets, uniforms = problem(n)
    shard = hidden, weight.chunk(size)[rank], bias.chunk(size)[rank], targets, uniforms
    counts = []
    for numbers in (None, torch.rand(n, K)):
        with gpu_branches(triton=False), Traffic() as traffic:
            generator_head(*shard, group=dist.group.WORLD, negative_uniforms=numbers)
        counts.append(traffic.sent)
    return counts


def test_bytes_sent_by_a_rank(two_ranks):
    n = 37
    for plain, drawing in two_ranks.run(bytes_sent, n):
        assert 0 < plain <= 64 * n
        assert drawing - plain == n * (EXCLUSION_REDUCED_BYTES + K * DRAW_REDUCED_BYTES)


@pytest.mark.heavy
@pytest.mark.parametrize("law", [law if law in HARD else pytest.param(law, marks=pytest.mark.slow) for law in LAWS])
def test_law_of_ordered_tuples_of_negatives(law):
    logits, target, k = LAWS[law]
    far = [*logits[:2], *[-math.inf] * 130, *logits[2:]]  # in two blocks
    with gpu_branches(triton=False):
        negatives = draw(far, target if target < 2 else target + 130, k, None)
    assert p_value(np.where(negatives < 2, negatives, negatives - 130), plackett_luce(logits, target, k)) > 1e-3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_negative(case, dtype):
    tensors = planted(case, 96, dtype)
    numbers = torch.rand(96, K, generator=torch.Generator().manual_seed(1))
    expected, is_clear = one_after_the_other(tensors, numbers)
    _, negatives, _ = run_head(tensors)
    np.testing.assert_array_equal(negatives.numpy()[is_clear], expected[is_clear])


def test_all_tokens_but_the_target():
    tensors = planted("plain+both", 40, torch.float32)
    real = set(tensors[2].isfinite().nonzero().flatten().tolist())
    _, negatives, _ = run_head(tensors, k=len(real) - 1)
    for row, target in zip(negatives.tolist(), tensors[3].tolist(), strict=True):
        assert sorted([*row, target]) == sorted(real)
