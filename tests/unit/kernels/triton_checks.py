"""Run by test_kernels.py: Triton kernels under the interpreter, and compiled for GPUs that are not there."""

import itertools
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peer_scale.kernels import triton_gelu, triton_norm, triton_vocab
from peer_scale.kernels.availability import gpu_branches
from peer_scale.kernels.gelu import bias_gelu
from peer_scale.kernels.norm import bias_dropout_residual_norm
from peer_scale.kernels.vocab_chunk import add_up_blocks, chunk_gradient
from peer_scale.models.generator_head import generator_head
from test_generator_head import problem
from test_kernels import SHAPES, norm_problem


def same(found, expected, tolerance, what):
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}"
    )


def norm() -> str:
    for shape, (dtype, tolerance) in itertools.product(SHAPES[1:], [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)]):
        tensors = norm_problem(shape, dtype)
        grad = torch.randn(shape).to(dtype)
        twin = bias_dropout_residual_norm(*tensors, dropout=0.0, eps=1e-12)
        found = triton_norm.FusedNorm.apply(*tensors, 0.0, 1e-12)
        same(found, twin, tolerance, f"{shape} {dtype}")
        ours, theirs = torch.autograd.grad(found, tensors, grad), torch.autograd.grad(twin, tensors, grad)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other, tolerance * max(1.0, other.abs().max().item()), f"gradient {shape} {dtype}")
    return f"{len(SHAPES) - 1} shapes"


def norm_dropout() -> str:
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
    return f"kept {share:.3f}"


def gelu() -> str:
    for shape, (dtype, tolerance) in itertools.product(SHAPES, [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)]):
        x, bias = norm_problem(shape, dtype)[:2]
        grad = torch.randn(shape).to(dtype)
        twin, found = bias_gelu(x, bias), triton_gelu.FusedGelu.apply(x, bias)
        same(found, twin, tolerance, f"{shape} {dtype}")
        ours, theirs = torch.autograd.grad(found, (x, bias), grad), torch.autograd.grad(twin, (x, bias), grad)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other, 4 * tolerance, f"gradient {shape} {dtype}")
    return f"{len(SHAPES)} shapes"


def chunk() -> str:
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
    return "4 sizes"


def head() -> str:
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
    return "2 problems"


def _signatures(low: str) -> list[tuple]:
    """Each kernel with its arguments' types, `low` being that of its main tensors, and its constants."""
    one, sizes = "*fp32", ["i32", "i32"]
    norm_sizes = {"BLOCK": 1024, "HAS_DROPOUT": True}
    tile, gradient_tile = {"ROWS": 32, "COLUMNS": 128}, {"POSITIONS": 32, "COLUMNS": 128, "TILES": 4}
    norm_backward = [low, low, one, one, low, low, low, one, "i32", *sizes, "fp32", "*i64"]
    return [
        (triton_norm.norm_forward, [*[low] * 7, one, one, "i32", "fp32", "fp32", "*i64"], norm_sizes),
        (triton_norm.norm_backward, norm_backward, {"BLOCK": 1024, "ROWS": 16, "HAS_DROPOUT": True}),
        (triton_gelu.gelu_forward, [low, low, low, *sizes], tile),
        (triton_gelu.gelu_backward, [low, low, low, low, one, *sizes], tile),
        (
            triton_vocab.add_up_kernel,
            [low, one, one, one, "*fp64", "*i32", *sizes, "i32"],
            {"POSITIONS": 32, "COLUMNS": 64},
        ),
        (triton_vocab.gradient_kernel, [low, one, one, "*i64", one, low, one, *sizes], gradient_tile),
    ]


def compile() -> str:
    """Every kernel to machine code for sm_80, sm_90 and sm_100, in bf16 and fp32."""
    done = []
    for capability, low in itertools.product((80, 90, 100), ("bf16", "fp32")):
        for kernel, types, constants in _signatures(f"*{low}"):
            names = kernel.arg_names
            signature = dict(zip(names, types + ["constexpr"] * len(constants), strict=True))
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert f"sm_{capability}" in compiled.asm["ptx"], "compiled for another target"
            assert len(compiled.asm["cubin"]) > 1000
            done.append(kernel.__name__)
    return f"{len(done)} compilations"


if __name__ == "__main__":
    name = sys.argv[1]
    print(f"{name}: {globals()[name]()}")
