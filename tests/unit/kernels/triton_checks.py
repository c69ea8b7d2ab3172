"""Run by test_kernels.py: Triton kernels under the interpreter, and compiled for GPUs that are not there."""

import itertools
import json
import sys
import traceback

import torch
from triton.runtime import JITFunction

from kernel_resources import compiled_kernels, table
from peer_scale.kernels import triton_gated, triton_gelu, triton_norm, triton_residual, triton_vocab
from peer_scale.kernels.availability import gpu_branches
from peer_scale.kernels.gated import gated_activation
from peer_scale.kernels.gelu import bias_gelu
from peer_scale.kernels.norm import bias_dropout_residual_norm
from peer_scale.kernels.residual import bias_dropout_residual
from peer_scale.kernels.vocab_chunk import add_up_blocks, chunk_gradient
from peer_scale.models.generator_head import generator_head
from test_generator_head import problem
from test_kernels import SHAPES, norm_problem

MODULES = triton_gated, triton_gelu, triton_norm, triton_residual, triton_vocab


def same(found, expected, tolerance, what):
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}"
    )


def norm() -> None:
    for shape, (dtype, tolerance) in itertools.product(SHAPES[1:], [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)]):
        tensors = norm_problem(shape, dtype)
        grad = torch.randn(shape).to(dtype)
        twin = bias_dropout_residual_norm(*tensors, dropout=0.0, eps=1e-12)
        found = triton_norm.FusedNorm.apply(*tensors, 0.0, 1e-12)
        same(found, twin, tolerance, f"{shape} {dtype}")
        ours, theirs = torch.autograd.grad(found, tensors, grad), torch.autograd.grad(twin, tensors, grad)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other, tolerance * max(1.0, other.abs().max().item()), f"gradient {shape} {dtype}")


def norm_dropout() -> None:
    torch.manual_seed(0)
    rows, width, dropout = 64, 300, 0.2
    x = torch.ones(rows, width, requires_grad=True)
    zeros, ones = torch.zeros(width), torch.ones(width)
    residual = torch.randn(rows, width)
    out = triton_norm.FusedNorm.apply(x, zeros, residual, ones, zeros, dropout, 1e-5)
    # what is dropped passes no gradient, what is kept passes it scaled
    (grad,) = torch.autograd.grad((out * torch.randn(rows, width)).sum(), x)
    kept = (grad != 0).float()
    expected = torch.nn.functional.layer_norm(residual + kept / (1 - dropout), (width,), ones, zeros, 1e-5)
    same(out, expected, 1e-4, "forward and backward draw the same mask")
    share = kept.mean().item()
    assert abs(share - (1 - dropout)) < 4 * (dropout * (1 - dropout) / kept.numel()) ** 0.5, share
    again = triton_norm.FusedNorm.apply(x, zeros, residual, ones, zeros, dropout, 1e-5)
    assert not torch.equal(out, again)


def gelu() -> None:
    for shape, (dtype, tolerance) in itertools.product(SHAPES, [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)]):
        x, bias = norm_problem(shape, dtype)[:2]
        grad = torch.randn(shape).to(dtype)
        twin, found = bias_gelu(x, bias), triton_gelu.FusedGelu.apply(x, bias)
        same(found, twin, tolerance, f"{shape} {dtype}")
        ours, theirs = torch.autograd.grad(found, (x, bias), grad), torch.autograd.grad(twin, (x, bias), grad)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other, 4 * tolerance, f"gradient {shape} {dtype}")


def gates() -> None:
    for shape, (dtype, tolerance) in itertools.product(SHAPES, [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)]):
        x, bias = (tensor.flatten(0, -2) if tensor.dim() > 1 else tensor for tensor in norm_problem(shape, dtype)[:2])
        x, bias = (torch.cat([tensor, 2 - tensor], -1).detach().requires_grad_() for tensor in (x, bias))
        for activation, leaves in itertools.product(("geglu", "swiglu"), ((x, bias), (x,))):
            grad, given = torch.randn(shape).flatten(0, -2).to(dtype), (*leaves, None)[:2]
            twin = gated_activation(*given, activation)
            with gpu_branches(triton=True):
                found = gated_activation(*given, activation)
            same(found, twin, tolerance, f"{activation} {shape} {dtype}")
            ours, theirs = torch.autograd.grad(found, leaves, grad), torch.autograd.grad(twin, leaves, grad)
            for one, other in zip(ours, theirs, strict=True):
                same(one, other, tolerance * max(1.0, other.abs().max().item()), f"gradient {shape} {dtype}")


def residual() -> None:
    """What is dropped passes no gradient, what is kept passes it scaled."""
    torch.manual_seed(0)
    rows, width, dropout = 70, 300, 0.2
    for has_bias, (dtype, tolerance) in itertools.product(
        (True, False), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
    ):
        x, residual, grad = (torch.randn(rows, width).to(dtype).requires_grad_() for _ in range(3))
        leaves = (x, residual, *([torch.randn(width).to(dtype).requires_grad_()] if has_bias else []))
        bias = leaves[2] if has_bias else None
        with gpu_branches(triton=True):
            out, again = (bias_dropout_residual(x, bias, residual, dropout=dropout) for _ in range(2))
        of_x, of_residual, *of_bias = torch.autograd.grad(out, leaves, grad)
        kept = of_x != 0
        biased = x if bias is None else x + bias
        same(out, residual + torch.where(kept, biased, 0.0) / (1 - dropout), tolerance, "forward")
        same(of_x, torch.where(kept, grad, 0.0) / (1 - dropout), tolerance, "gradient")
        same(of_residual, grad, 0, "gradient of the residual")
        if of_bias:
            same(of_bias[0], of_x.float().sum(0), tolerance * 16, "gradient of the bias")
        share = kept.float().mean().item()
        assert abs(share - (1 - dropout)) < 4 * (dropout * (1 - dropout) / kept.numel()) ** 0.5, share
        assert not torch.equal(out, again)


def chunk() -> None:
    for n, width, dtype in (
        (1, 1, torch.float32),
        (5, 37, torch.float32),
        (200, 300, torch.bfloat16),
        (16, 256, torch.float32),
    ):
        torch.manual_seed(n)
        product = (3 * torch.randn(n, width)).to(dtype)
        bias = torch.randn(width)
        bias[width // 2 + 1 :: 7] = -torch.inf
        reference = product[:, 0].float() + bias[0]
        found = [torch.zeros(n, 9, dtype=torch.float64)[:, 1 : 1 - (-width // 64)] for _ in range(2)]
        counts = [torch.full((n,), 3, dtype=torch.int32) for _ in range(2)]
        for is_triton in (False, True):
            with gpu_branches(triton=is_triton):
                add_up_blocks(product, bias, reference, torch.zeros(n), found[is_triton], counts[is_triton])
        torch.testing.assert_close(*found, rtol=1e-6, atol=0)
        assert torch.equal(*counts)
        log_sum_exp = torch.logsumexp(product.float() + bias, -1)
        columns = torch.randint(-1, width, (n,))
        outs = [torch.empty(n, width, dtype=dtype) for _ in range(2)]
        grad_loss = torch.randn(n)
        room = product.float().clone()
        ours = triton_vocab.gradient(product, bias, log_sum_exp, columns, grad_loss, outs[0])
        theirs = chunk_gradient(
            room if dtype == torch.float32 else product, bias, log_sum_exp, columns, grad_loss, room, outs[1]
        )
        same(outs[0], outs[1], 1e-2 if dtype == torch.bfloat16 else 1e-5, "gradient")
        same(ours, theirs, 1e-4, "bias gradient")


def head() -> None:
    """The whole head with Triton's kernels against the same in plain torch."""
    for n, dtype in ((33, torch.float32), (130, torch.bfloat16)):
        *matrices, targets, uniforms = problem(n, "plain", dtype, vocab=320)
        numbers, outputs = torch.rand(n, 3), []
        for is_triton in (False, True):
            leaves = [matrix.clone().requires_grad_() for matrix in matrices]
            with gpu_branches(triton=is_triton):
                output = generator_head(*leaves, targets, uniforms, chunk_size=128, negative_uniforms=numbers)
                outputs.append((*output, output.negatives, *torch.autograd.grad(output.loss.sum(), leaves)))
        for twin, found in zip(*outputs, strict=True):
            same(found, twin, 2e-2 if found.dtype == torch.bfloat16 else 1e-5, "head")


def compile(*dtypes: str) -> str:
    """Every kernel to machine code for sm_80, sm_90 and sm_100, within what these have."""
    done = list(compiled_kernels((80, 90, 100), dtypes))
    assert all(each.fits for each in done), table(done)
    kernels = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.__module__ == module.__name__  # what kernels call is imported
    }
    assert {each.kernel for each in done} == kernels, "each kernel, and no other"
    assert len(done) == 3 * len(dtypes) * len(kernels)
    return f"{len(done)} compilations"


INTERPRETED = norm, norm_dropout, residual, gelu, gates, chunk, head


def main() -> None:
    """Compile for the types that are named; without any, run each check: a line of JSON for all, None for success."""
    if sys.argv[1:]:
        print(compile(*sys.argv[1:]))
        return
    found: dict[str, str | None] = {}
    for check in INTERPRETED:
        try:
            check()
            found[check.__name__] = None
        except Exception:
            found[check.__name__] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
