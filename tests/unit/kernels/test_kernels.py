"""Fused kernels: the CPU's against the composition in fp64, Triton's (interpreted) against the CPU's, and compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from peer_scale.kernels.availability import fused_kernels
from peer_scale.kernels.gelu import bias_gelu
from peer_scale.kernels.norm import bias_dropout_residual_norm

pytestmark = pytest.mark.heavy

SHAPES = [(1, 1), (3, 7), (5, 2, 100), (17, 257), (70, 100), (2, 3, 768)]


def norm_problem(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = shape[-1]
    tensors = [torch.randn(s, generator=generator) for s in (shape, (width,), shape, (width,), (width,))]
    return [t.to(dtype).requires_grad_() for t in tensors]


def composed_norm(x, bias, residual, weight, norm_bias):
    summed = residual.double() + x.double() + bias.double()
    return F.layer_norm(summed, weight.shape, weight.double(), norm_bias.double(), 1e-12)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[-1] > 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.bfloat16, 6e-2)])
def test_norm_and_its_gradients(shape, dtype, tolerance):
    tensors = norm_problem(shape, dtype)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    found = bias_dropout_residual_norm(*tensors, dropout=0.0, eps=1e-12)
    expected = composed_norm(*tensors)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad(found, tensors, grad)
    theirs = torch.autograd.grad(expected, tensors, grad.double())
    for mine, other in zip(ours, theirs, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(mine.double(), other.double(), rtol=tolerance, atol=tolerance * max(1, scale))


def test_norm_under_dropout():
    tensors = [t.detach().double().requires_grad_() for t in norm_problem((4, 6))]

    def seeded(*tensors):
        torch.manual_seed(5)
        return bias_dropout_residual_norm(*tensors, dropout=0.4, eps=1e-5)

    assert torch.autograd.gradcheck(seeded, tensors, eps=1e-6, atol=1e-5)
    first = bias_dropout_residual_norm(*tensors, dropout=0.4, eps=1e-5)
    second = bias_dropout_residual_norm(*tensors, dropout=0.4, eps=1e-5)
    assert not torch.equal(first, second)


def test_recomputation_draws_the_same_mask():
    tensors = norm_problem((16, 32))

    def layer(*tensors):
        return bias_dropout_residual_norm(*tensors, dropout=0.3, eps=1e-5)

    torch.manual_seed(1)
    plain = torch.autograd.grad(layer(*tensors).square().sum(), tensors)
    torch.manual_seed(1)
    recomputed = torch.autograd.grad(checkpoint(layer, *tensors, use_reentrant=False).square().sum(), tensors)
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_gelu_and_its_gradients(shape, dtype, tolerance):
    x, bias = norm_problem(shape, dtype)[:2]
    expected = F.gelu(x.double() + bias.double())
    found = bias_gelu(x, bias)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    ours = torch.autograd.grad(found, (x, bias), grad)
    theirs = torch.autograd.grad(expected, (x, bias), grad.double())
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other.double(), rtol=5 * tolerance, atol=20 * tolerance)


def test_what_runs_is_said():
    on_cpu, on_gpu = fused_kernels(torch.device("cpu")), fused_kernels(torch.device("cuda"))
    assert on_cpu.keys() == on_gpu.keys()
    assert "CPU" in on_cpu["generator head"] and "streaming" in on_gpu["generator head"]


def run_triton_checks(*dtypes, interpret):
    """In a process of its own: Triton decides at its import whether it interprets."""
    pytest.importorskip("triton")
    script = Path(__file__).parent / "triton_checks.py"
    root = script.parents[3]
    folders = (root, root / "tests", root / "tests/unit/models", root / "tools")
    environment = {"TRITON_INTERPRET": str(int(interpret)), "PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run(
        [sys.executable, str(script), *dtypes],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def interpreted():
    return json.loads(run_triton_checks(interpret=True))


@pytest.mark.parametrize("check", ["norm", "norm_dropout", "residual", "gelu", "gates", "chunk", "head"])
def test_triton_kernels_interpreted(check, interpreted):
    assert interpreted[check] is None, interpreted[check]


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_triton_kernels_compiled(dtype):
    assert run_triton_checks(dtype, interpret=False) == "30 compilations"
