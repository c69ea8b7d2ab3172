"""The generator head against float64 numpy, alone and over vocabulary shards; its memory and its messages."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from bench_memory import working_memory
from peer_scale.models.generator_head import generator_head
from rank_pool import RankPool

KINDS = ("plain", "ties", "equal", "huge")
DTYPES = (torch.float32, torch.bfloat16)
VOCAB, PADDING, HIDDEN = 64, 19, 16  # over four shards the last has nothing but padding
DISCRETE = ("sampled_ids", "original_rank")


def problem(n, kind="plain", dtype=torch.float32, vocab=VOCAB, padding=PADDING, seed=0):
    """Multiples of 1/8 (1/2 for ties): their products are exact in any order, so the oracle's logits are the head's."""
    rng = np.random.default_rng(seed)
    step, top = (2, 1) if kind == "ties" else (8, 12)
    hidden = rng.integers(-top, top + 1, (n, HIDDEN)) / step
    weight = rng.integers(-top, top + 1, (vocab, HIDDEN)) / step
    weight *= {"equal": 0, "huge": 8}.get(kind, 1)
    bias = np.zeros(vocab, np.float32) if kind != "plain" else rng.normal(0, 0.3, vocab).astype(np.float32)
    if kind == "huge":  # the first half of the tokens is as good as impossible, or as good as certain
        bias[: vocab // 2] -= 200
        bias[vocab // 4 : vocab // 2] += 400
    targets = rng.integers(1, vocab - padding, n)
    weight[7], bias[7] = weight[3], bias[3]  # two tokens that always tie
    targets[: n // 4] = 3
    bias[0] = -np.inf
    bias[vocab - padding :] = -np.inf
    uniforms = rng.random(n).astype(np.float32)
    uniforms[:1], uniforms[1:2] = 0, np.nextafter(np.float32(1), np.float32(0))
    if kind == "equal":  # 16 tokens, none of them in the first of four shards; uniforms exactly on their edges
        bias[:20] = bias[36:] = -np.inf
        targets, uniforms = rng.integers(20, 36, n), (rng.integers(0, 16, n) / 16).astype(np.float32)
    tensors = [torch.from_numpy(np.asarray(a)) for a in (hidden, weight, bias, targets, uniforms)]
    return [tensors[0].to(dtype), tensors[1].to(dtype), *tensors[2:]]


class Oracle:
    """What the head should give, in float64 from the very logits that a product in `hidden`'s format gives."""

    def __init__(self, hidden, weight, bias, targets, uniforms):
        exact = (hidden.double() @ weight.double().T).to(hidden.dtype)
        self.logits = (exact.float() + bias).double().numpy()
        self.hidden, self.weight = hidden.double().numpy(), weight.double().numpy()
        self.targets, uniforms = targets.numpy(), uniforms.double().numpy()
        rows = np.arange(len(targets))
        top = self.logits.max(1, initial=-np.inf, keepdims=True)
        exp = np.exp(self.logits - top)
        self.probabilities = exp / exp.sum(1, keepdims=True)
        self.original_logit = self.logits[rows, self.targets]
        self.loss = np.log(exp.sum(1)) + top[:, 0] - self.original_logit
        self.original_rank = 1 + (self.logits > self.original_logit[:, None]).sum(1)
        # weights are multiples of 2**-34 of the target's or the greatest: what is less than half of that has none
        kept = np.where(self.probabilities < 2.0**-35, 0, self.probabilities)
        self.ends = kept.cumsum(1)
        self.uniforms = uniforms
        self.sampled_ids = (self.ends <= uniforms[:, None]).sum(1)
        # near an edge the last bits decide, but equal shares are exact, and zero is before the first
        is_equal = (self.probabilities == self.probabilities.max(1, initial=0, keepdims=True)).sum(1) == 16
        near_edge = np.abs(self.ends - uniforms[:, None]).min(1, initial=1) < 1e-6
        self.is_clear = ~near_edge | is_equal | (uniforms == 0)

    def check(self, fields):
        loss, sampled_ids, original_logit, sampled_logit, original_rank = (f.detach().numpy() for f in fields)
        np.testing.assert_allclose(loss, self.loss, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(original_rank, self.original_rank)
        np.testing.assert_array_equal(original_logit, self.original_logit)
        rows = np.arange(len(loss))
        assert len(loss) <= 2 or self.is_clear.mean() > 0.95
        np.testing.assert_array_equal(sampled_ids[self.is_clear], self.sampled_ids[self.is_clear])
        np.testing.assert_array_equal(sampled_logit, self.logits[rows, sampled_ids])
        share, end = self.probabilities[rows, sampled_ids], self.ends[rows, sampled_ids]
        assert (share > 2.0**-36).all()
        assert (end - share <= self.uniforms + 1e-6).all() and (self.uniforms <= end + 1e-6).all()

    def check_gradients(self, upstream, of_hidden, of_weight, of_bias, dtype):
        """Each sum's error is bounded by the sum of its terms' sizes times the rounding of the format."""
        eps = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}[dtype]
        eps += 2.0**-23 * np.abs(self.loss + self.original_logit).max(initial=0)  # fp32 logits have no more digits
        grad = self.probabilities.copy()
        grad[np.arange(len(grad)), self.targets] -= 1
        grad *= upstream.double().numpy()[:, None]
        of_logits = np.abs(grad) + np.abs(upstream.double().numpy())[:, None] * self.probabilities
        for found, left, right in (
            (of_hidden, (grad, of_logits), self.weight),
            (of_weight, (grad.T, of_logits.T), self.hidden),
            (of_bias, (grad.T, of_logits.T), np.ones(len(grad))),
        ):
            expected, size = left[0] @ right, left[1] @ np.abs(right)
            assert (np.abs(found.double().numpy() - expected) <= eps * size + 1e-7).all()


def run_head(tensors, chunk_size=None, group=None):
    """Fields, then the gradients of hidden, weight and bias for an uneven upstream gradient."""
    hidden, weight, bias, targets, uniforms = tensors
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    output = generator_head(*leaves, targets, uniforms, chunk_size=chunk_size, group=group)
    gradients = torch.autograd.grad(output.loss, leaves, upstream(len(targets)))
    return type(output)(*(field.detach() for field in output)), gradients


def upstream(n):
    return torch.linspace(0.5, 2, n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 2, 96])
def test_against_the_oracle(n, dtype, kind):
    tensors = problem(n, kind, dtype)
    oracle = Oracle(*tensors)
    reference = None
    for chunk_size in (None, 1, 7, 16, VOCAB):
        output, gradients = run_head(tensors, chunk_size)
        assert output.loss.dtype == torch.float32 and all(field.shape == (n,) for field in output)
        oracle.check(output)
        oracle.check_gradients(upstream(n), *gradients, dtype)
        reference = reference or output
        assert all(torch.equal(one, other) for one, other in zip(output, reference, strict=True))


def sharded_heads(cases, chunk_sizes):
    """Of each case and chunk size: fields and gradients, from this rank's shard."""
    rank, size = dist.get_rank(), dist.get_world_size()
    results = []
    for case in cases:
        hidden, weight, bias, targets, uniforms = problem(*case)
        shard = hidden, weight.chunk(size)[rank], bias.chunk(size)[rank], targets, uniforms
        results += [run_head(shard, chunk_size, dist.group.WORLD) for chunk_size in chunk_sizes]
    return results


@pytest.mark.heavy
@pytest.mark.parametrize("pool", ["one_rank", "two_ranks", "four_ranks"])
def test_over_shards(pool, request):
    """Every field has the same bits whatever the number of shards and the size of chunks."""
    cases = [(0, "plain"), (1, "plain"), *[(96, kind, dtype) for kind in KINDS for dtype in DTYPES]]
    chunk_sizes = (None, 5)
    by_rank = request.getfixturevalue(pool).run(sharded_heads, cases, chunk_sizes)
    by_case = list(zip(*by_rank, strict=True))
    for number, case in enumerate(cases):
        tensors = problem(*case)
        oracle = Oracle(*tensors)
        alone, _ = run_head(tensors)
        for of_ranks in by_case[number * len(chunk_sizes) : (number + 1) * len(chunk_sizes)]:
            for fields, _ in of_ranks:
                oracle.check(fields)
                for name, one, other in zip(fields._fields, fields, alone, strict=True):
                    assert torch.equal(one, other), (case, name)
            of_hidden = of_ranks[0][1][0]
            assert all(torch.equal(gradients[0], of_hidden) for _, gradients in of_ranks)
            joined = [torch.cat([gradients[i] for _, gradients in of_ranks]) for i in (1, 2)]
            oracle.check_gradients(upstream(case[0]), of_hidden, *joined, tensors[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arbitrary_numbers(dtype):
    """Logits that are not exact: what the head says of them agrees with the oracle up to their rounding."""
    torch.manual_seed(0)
    n, vocab, hidden = 201, 1003, 64
    states, weight = torch.randn(n, hidden).to(dtype), (torch.randn(vocab, hidden) / 4).to(dtype)
    bias, targets, uniforms = torch.randn(vocab) / 4, torch.randint(vocab, (n,)), torch.rand(n)
    logits = (states.double() @ weight.double().T + bias.double()).numpy()
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7}[dtype] * np.abs(logits).max()
    first = None
    for chunk_size in (None, 100, 17):
        output, _ = run_head((states, weight, bias, targets, uniforms), chunk_size)
        own = logits[np.arange(n), targets]
        np.testing.assert_allclose(output.original_logit, own, atol=tolerance)
        np.testing.assert_allclose(output.loss, np.log(np.exp(logits).sum(1)) - own, atol=2 * tolerance)
        low, high = (1 + (logits > own[:, None] + shift).sum(1) for shift in (2 * tolerance, -2 * tolerance))
        rank = output.original_rank.numpy()
        assert (low <= rank).all() and (rank <= high).all()
        sampled = output.sampled_ids.numpy()
        np.testing.assert_allclose(output.sampled_logit, logits[np.arange(n), sampled], atol=tolerance)
        # the uniform number lies within the sampled token's share, give or take the logits' rounding
        ends = np.exp(logits).cumsum(1) / np.exp(logits).sum(1, keepdims=True)
        below = np.where(sampled > 0, ends[np.arange(n), sampled - 1], 0)
        assert (below - 2 * tolerance <= uniforms.numpy()).all()
        assert (uniforms.numpy() <= ends[np.arange(n), sampled] + 2 * tolerance).all()
        first = first or output
        assert all(torch.equal(getattr(output, name), getattr(first, name)) for name in DISCRETE)


def test_tokens_of_little_weight_add_up():
    vocab = 4096
    bias = torch.full((vocab,), -16.0)
    bias[5] = 0
    total = 1 + (vocab - 1) * np.exp(-16)
    wanted = torch.tensor([2, 5, 1000, 4000])
    uniforms = torch.where(wanted < 5, wanted + 0.5, wanted - 0.5).mul(np.exp(-16)).add((wanted > 5) * 1.0).div(total)
    uniforms[1] = 0.5
    output = generator_head(torch.ones(4, 1), torch.zeros(vocab, 1), bias, torch.full((4,), 5), uniforms.float())
    torch.testing.assert_close(output.loss, torch.full((4,), np.log(total)), rtol=0, atol=1e-6, check_dtype=False)
    assert (output.sampled_ids - wanted).abs().max() < 3  # fp32 places a uniform near 1 to half of such a share


@pytest.mark.heavy
@pytest.mark.parametrize("chunk_size", [None, 16])
def test_sampled_frequencies_are_the_softmax(chunk_size):
    state, weight, bias, _, _ = problem(1)
    probabilities = Oracle(state, weight, bias, torch.ones(1, dtype=torch.long), torch.zeros(1)).probabilities[0]
    draws, block = 1_000_000, 50_000
    random = torch.rand(draws, generator=torch.Generator().manual_seed(1))
    even = (torch.arange(draws, dtype=torch.float64) + 0.5).div(draws).float()
    counts = []
    for uniforms in (random, even):
        sampled = [
            generator_head(
                state.expand(block, -1), weight, bias, torch.ones(block, dtype=torch.long), u, chunk_size=chunk_size
            ).sampled_ids
            for u in uniforms.split(block)
        ]
        counts.append(torch.bincount(torch.cat(sampled), minlength=VOCAB).numpy())
    expected = probabilities * draws
    usual = expected > 5
    statistic = ((counts[0] - expected)[usual] ** 2 / expected[usual]).sum()
    degrees = usual.sum() - 1
    assert abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5  # five standard deviations of chi-square
    # evenly spaced numbers: at most one more or less at each end of a token's share, as near as fp32 can space them
    assert np.abs(counts[1] - expected).max() < 3


# which argument of a collective is what a rank hands in
INPUT_OF = {"allreduce_": 0, "allgather_": 1, "_allgather_base_": 1, "reduce_scatter_": 1, "broadcast_": 0}


class Traffic(TorchDispatchMode):
    """Bytes that this rank hands to collectives, whichever are called."""

    def __init__(self):
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            given = args[INPUT_OF[func._opname]]
            for tensor in given if isinstance(given, (list, tuple)) else [given]:
                self.sent += tensor.numel() * tensor.element_size()
        return func(*args, **(kwargs or {}))


def count_bytes(n, vocabs):
    """Forward and backward, for each vocabulary size."""
    rank, size = dist.get_rank(), dist.get_world_size()
    counts = []
    for vocab in vocabs:
        hidden, weight, bias, targets, uniforms = problem(n, vocab=vocab)
        leaves = [t.clone().requires_grad_() for t in (hidden, weight.chunk(size)[rank], bias.chunk(size)[rank])]
        with Traffic() as forward:
            output = generator_head(*leaves, targets, uniforms, group=dist.group.WORLD, chunk_size=32)
        with Traffic() as backward:
            output.loss.sum().backward()
        counts.append((forward.sent, backward.sent))
    return counts


@pytest.mark.heavy
@pytest.mark.parametrize("pool", ["two_ranks", "four_ranks"])
def test_bytes_sent_by_a_rank(pool, request):
    n = 37
    for small, large in request.getfixturevalue(pool).run(count_bytes, n, (64, 4096)):
        assert small == large
        assert 0 < small[0] <= 64 * n
        assert small[1] == 4 * HIDDEN * n


def extra_memory(n, vocab, hidden):
    """Memory of forward, of backward, and of a tensor of known size."""
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    matrices = (torch.randn(n, hidden).bfloat16(), torch.randn(vocab, hidden).bfloat16() / 16)
    leaves = [t.requires_grad_() for t in (*matrices, torch.zeros(vocab))]
    targets, uniforms = torch.randint(vocab, (n,)), torch.rand(n)
    warm = [t.detach()[:64].clone().requires_grad_() for t in leaves]
    generator_head(*warm, targets[:64] % 64, uniforms[:64]).loss.sum().backward()  # what libraries load once
    outputs = []
    forward = working_memory(lambda: outputs.append(generator_head(*leaves, targets, uniforms)), cpu)
    backward = working_memory(lambda: outputs[0].loss.sum().backward(), cpu)
    return forward, backward, working_memory(lambda: torch.ones(2**26), cpu)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of memory")
def test_extra_memory():
    n, vocab = 4096, 131072
    bound = n * vocab * 4 / 8
    with RankPool(1, threads=2) as pool:  # a process of its own: no memory at hand from what ran before
        [(forward, backward, known)] = pool.run(extra_memory, n, vocab, 256)
    assert known > 0.99 * 2**28  # the meter sees what is there
    assert 0 < forward < bound, f"{forward / bound:.2f} of what is allowed"
    assert 0 < backward < bound, f"{backward / bound:.2f} of what is allowed, with the gradients themselves"
