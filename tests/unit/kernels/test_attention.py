"""The CPU's attention against an fp64 softmax written out, and its dropout."""

import pytest
import torch

from peer_scale.kernels.attention import self_attention
from peer_scale.kernels.dropout import keep_mask

S, B, N, D = 9, 3, 2, 5


def written_out(qkv, bias, mask):
    qkv = (qkv + bias).double().view(S, B, N, 3, D)
    context = torch.zeros(S, B, N, D, dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            query, key, value = qkv[:, b, n].unbind(1)
            scores = query @ key.T / D**0.5
            if mask is not None:
                scores[:, ~mask[b]] = -torch.inf
            context[:, b, n] = scores.softmax(-1) @ value
    return context.view(S, B, N * D)


def problem(dtype):
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(S, B, N * 3 * D, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(N * 3 * D, generator=generator).to(dtype).requires_grad_()
    mask = torch.rand(B, S, generator=generator) < 0.7
    mask[:, 0] = True
    return qkv, bias, mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_output_and_gradients(masked, dtype, tolerance):
    qkv, bias, mask = problem(dtype)
    mask = mask if masked else None
    grad = torch.randn(S, B, N * D, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = self_attention(qkv, bias, mask, head_size=D)
    expected = written_out(qkv, bias, mask)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad(found, (qkv, bias), grad)
    expected_grads = torch.autograd.grad(expected, (qkv, bias), grad.double())
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=5 * tolerance, atol=5 * tolerance)


@pytest.mark.heavy
def test_gradients_under_dropout_belong_to_the_mask_that_was_drawn():
    torch.manual_seed(0)
    qkv, bias, mask = (t.double() if t.is_floating_point() else t for t in problem(torch.float32))
    qkv, bias = qkv.detach().requires_grad_(), bias.detach().requires_grad_()

    def with_fixed_seed(qkv, bias):
        torch.manual_seed(11)
        return self_attention(qkv, bias, mask, head_size=D, dropout=0.3)

    assert torch.autograd.gradcheck(with_fixed_seed, (qkv, bias), eps=1e-6, atol=1e-5)


def test_dropout_keeps_the_mean():
    qkv, bias, mask = problem(torch.float32)
    torch.manual_seed(1)
    mean = sum(self_attention(qkv, bias, mask, head_size=D, dropout=0.2).detach() for _ in range(4000)) / 4000
    torch.testing.assert_close(mean, self_attention(qkv, bias, mask, head_size=D).detach(), atol=0.06, rtol=0)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.003])
def test_the_mask_keeps_its_share(dropout):
    torch.manual_seed(2)
    mask = keep_mask((999, 1001), dropout, torch.bfloat16)
    assert mask.dtype == torch.bfloat16 and set(mask.unique().tolist()) == {0.0, 1.0}
    share = mask.float().mean().item()
    spread = (dropout * (1 - dropout) / mask.numel()) ** 0.5
    assert abs(share - (1 - dropout)) < 4 * spread + 2**-17
    other = keep_mask((999, 1001), dropout, torch.bfloat16)
    agreement = (mask == other).float().mean().item()  # of independent draws
    assert agreement == pytest.approx(dropout**2 + (1 - dropout) ** 2, abs=5e-3)
