"""Plans of text whose samples have different lengths: counted, averaged, bounded and shared out."""

import json
from dataclasses import replace

import numpy as np
import pytest

from peer_scale.commands import plan as plan_command
from peer_scale.corpus.store import TokenStore
from peer_scale.errors import UserError
from peer_scale.flops import actual_train_flops, square_cost_ratio
from peer_scale.objectives.graph import SampleSize
from peer_scale.planning.balance import equal_shares, in_turns, waiting_share
from peer_scale.planning.estimate import make_plan
from peer_scale.planning.layout import GIB, Cluster, ParallelLayout, Workload
from peer_scale.planning.lengths import Lengths
from peer_scale.planning.report import describe
from peer_scale.samples.shares import BatchPlan
from peer_scale.samples.split import Part
from peer_scale.samples.windows import Windows
from peer_scale.settings.presets import find_preset
from token_files import write_pair

CLUSTER = Cluster(4, 8, 80 * GIB, 989.4e12, 300e9, 40e9)
LAYOUT = ParallelLayout(8, zero_stage=1, micro_batch_size=4)
DOCUMENTS = [1, 29, 30, 58, 59, 100, 0, 7, 7, 2000, 87]
MACHINES = ["--model", "peer-base", "--nodes", "1", "--gpus-per-node", "8", "--micro-batch-size", "32"]


def workload(lengths=None, *, batch=256, tokens=1e9):
    preset = find_preset("peer-small")
    return Workload(preset.model, preset.objective, preset.masking, 128, batch, tokens, lengths=lengths)


def skewed(longest=128):
    """Many short samples, few long ones."""
    return Lengths((0,) * 4 + tuple(round(1e6 / n**1.5) for n in range(4, longest + 1)))


@pytest.fixture
def prefix(tmp_path):
    ids = np.random.default_rng(0).integers(5, 60, sum(DOCUMENTS))
    return write_pair(tmp_path / "own", np.split(ids, np.cumsum(DOCUMENTS)[:-1]), np.uint16)


@pytest.mark.parametrize("part", [Part(0, len(DOCUMENTS)), Part(2, 10, skip=4, cut=1100), Part(3, 4)])
@pytest.mark.parametrize("width", [1, 5, 29, 125, 4000])
def test_samples_are_counted_as_reading_them_does(prefix, part, width):
    windows = Windows(TokenStore.open([prefix]), part, width=width)
    read = [len(windows.tokens(window, 60)) for window in range(len(windows))]
    assert windows.length_counts().tolist() == np.bincount(read, minlength=width + 1).tolist()
    counts = Lengths.of_text(windows).counts
    assert counts == (0, 0, 0, *windows.length_counts())


def test_mean_sizes_are_those_of_plain_loops():
    masking = find_preset("peer-small").masking
    samples = [4, 4, 4, 9, 17, 128, 128]
    size = Lengths(tuple(np.bincount(samples).tolist())).mean_size(masking)
    assert size.tokens == pytest.approx(sum(samples) / 7)
    assert size.selected == pytest.approx(sum(max(1, round(0.15 * n)) for n in samples) / 7)
    assert size.token_pairs == pytest.approx(sum(n * n for n in samples) / 7)
    work = workload(Lengths(tuple(np.bincount(samples).tolist())))
    one_by_one = sum(
        actual_train_flops(work.model, work.objective, SampleSize.of_sequence(n, max(1, round(0.15 * n))), samples=1)
        for n in samples
    )
    assert actual_train_flops(work.model, work.objective, work.size, samples=7) == pytest.approx(one_by_one)


def test_the_bound_of_a_micro_batchs_tokens_holds_and_is_no_fancy():
    lengths, random = skewed(), np.random.default_rng(1)
    drawn = np.sort(lengths.draw((100_000, 8), random).sum(1))
    for chance in (1e-1, 1e-2, 1e-3, 1e-4):
        assert drawn[round(len(drawn) * (1 - chance)) - 1] <= lengths.most_tokens(8, chance)
    assert lengths.most_tokens(8, 1e-3) < 1.3 * drawn[round(len(drawn) * (1 - 1e-3))]
    assert lengths.most_tokens(1, 1e-9) == 128, "the longest there is"
    assert skewed(90).most_tokens(3, 1e-30) == pytest.approx(270, rel=0.01)
    assert skewed(90).most_tokens(3, 1e-300) == 270
    assert lengths.most_tokens(500, 1e-9) < 0.5 * 500 * 128


@pytest.mark.parametrize("lengths", [Lengths((0,) * 128 + (5,)), Lengths((0,) * 128 + (1,), are_known=False)])
def test_full_samples_are_the_plan_without_lengths(lengths):
    assert make_plan(workload(lengths), CLUSTER, LAYOUT) == make_plan(workload(), CLUSTER, LAYOUT)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_shorter_samples_take_less(pipeline):
    layout = replace(LAYOUT, pipeline_parallel=pipeline, data_parallel=8 // pipeline, micro_batch_size=8)
    cluster = replace(CLUSTER, launch=0.0)
    full, short = (make_plan(workload(lengths), cluster, layout) for lengths in (None, skewed()))
    guessed = make_plan(workload(Lengths.at_fill(0.25, 128)), cluster, layout)
    assert short.placement == full.placement, "training does not know the lengths when it chooses the stages"
    assert short.step_time < full.step_time and guessed.step_time < full.step_time
    assert short.stages[0].activations < full.stages[0].activations == guessed.stages[0].activations
    assert short.stages[0].state == full.stages[0].state
    assert short.traffic.pipeline == pytest.approx(full.traffic.pipeline * short.fill, rel=0.02)
    assert guessed.tokens_per_second == pytest.approx(256 * 32 / guessed.step_time)
    assert guessed.fill == 0.25 and guessed.waiting_share == guessed.waiting_time == 0
    assert short.waiting_time == pytest.approx(short.waiting_share * short.micro_batches.seconds)
    # where the CPU cannot start kernels fast enough for any rank, none waits for another
    slow = replace(CLUSTER, launch=1e-3)
    assert make_plan(workload(skewed()), slow, layout).waiting_time == 0


def test_waiting_is_counted_as_plain_loops_count_it():
    work = workload(skewed(), batch=64)
    for stage, layout in ((1, LAYOUT), (2, replace(LAYOUT, zero_stage=2))):
        ratio, fullest, mean = square_cost_ratio(work.model, work.objective, work.full), 0.0, 0.0
        for lengths in work.lengths.draw((64, 64), np.random.default_rng(0)):
            ranks = [[0.0, 0.0] for _ in range(8)]
            for sample, length in enumerate(lengths.tolist()):
                turn = sample // 4
                ranks[turn % 8][turn // 8] += length + ratio * length**2
            each = [max(rank[micro] for rank in ranks) for micro in (0, 1)]
            fullest += max(sum(rank) for rank in ranks) if stage == 1 else sum(each)
            mean += sum(map(sum, ranks)) / 8
        assert waiting_share(work, layout, in_turns) == pytest.approx(fullest / mean - 1)
        assert 0 <= waiting_share(work, layout, equal_shares) < 0.5 * waiting_share(work, layout, in_turns)
    assert waiting_share(work, ParallelLayout(1, micro_batch_size=4), in_turns) == pytest.approx(0, abs=1e-12)


def test_the_cost_of_a_pair_and_of_a_token_make_up_a_sequences():
    work = workload()
    ratio = square_cost_ratio(work.model, work.objective, work.full)
    one, two = (
        actual_train_flops(work.model, work.objective, SampleSize(n, n * work.full.selected / 128, n * n), samples=1)
        for n in (40, 100)
    )
    assert two / one == pytest.approx((100 + ratio * 100**2) / (40 + ratio * 40**2))


def test_the_report_says_what_it_takes_samples_to_be():
    for lengths, said in (
        (None, "samples: all of 128 tokens, fill 100%"),
        (Lengths.at_fill(0.4, 128), "samples: 51.0 of 128 tokens on average, fill 39.8%, all alike; memory is that of"),
        (skewed(), "not one run in a thousand exceeds (full ones would have 512)"),
    ):
        text = describe(make_plan(workload(lengths), CLUSTER, LAYOUT), workload(lengths), CLUSTER)
        assert said in text
    assert "the fullest of 8 data-parallel ranks has " in text


def test_the_command_takes_lengths_from_a_pair(prefix, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    vocabulary = tmp_path / "vocab.txt"
    letters = [chr(code) for code in (*range(33, 65), *range(91, 127))]
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    flags = [*MACHINES, "--data-path", prefix, "--tokenizer", str(vocabulary)]
    assert plan_command.main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    windows = [np.diff(np.arange(0, k + 1) * n // k) for n in DOCUMENTS if n for k in [-(-n // 509)]]
    mean = np.concatenate(windows).mean() + 3
    assert found["fill"] == pytest.approx(mean / 512)
    assert found["days"] == pytest.approx(666_900 * 256 * mean / found["tokens_per_second"] / 86400)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--fill", "0"], "--fill is 0; it must be"),
        (["--fill", "1.5"], "--fill is 1.5; it must be"),
        (["--fill", "nan"], "--fill"),
        (["--fill", "0.001"], "--fill 0.001: of --seq-length 512 that is 1 tokens, but a sample has 4 to 512"),
        (["--fill", "0.5", "--data-path", "x"], "--fill 0.5 has no effect with --data-path"),
        (["--tokenizer", "vocab.txt"], "--tokenizer has no effect without --data-path"),
        (["--text-key", "body"], "--text-key has no effect without --data-path"),
        (["--data-path", "gone/text.txt"], "gone/text.txt"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags, said, capsys):
    assert plan_command.main([*MACHINES, *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and said in captured.err


def test_too_small_a_fill_is_refused_by_itself():
    with pytest.raises(UserError, match="4 to 128"):
        Lengths.at_fill(0.02, 128)


def test_a_budget_of_tokens_makes_as_many_micro_batches_as_training_does():
    budget, layout = 512, ParallelLayout(8, zero_stage=1, micro_batch_tokens=512)
    # all alike: 4 full ones, or 16 of 32 tokens, of a rank's 32 samples
    for lengths, number in ((None, 8), (Lengths.at_fill(0.25, 128), 2), (Lengths.at_fill(0.26, 128), 3)):
        plan = make_plan(workload(lengths), CLUSTER, layout)
        assert plan.num_micro_batches == pytest.approx(number)
    # the cuts of training, for steps drawn from the text
    work = workload(skewed())
    numbers = []
    for lengths in work.lengths.draw((64, 256), np.random.default_rng(0)):
        rules = BatchPlan(256, token_budget=budget, square_ratio=0.001, data_parallel_size=8)
        numbers.append(len(rules.micro_batches(lengths)))
    plan = make_plan(work, CLUSTER, layout)
    assert plan.num_micro_batches == pytest.approx(np.mean(numbers), rel=0.02)
    assert 1 < plan.num_micro_batches < 8
    assert "none exceeds" in describe(plan, work, CLUSTER)


def test_a_budgets_memory_is_that_of_full_sequences_and_its_time_that_of_as_many_tokens():
    by_tokens, by_size = ParallelLayout(8, micro_batch_tokens=600), ParallelLayout(8, micro_batch_size=4)
    tokens, size = (make_plan(workload(), CLUSTER, layout) for layout in (by_tokens, by_size))
    assert tokens.step_time == pytest.approx(size.step_time)
    assert tokens.stages[0].activations == pytest.approx(size.stages[0].activations * 600 / 512, rel=1e-6)
    all_of_it = make_plan(workload(), CLUSTER, replace(by_tokens, micro_batch_tokens=10**9))
    assert all_of_it.num_micro_batches == 1
    assert all_of_it.stages == make_plan(workload(), CLUSTER, replace(by_size, micro_batch_size=32)).stages
    # ranks that meet at every micro-batch wait more often than those that meet once
    often, once = (
        make_plan(workload(skewed()), CLUSTER, replace(by_tokens, zero_stage=stage)).waiting_share for stage in (2, 1)
    )
    assert often > once >= 0
