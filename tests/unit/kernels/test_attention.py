"""Attention within sequences against an fp64 softmax written out, both ways of computing it, and dropout."""

import pytest
import torch

from peer_scale.kernels.attention import padded_attention, self_attention
from peer_scale.kernels.dropout import keep_mask
from peer_scale.kernels.grouped_attention import groups_of_like_length
from peer_scale.sequences import Sequences

N, D = 2, 5
LENGTHS = {"equal": (9, 9, 9), "like": (12, 11, 11, 9), "unequal": (40, 3, 17, 16, 1, 30, 30), "one": (7,)}
FILL = 3  # rows beyond the tokens, as sequence parallelism has them


def written_out(qkv, bias, lengths, score_bias=None, window=None):
    biased = (qkv + bias).double().view(len(qkv), N, 3, D)
    contexts = []
    for tokens in biased[: sum(lengths)].split(lengths):
        query, key, value = (each.transpose(0, 1) for each in tokens.unbind(2))
        scores = query @ key.transpose(1, 2) / D**0.5
        length = len(tokens)
        if score_bias is not None:
            scores = scores + score_bias[:, :length, :length]
        if window is not None:
            places = torch.arange(length)
            scores = scores.masked_fill((places[:, None] - places).abs() > window // 2, -torch.inf)
        contexts.append((scores.softmax(-1) @ value).transpose(0, 1).reshape(length, N * D))
    return torch.cat([*contexts, torch.zeros(len(qkv) - sum(lengths), N * D, dtype=torch.float64)])


def problem(lengths, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(sum(lengths) + FILL, N * 3 * D, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(N * 3 * D, generator=generator).to(dtype).requires_grad_()
    score_bias = torch.randn(N, max(lengths), max(lengths), generator=generator).to(dtype).requires_grad_()
    return qkv, bias, score_bias


def padded(qkv, bias, sequences, *, head_size, score_bias=None, window=None):
    query, key, value = (qkv + bias)[: sequences.num_tokens].view(sequences.num_tokens, N, 3, head_size).unbind(2)
    context = padded_attention(query, key, value, sequences, score_bias=score_bias, window=window).flatten(1)
    return torch.nn.functional.pad(context, (0, 0, 0, len(qkv) - len(context)))


@pytest.mark.parametrize("way", [self_attention, padded])
@pytest.mark.parametrize(("has_score_bias", "window"), [(False, None), (True, None), (False, 6), (True, 6)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", LENGTHS)
def test_output_and_gradients(name, dtype, tolerance, has_score_bias, window, way):
    lengths = LENGTHS[name]
    qkv, bias, score_bias = problem(lengths, dtype)
    score_bias = score_bias if has_score_bias else None
    grad = torch.randn(len(qkv), N * D, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = way(qkv, bias, Sequences.of(lengths), head_size=D, score_bias=score_bias, window=window)
    expected = written_out(qkv, bias, lengths, score_bias, window)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    leaves = [each for each in (qkv, bias, score_bias) if each is not None]
    grads = torch.autograd.grad(found, leaves, grad)
    expected_grads = torch.autograd.grad(expected, leaves, grad.double())
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=8 * tolerance, atol=8 * tolerance)


def test_without_a_bias():
    qkv, bias, _ = problem((9, 4))
    biased = (qkv + bias).detach()
    found = self_attention(biased, None, Sequences.of((9, 4)), head_size=D)
    torch.testing.assert_close(found, self_attention(qkv, bias, Sequences.of((9, 4)), head_size=D))


@pytest.mark.heavy
def test_gradients_under_dropout_belong_to_the_mask_that_was_drawn():
    qkv, bias, score_bias = (t.detach().double().requires_grad_() for t in problem((5, 4, 2)))

    def with_fixed_seed(qkv, bias, score_bias):
        torch.manual_seed(11)
        return self_attention(qkv, bias, Sequences.of((5, 4, 2)), head_size=D, dropout=0.3, score_bias=score_bias)

    # the score bias's gradient is added up in fp32
    assert torch.autograd.gradcheck(with_fixed_seed, (qkv, bias, score_bias), eps=1e-4, atol=1e-4)


def test_dropout_keeps_the_mean():
    qkv, bias, _ = problem((9, 8, 3))
    sequences = Sequences.of((9, 8, 3))
    torch.manual_seed(1)
    mean = sum(self_attention(qkv, bias, sequences, head_size=D, dropout=0.2).detach() for _ in range(4000)) / 4000
    torch.testing.assert_close(mean, self_attention(qkv, bias, sequences, head_size=D).detach(), atol=0.06, rtol=0)


def test_groups_hold_every_token_once_and_little_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = tuple(sorted(torch.randint(3, 512, (64,), generator=generator).tolist(), reverse=True))
    groups = groups_of_like_length(lengths)
    tokens = [token for group in groups for run in group.runs for token in range(run.begin, run.end)]
    assert tokens == list(range(sum(lengths)))
    assert sum(group.size for group in groups) == 64
    assert sum(group.size * group.length**2 for group in groups) < 1.25 * sum(length**2 for length in lengths)
    assert len(groups_of_like_length((128,) * 32)) == 1


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
