"""Samples: every token once an epoch, within documents; selection and uniforms pure functions of seed and sample."""

import itertools
from collections import Counter
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

from corpus_files import write_uneven_text
from peer_scale.corpus.prepare import open_corpus
from peer_scale.corpus.store import TokenStore
from peer_scale.samples.examples import ExampleBuilder, collate, sample_stream
from peer_scale.samples.loader import ExampleDataset, micro_batches
from peer_scale.samples.masking import MaskingConfig
from peer_scale.samples.shares import BatchPlan
from peer_scale.samples.split import Part
from peer_scale.samples.windows import SeededOrder, Windows
from token_files import write_pair

SEQ_LENGTH = 64


@pytest.fixture(scope="module")
def corpus(text_file, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return open_corpus([str(text_file)], None, vocab_size=2000, text_key="text", cache_dir=cache, workers=1)


def dataset(corpus, seed=5, extra=0, **masking):
    store, tokenizer = corpus
    windows = Windows(store, Part(0, store.num_documents), width=SEQ_LENGTH - 3)
    return ExampleDataset(windows, ExampleBuilder(tokenizer, MaskingConfig(**masking), SEQ_LENGTH, seed, extra))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_each_epoch_is_a_permutation_of_its_own(size):
    order = SeededOrder(size, seed=3)
    first, second = order.at(np.arange(2 * size)).reshape(2, size).tolist()
    assert sorted(first) == sorted(second) == list(range(size))
    if size > 3:
        assert first != second
        assert first != SeededOrder(size, seed=4).at(np.arange(size)).tolist()


def test_order_is_well_mixed():
    order = SeededOrder(10_000, seed=1)
    sequence = order.at(np.arange(10_000))
    assert abs(np.corrcoef(sequence, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(sequence[1:], sequence[:-1])[0, 1]) < 0.05


def test_the_order_is_that_of_every_version():
    """Runs go on with the data order that they began with."""
    assert SeededOrder(1000, seed=3).at(np.array([0, 1, 2, 999, 1000, 2**40])).tolist() == [297, 506, 1, 466, 676, 832]
    assert SeededOrder(4097, seed=2**32 + 7).at(np.array([0, 4096, 4097])).tolist() == [3133, 573, 2152]
    assert SeededOrder(10**9, seed=5)[10**9 - 1] == 354115405


@pytest.mark.parametrize("width", [19, 400])
def test_lengths_are_known_without_the_tokens(tmp_path, width):
    """Of two pairs with empty and long documents, cut at both ends."""
    rng = np.random.default_rng(width)
    pairs = [write_pair(tmp_path / name, [np.ones(n) for n in rng.integers(0, 200, 60)]) for name in "ab"]
    store = TokenStore.open(pairs)
    first, last = (int(np.flatnonzero(store.document_lengths(0, 120) > 60)[place]) for place in (3, -3))
    for part in (Part(0, 120), Part(first, last + 1, skip=17, cut=20), Part(first, first + 1, skip=2)):
        windows = Windows(store, part, width=width)
        expected = [len(windows.tokens(window, 2)) for window in range(len(windows))]
        assert sum(expected) == windows.num_tokens
        chosen = rng.integers(0, len(windows), 40)
        assert windows.lengths(chosen).tolist() == [expected[window] for window in chosen]


def test_a_sample_is_measured_by_what_it_may_have(corpus):
    samples = dataset(corpus)
    numbers = np.arange(len(samples) - 20, len(samples) + 20)
    windows, lengths = samples.measure(numbers)
    for number, window, length in zip(numbers.tolist(), windows.tolist(), lengths.tolist(), strict=True):
        found = samples.example(number, window)
        assert all(np.array_equal(one, other) for one, other in zip(found, samples[number], strict=True))
        assert 0 <= length - len(found.input_ids) <= 1


def test_windows_hold_every_token_exactly_once(corpus):
    store, tokenizer = corpus
    windows = Windows(store, Part(0, store.num_documents), width=61)
    found = [windows.tokens(w, tokenizer.vocab_size) for w in range(len(windows))]
    assert max(map(len, found)) <= 61
    lengths = store.document_lengths(0, store.num_documents)
    whole = [store.read(d, 0, int(n)) for d, n in enumerate(lengths)]
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(whole))
    assert len(windows) == sum(-(-int(n) // 61) for n in lengths)


def test_examples_are_two_segments_with_the_right_number_selected(corpus):
    _, tokenizer = corpus
    samples = dataset(corpus)
    singles = 0
    for number in range(400):
        ids, masked, types, chosen, uniforms, _ = samples[number]
        length = len(ids)
        assert ids[0] == tokenizer.cls_id and ids[length - 1] == tokenizer.sep_id
        separators = np.flatnonzero(ids == tokenizer.sep_id)
        singles += len(separators) == 1
        if len(separators) == 2:
            assert (types[: separators[0] + 1] == 0).all()
            assert (types[separators[0] + 1 :] == 1).all()
            assert tokenizer.starts_word[ids[separators[0] + 1]]
        assert len(chosen) == len(uniforms) == max(1, round(0.15 * length)) == len(set(chosen))
        assert not np.isin(ids[chosen], (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.mask_id)).any()
        assert (masked[chosen] == tokenizer.mask_id).all()
        untouched = np.setdiff1d(np.arange(length), chosen)
        np.testing.assert_array_equal(masked[untouched], ids[untouched])
        assert ((uniforms >= 0) & (uniforms < 1)).all()
    assert 15 <= singles <= 80


def test_selection_covers_all_positions_evenly(corpus):
    counts: Counter = Counter()
    samples = dataset(corpus)
    full = 0
    for number in range(1500):
        example = samples[number]
        if len(example.input_ids) == SEQ_LENGTH:
            full += 1
            counts.update(example.positions.tolist())
    assert full > 300
    expected = sum(counts.values()) / (SEQ_LENGTH - 2.9)
    inner = [counts[p] for p in range(2, SEQ_LENGTH - 1)]
    assert max(abs(c - expected) for c in inner) < 6 * expected**0.5


def test_part_of_the_selected_can_stay_visible(corpus):
    samples = dataset(corpus, mask_probability=0.85)
    kept = total = 0
    for number in range(300):
        ids, masked, _, chosen, _, _ = samples[number]
        kept += int((masked[chosen] == ids[chosen]).sum())
        total += len(chosen)
    assert 0.11 < kept / total < 0.19


def test_samples_depend_on_seed_and_number_alone(corpus):
    again, other = dataset(corpus), dataset(corpus, seed=6)
    for number in (0, 17, len(again) + 17):
        for one, two in zip(dataset(corpus)[number], again[number], strict=True):
            np.testing.assert_array_equal(one, two)
    assert any(not np.array_equal(a, b) for a, b in zip(again[0], other[0], strict=True))
    assert sample_stream(1, 2).random_raw() != sample_stream(2, 1).random_raw()


def sequences_of(batch):
    return [tuple(ids.tolist()) for ids in batch.input_ids.split(batch.sequences.lengths)]


def test_a_step_holds_the_same_samples_for_every_layout(corpus):
    def step_ids(ranks, workers, **cut):
        batches = []
        for rank in range(ranks):
            plan = BatchPlan(12, **cut, data_parallel_rank=rank, data_parallel_size=ranks)
            steps = micro_batches(dataset(corpus), plan, first_step=3, last_step=5, num_workers=workers)
            batches.append([[ids for b in step.batches for ids in sequences_of(b)] for step in steps])
        return [sorted(itertools.chain(*parts)) for parts in zip(*batches, strict=True)]

    reference = step_ids(1, 0, micro_batch=12)
    assert reference == step_ids(2, 0, micro_batch=3) == step_ids(3, 2, micro_batch=2)
    assert reference == step_ids(1, 0, token_budget=200) == step_ids(2, 1, token_budget=SEQ_LENGTH)
    samples = dataset(corpus)
    assert reference[0] == sorted(tuple(samples[number][0].tolist()) for number in range(36, 48))


def test_steps_differ_in_their_number_of_micro_batches(tmp_path, text_file):
    """On the text of the parity rows, whose budgets of tokens would otherwise not be tried."""
    path = tmp_path / "uneven.txt"
    write_uneven_text(path, text_file.read_text())
    samples = dataset(open_corpus([str(path)], None, vocab_size=2000, text_key="text", cache_dir=tmp_path, workers=1))
    plans = [BatchPlan(8, token_budget=96, data_parallel_rank=rank, data_parallel_size=2) for rank in range(2)]
    ranks = [micro_batches(samples, plan, first_step=0, last_step=20, num_workers=0) for plan in plans]
    found = [[step.batches for step in rank] for rank in ranks]
    assert all(batch.sequences.num_tokens <= 96 for rank in found for step in rank for batch in step)
    numbers = [[len(step) for step in rank] for rank in found]
    assert numbers[0] == numbers[1]
    assert len(set(numbers[0])) > 1


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2000, torch.int16), (40_000, torch.int32)])
def test_a_batch_is_carried_in_small_integers_and_widened_where_it_arrives(corpus, vocab_size, dtype):
    samples = dataset(corpus, extra=2)
    builder = replace(samples.builder, tokenizer=replace(corpus[1], vocab_size=vocab_size))
    examples = [builder.build(samples.windows.tokens(window, 2000), window) for window in range(20)]
    batch = collate(examples)
    assert [tensor.dtype for tensor in batch[:6]] == [
        dtype,
        dtype,
        torch.int8,
        torch.int32,
        torch.float32,
        torch.float32,
    ]
    carried = ForkingPickler.loads(ForkingPickler.dumps(batch))
    on_device = carried.to(torch.device("cpu"))
    assert [tensor.dtype for tensor in on_device[:6]] == [torch.int64] * 4 + [torch.float32] * 2
    longest_first = sorted(examples, key=lambda example: -len(example.input_ids))
    for name in ("input_ids", "masked_ids", "token_types", "uniforms", "extra_uniforms"):
        expected = np.concatenate([getattr(example, name) for example in longest_first])
        np.testing.assert_array_equal(getattr(on_device, name).numpy(), expected)
    begins = np.cumsum([0, *(len(example.input_ids) for example in longest_first[:-1])])
    places = [begin + example.positions for begin, example in zip(begins, longest_first, strict=True)]
    np.testing.assert_array_equal(on_device.positions.numpy(), np.concatenate(places))
    for name in ("sequences", "selected"):
        ours, theirs = getattr(batch, name), getattr(on_device, name)
        assert ours.lengths == theirs.lengths
        assert all(map(torch.equal, ours._tensors, theirs._tensors))


def test_extra_uniforms_change_nothing_else(corpus):
    """They are drawn after all others: an objective that needs some sees the same samples."""
    plain, extra = dataset(corpus), dataset(corpus, extra=4)
    for number in range(50):
        left, right = plain[number], extra[number]
        assert all(np.array_equal(a, b) for a, b in zip(left[:-1], right[:-1], strict=True))
        width = len(left.positions)
        assert left[-1].shape == (width, 0)
        assert right[-1].shape == (width, 4)
        assert ((right[-1] >= 0) & (right[-1] < 1)).all()
    drawn = np.concatenate([extra[number].extra_uniforms.ravel() for number in range(50)])
    assert abs(drawn.mean() - 0.5) < 4 * (1 / 12 / len(drawn)) ** 0.5
    assert len(np.unique(drawn)) > 0.99 * len(drawn)
