"""What runs on a GPU, as it runs there, against the CPU's ways: kernels, attention, the generator head.

Triton's kernels are compiled here, not interpreted. `pytest -m gpu` on a machine with a GPU; left out elsewhere.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from peer_scale.kernels.attention import self_attention
from peer_scale.kernels.availability import gpu_branches
from peer_scale.kernels.gated import gated_activation
from peer_scale.kernels.gelu import bias_gelu
from peer_scale.kernels.norm import bias_dropout_residual_norm
from peer_scale.kernels.residual import bias_dropout_residual
from peer_scale.models.generator_head import generator_head
from peer_scale.parallel.devices import compute_exactly
from peer_scale.sequences import Sequences

pytestmark = [pytest.mark.gpu, pytest.mark.heavy]

GPU = "cuda"
SHAPES = [(1, 16), (3, 7), (17, 257), (70, 100), (4096, 256), (1000, 768), (513, 1024), (100, 4096)]
FORMATS = [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)]


@pytest.fixture(scope="module", autouse=True)
def exact():
    compute_exactly()


def numbers(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def distance(found, expected):
    """||found - expected|| / ||expected||, in fp64; NaN is none."""
    found, expected = found.detach().double().cpu(), expected.detach().double()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def check(function, leaves, grad, tolerance):
    """Compare output and gradients, in the leaves' format on the GPU, with those of the same in fp64 on the CPU."""
    there = [leaf.detach().to(GPU).requires_grad_() for leaf in leaves]
    here = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found, expected = function(*there), function(*here)
    assert found.dtype == leaves[0].dtype and found.is_cuda
    assert distance(found, expected) <= tolerance
    ours = torch.autograd.grad(found, there, grad.to(GPU, found.dtype))
    theirs = torch.autograd.grad(expected, here, grad.double())
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert distance(one, other) <= 2 * tolerance, f"gradient {number}"


@pytest.mark.parametrize(("dtype", "tolerance"), FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_gelu_gates_and_residual(shape, dtype, tolerance):
    rows, width = shape
    x, residual, grad = (numbers(rows, width, dtype=dtype, seed=seed) for seed in range(3))
    bias, weight, norm_bias = (numbers(width, dtype=dtype, seed=seed) for seed in range(3))
    check(
        lambda *t: bias_dropout_residual_norm(*t, dropout=0.0, eps=1e-12),
        (x, bias, residual, weight, norm_bias),
        grad,
        tolerance,
    )
    check(bias_gelu, (x, bias), grad, tolerance)
    check(lambda *t: bias_dropout_residual(*t, dropout=0.0), (x, bias, residual), grad, tolerance)
    doubled, two_biases = torch.cat([x, residual], -1), torch.cat([bias, weight])
    for activation in ("geglu", "swiglu"):
        check(lambda *t, name=activation: gated_activation(*t, name), (doubled, two_biases), grad, tolerance)
        check(lambda t, name=activation: gated_activation(t, None, name), (doubled,), grad, tolerance)


@pytest.mark.parametrize("has_norm", [True, False])
def test_dropout_drops_the_same_forward_and_backward(has_norm):
    rows, width, dropout = 2048, 768, 0.2
    torch.manual_seed(0)
    x = torch.ones(rows, width, device=GPU, requires_grad=True)
    zeros, ones = torch.zeros(width, device=GPU), torch.ones(width, device=GPU)
    residual, grad = numbers(rows, width).to(GPU), numbers(rows, width, seed=1).to(GPU)

    def run():
        if has_norm:
            return bias_dropout_residual_norm(x, zeros, residual, ones, zeros, dropout=dropout, eps=1e-5)
        return bias_dropout_residual(x, zeros, residual, dropout=dropout)

    out, again = run(), run()
    (of_x,) = torch.autograd.grad(out, x, grad)
    kept = (of_x != 0).float()
    expected = residual + kept / (1 - dropout)
    expected = F.layer_norm(expected, (width,), eps=1e-5) if has_norm else expected
    assert distance(out, expected.cpu()) < 1e-5
    share = kept.mean().item()
    assert abs(share - (1 - dropout)) < 4 * (dropout * (1 - dropout) / kept.numel()) ** 0.5
    assert not torch.equal(out, again)
    torch.manual_seed(0)
    assert torch.equal(out, run())


LENGTHS = {"full": (128,) * 8, "ragged": (40, 3, 17, 16, 1, 30, 127, 128), "one": (7,)}


@pytest.mark.parametrize("has_score_bias", [False, True])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("dtype", "tolerance"), FORMATS)
@pytest.mark.parametrize("name", LENGTHS)
def test_attention(name, dtype, tolerance, window, has_score_bias):
    lengths, heads, size, filling = LENGTHS[name], 4, 32, 5
    leaves = [numbers(sum(lengths) + filling, heads * 3 * size, dtype=dtype), numbers(heads * 3 * size, dtype=dtype)]
    if has_score_bias:
        leaves.append(numbers(heads, max(lengths), max(lengths), dtype=dtype))

    def attend(qkv, bias, score_bias=None):
        sequences = Sequences.of(lengths, qkv.device)
        return self_attention(qkv, bias, sequences, head_size=size, score_bias=score_bias, window=window)

    check(attend, leaves, numbers(len(leaves[0]), heads * size, seed=1), max(tolerance, 1e-4))


def test_attention_drops_shares_of_scores():
    lengths, size = (64,) * 16, 32
    sequences = Sequences.of(lengths, torch.device(GPU))
    qkv = torch.zeros(sum(lengths), 3 * size, device=GPU, dtype=torch.bfloat16)
    qkv[:, 2 * size :] = 1  # all scores are equal and all values one: a row is its share of kept scores
    found = self_attention(qkv, None, sequences, head_size=size, dropout=0.25)
    share = found.float() * 0.75
    assert share.mean().item() == pytest.approx(0.75, abs=0.02) and share.std().item() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "vocab", "hidden"), [(1, 320, 16), (201, 1003, 64), (2464, 30522, 128)])
def test_generator_head(n, vocab, hidden, dtype):
    """With Triton and without, against the CPU's way: samples differ only where a number falls on an edge."""
    torch.manual_seed(n)
    matrices = torch.randn(n, hidden).to(dtype), (torch.randn(vocab, hidden) / 8).to(dtype), torch.randn(vocab) / 4
    matrices[2][-3:] = -math.inf
    targets, uniforms, drawn = torch.randint(vocab - 3, (n,)), torch.rand(n), torch.rand(n, 5)
    grad = torch.randn(n)

    def run(device):
        leaves = [matrix.to(device).requires_grad_() for matrix in matrices]
        given = [each.to(device) for each in (targets, uniforms)]
        output = generator_head(*leaves, *given, negative_uniforms=drawn.to(device))
        return output, torch.autograd.grad(output.loss, leaves, grad.to(device))

    expected, expected_gradients = run("cpu")
    outputs = {"as it runs": run(GPU)}
    for has_triton in (True, False):
        with gpu_branches(triton=has_triton):
            outputs[f"Triton: {has_triton}"] = run(GPU)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for name, (found, gradients) in outputs.items():
        assert distance(found.loss, expected.loss) < tolerance, name
        for field in ("original_logit", "sampled_logit"):
            same = (found.sampled_ids.cpu() == expected.sampled_ids) | (field == "original_logit")
            assert distance(getattr(found, field).cpu()[same], getattr(expected, field)[same]) < tolerance, name
        assert (found.sampled_ids.cpu() == expected.sampled_ids).double().mean() > 0.99, name
        # of tens of thousands of logits some are within a rounding of the target's
        further = (found.original_rank.cpu() - expected.original_rank).abs() > (2 if dtype == torch.float32 else 200)
        assert further.double().mean() < 0.001, name
        assert (found.negatives.cpu() == expected.negatives).all(1).double().mean() > 0.95, name
        assert (found.negatives.cpu() != targets[:, None]).all(), name
        for one, other in zip(gradients, expected_gradients, strict=True):
            assert distance(one, other) < tolerance, name


def test_the_likeliest_token_has_rank_one():
    """Its logit is computed twice, by products of different shapes, whose sums must not differ."""
    torch.manual_seed(0)
    n, vocab, hidden = 4096, 30522, 256
    for dtype in (torch.float32, torch.bfloat16):
        states, weight = torch.randn(n, hidden, dtype=dtype, device=GPU), torch.randn(vocab, hidden, device=GPU)
        weight = (weight / 8).to(dtype)
        bias = torch.zeros(vocab, device=GPU)
        targets = (states @ weight.T).argmax(-1)
        output = generator_head(states, weight, bias, targets, torch.rand(n, device=GPU))
        assert (output.original_rank == 1).double().mean() > 0.999


@pytest.mark.parametrize(("heads", "size"), [(2, 64), (12, 64)])
def test_flash_attention_is_what_runs(heads, size):
    from torch.profiler import ProfilerActivity, profile

    lengths = (512,) * 4
    sequences = Sequences.of(lengths, torch.device(GPU))
    qkv = torch.randn(sum(lengths), heads * 3 * size, device=GPU, dtype=torch.bfloat16)
    self_attention(qkv, None, sequences, head_size=size)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        self_attention(qkv, None, sequences, head_size=size)
        torch.cuda.synchronize()
    names = [event.key for event in profiler.key_averages()]
    assert any("flash" in name.lower() or "fmha" in name.lower() for name in names), names
