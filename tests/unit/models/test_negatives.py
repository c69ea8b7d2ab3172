"""Negatives drawn beside the sample: their law, what may never be among them, and that the layout does not matter."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from peer_scale.models.generator_head import DRAW_REDUCED_BYTES, EXCLUSION_REDUCED_BYTES, generator_head
from test_generator_head import DTYPES, VOCAB, Traffic, problem

pytestmark = pytest.mark.heavy

DRAWS = 50_000
SURE = 40.0  # a logit beside which all others weigh nothing in fp32
LAWS = {  # logits, target, k
    "pairs": ([0, 1, -1, 0.5, 2, -0.5, 1.5, 0, -2, 0.25, 1, -1], 4, 2),
    "triples": ([1, -0.5, 0.5, 0, 2, -1, 1, 0.5], 2, 3),
    "all others": ([0.5, -0.5, 1, 0, 1.5], 1, 4),
    "all others but padding": ([0.5, -0.5, 1, 0, 1.5, -math.inf, -math.inf], 3, 4),
    "target sure": ([0.5, -0.5, 1, 0, SURE, 1.5, -1], 4, 4),
    "others at the grid's limit": ([0.5, -0.5, 1, 0, 11, 1.5, -1], 4, 4),
    "negative sure": ([0.5, SURE, 1, 0, -0.5, 1.5, -1], 4, 4),
    "negative and target sure": ([0.5, SURE, 1, 0, SURE, 1.5, -1], 4, 4),
    "two negatives sure": ([0.5, SURE, 1, SURE - 1, -0.5, 1.5, -1, 0], 4, 4),
    "others at the limit of fp64's digits": ([6.5, 41.3, 7, 6, -0.5, 7.5, 5, 0], 4, 3),
    "one surer than the other": ([0.5, SURE, 2 * SURE, 0, 3 * SURE, 1.5, -1], 4, 4),
    "target as good as impossible": ([0.5, -0.5, 1, 0, -SURE, 1.5, -1], 4, 4),
    "negatives beyond fp32's powers": ([0.5, -0.5, 1, 0, -2 * SURE, 1.5, -1], 4, 4),
}


def plackett_luce(logits, target, k):
    """Probability of each ordered k-tuple of tokens other than the target, drawn one after the other."""
    others = [token for token in range(len(logits)) if token != target and math.isfinite(logits[token])]
    tuples = np.array(list(itertools.permutations(others, k)))
    probabilities = np.ones(len(tuples))
    left = np.zeros((len(tuples), len(logits)), bool)
    left[:, others] = True
    for drawn in tuples.T:
        remaining = np.where(left, np.array(logits, float), -np.inf)
        shares = np.exp(remaining - remaining.max(1, keepdims=True))
        row = np.arange(len(tuples))
        probabilities *= shares[row, drawn] / shares.sum(1)
        left[row, drawn] = False
    return tuples, probabilities


def p_value(negatives, law):
    """Of the chi-square test that the rows of `negatives` follow the law; tuples that are too rare are taken as one."""
    tuples, probabilities = law
    base = (1 + tuples.max()) ** np.arange(tuples.shape[1])
    known, drawn = tuples @ base, negatives @ base
    order = np.argsort(known)
    place = np.searchsorted(known[order], drawn).clip(max=len(known) - 1)
    assert (known[order][place] == drawn).all(), "the target, a padding row, or one token twice"
    counts = np.bincount(order[place], minlength=len(known))
    expected = probabilities * len(negatives)
    rare = expected < 5
    if expected[rare].sum() >= 5:
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    else:
        assert counts[rare].sum() < 25
        counts, expected = counts[~rare], expected[~rare]
    statistic, degrees = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    return torch.special.gammaincc(torch.tensor(degrees / 2), torch.tensor(statistic / 2)).item()


def draw(logits, target, k, chunk_size, dtype=torch.float32):
    """Rows of k negatives for a position whose logits are a product's, but for padding: these are halves in bf16."""
    uniforms = torch.rand(DRAWS, k, generator=torch.Generator().manual_seed(0))
    logits = torch.tensor(logits)
    weight = logits.nan_to_num(neginf=0)[:, None].to(dtype)
    bias = torch.where(logits.isfinite(), 0.0, -math.inf)
    hidden, targets = torch.ones(DRAWS, 1, dtype=dtype), torch.full((DRAWS,), target)
    output = generator_head(
        hidden, weight, bias, targets, uniforms[:, 0], chunk_size=chunk_size, negative_uniforms=uniforms
    )
    return output.negatives.numpy()


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("law", LAWS)
def test_law_of_ordered_tuples(law, chunk_size):
    logits, target, k = LAWS[law]
    assert p_value(draw(logits, target, k, chunk_size), plackett_luce(logits, target, k)) > 1e-3


@pytest.mark.parametrize("law", ["triples", "target sure", "negative sure"])
def test_law_in_bf16(law):
    logits, target, k = LAWS[law]
    assert p_value(draw(logits, target, k, None, torch.bfloat16), plackett_luce(logits, target, k)) > 1e-3


def test_the_bound_would_reject_a_wrong_law():
    logits, target, k = LAWS["triples"]
    negatives = draw(logits, target, k, None)
    tuples, probabilities = plackett_luce(logits, target, k)
    shares = np.exp(logits)
    independent = shares[tuples].prod(1)  # each as if the others had not been taken out
    assert p_value(negatives, (tuples, independent / independent.sum())) < 1e-9
    assert p_value(negatives[:, ::-1], (tuples, probabilities)) < 1e-9
    raised = [*logits[:-1], logits[-1] + 0.1]
    assert p_value(negatives, plackett_luce(raised, target, k)) < 1e-6


def planted(name, n, dtype):
    """A problem of test_generator_head with sure tokens; where the target is one of them it is so at all positions."""
    kind, _, sure = name.partition("+")
    hidden, weight, bias, targets, uniforms = problem(n, kind, dtype)
    if sure in ("target", "both"):
        targets[:] = 9
        bias[9] += SURE
    if sure in ("negative", "both"):
        bias[12] += SURE
    return hidden, weight, bias, targets, uniforms


CASES = ("plain", "ties", "equal", "huge", "plain+target", "ties+negative", "plain+both")
K = 5


def run_head(tensors, chunk_size=None, group=None, k=K):
    *leaves, targets, uniforms = tensors
    negative_uniforms = torch.rand(len(targets), k, generator=torch.Generator().manual_seed(1))
    output = generator_head(
        *leaves, targets, uniforms, group=group, chunk_size=chunk_size, negative_uniforms=negative_uniforms
    )
    return output.negatives, negative_uniforms


def one_after_the_other(tensors, uniforms):
    """Negatives by inverse CDF in float64, and where they are certain: not where a number falls between two tokens."""
    hidden, weight, bias, targets, _ = tensors
    logits = ((hidden.double() @ weight.double().T).to(hidden.dtype).float() + bias).double().numpy()
    rows = np.arange(len(targets))
    logits[rows, targets.numpy()] = -np.inf
    is_clear, negatives, clear = np.ones(len(targets), bool), [], []
    for column in uniforms.double().numpy().T:
        shares = np.exp(logits - logits.max(1, keepdims=True))
        ends = shares.cumsum(1) / shares.sum(1, keepdims=True)
        drawn = (ends <= column[:, None]).sum(1)
        is_clear = is_clear & (np.abs(ends - column[:, None]).min(1) > 2e-5)  # of what comes after, nothing is certain
        logits[rows, drawn] = -np.inf
        negatives.append(drawn)
        clear.append(is_clear)
    return np.stack(negatives, 1), np.stack(clear, 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_draw(case, dtype):
    tensors = planted(case, 96, dtype)
    expected, is_clear = one_after_the_other(tensors, run_head(tensors)[1])
    assert is_clear.mean() > 0.95
    first = None
    for chunk_size in (None, 1, 7, 16, VOCAB):
        negatives, _ = run_head(tensors, chunk_size)
        np.testing.assert_array_equal(negatives.numpy()[is_clear], expected[is_clear])
        first = negatives if first is None else first
        assert torch.equal(negatives, first)


def sharded_heads(cases, chunk_sizes):
    rank, size = dist.get_rank(), dist.get_world_size()
    results = {}
    for case, dtype, chunk_size in itertools.product(cases, DTYPES, chunk_sizes):
        hidden, weight, bias, targets, uniforms = planted(case, 96, dtype)
        shard = hidden, weight.chunk(size)[rank], bias.chunk(size)[rank], targets, uniforms
        results[case, dtype, chunk_size] = run_head(shard, chunk_size, dist.group.WORLD)[0]
    return results


@pytest.mark.heavy
@pytest.mark.parametrize("pool", ["two_ranks", "four_ranks"])
def test_over_shards(pool, request):
    """The same bits whatever the number of shards and the size of chunks."""
    for of_rank in request.getfixturevalue(pool).run(sharded_heads, CASES, (None, 5)):
        assert len(of_rank) == 4 * len(CASES)
        for (case, dtype, chunk_size), negatives in of_rank.items():
            assert torch.equal(negatives, run_head(planted(case, 96, dtype))[0]), (case, dtype, chunk_size)


@pytest.mark.parametrize("scale", [0.1, 1, 10])
@pytest.mark.parametrize("dtype", DTYPES)
def test_never_the_target_nor_padding_nor_one_twice(dtype, scale):
    torch.manual_seed(0)
    n, vocab, real, k = 401, 1024, 1003, 12
    hidden, weight = torch.randn(n, 64).to(dtype), (torch.randn(vocab, 64) * scale).to(dtype)
    bias = torch.randn(vocab)
    bias[real:] = -math.inf
    targets, uniforms = torch.randint(real, (n,)), torch.rand(n)
    for chunk_size in (None, 100):
        negatives, _ = run_head((hidden, weight, bias, targets, uniforms), chunk_size, k=k)
        rows = torch.cat([targets[:, None], negatives], 1).sort(1).values
        assert (rows[:, 1:] != rows[:, :-1]).all()
        assert rows.min() >= 0 and rows.max() < real


@pytest.mark.parametrize("case", CASES)
def test_all_tokens_but_the_target(case):
    """The smallest vocabulary: each real token comes once."""
    tensors = planted(case, 40, torch.float32)
    real = set(tensors[2].isfinite().nonzero().flatten().tolist())
    for chunk_size in (None, 7):
        negatives, _ = run_head(tensors, chunk_size, k=len(real) - 1)
        for row, target in zip(negatives.tolist(), tensors[3].tolist(), strict=True):
            assert len(row) == len(real) - 1
            assert {*row, target} == real


def test_no_positions_and_no_negatives():
    assert run_head(problem(0))[0].shape == (0, K)
    assert run_head(problem(3), k=0)[0].shape == (3, 0)


def test_the_rest_of_the_output_is_what_it_was():
    *matrices, targets, uniforms = problem(96)
    outputs, gradients = [], []
    for negative_uniforms in (None, torch.rand(96, K)):
        leaves = [matrix.clone().requires_grad_() for matrix in matrices]
        output = generator_head(*leaves, targets, uniforms, negative_uniforms=negative_uniforms)
        gradients.append(torch.autograd.grad(output.loss.square().sum(), leaves))
        outputs.append(output)
    plain, drawn = outputs
    assert plain.negatives is None and not drawn.negatives.requires_grad
    assert len(plain) == len(drawn) == 5  # callers may unpack it
    for one, other in zip((*plain, *gradients[0]), (*drawn, *gradients[1]), strict=True):
        assert torch.equal(one, other)


def bytes_of_negatives(n):
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, bias, targets, uniforms = problem(n)
    shard = hidden, weight.chunk(size)[rank], bias.chunk(size)[rank], targets, uniforms
    counts = []
    for negative_uniforms in (None, torch.rand(n, K, generator=torch.Generator().manual_seed(0))):
        with Traffic() as traffic:
            generator_head(*shard, group=dist.group.WORLD, negative_uniforms=negative_uniforms)
        counts.append(traffic.sent)
    return counts[1] - counts[0]


def test_bytes_sent_by_a_rank(two_ranks):
    assert two_ranks.run(bytes_of_negatives, 37) == [37 * (EXCLUSION_REDUCED_BYTES + K * DRAW_REDUCED_BYTES)] * 2
