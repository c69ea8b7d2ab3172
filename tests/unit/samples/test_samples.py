"""Samples: every token once an epoch, within documents; selection and uniforms pure functions of seed and sample."""

import itertools
from collections import Counter

import numpy as np
import pytest

from peer_scale.corpus.prepare import open_corpus
from peer_scale.samples.examples import ExampleBuilder, sample_stream
from peer_scale.samples.loader import BatchPlan, ExampleDataset, micro_batches
from peer_scale.samples.masking import MaskingConfig
from peer_scale.samples.split import Part
from peer_scale.samples.windows import SeededOrder, Windows

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
    first = [order[i] for i in range(size)]
    second = [order[i] for i in range(size, 2 * size)]
    assert sorted(first) == sorted(second) == list(range(size))
    if size > 3:
        assert first != second
        assert first != [SeededOrder(size, seed=4)[i] for i in range(size)]


def test_order_is_well_mixed():
    order = SeededOrder(10_000, seed=1)
    sequence = np.array([order[i] for i in range(10_000)])
    assert abs(np.corrcoef(sequence, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(sequence[1:], sequence[:-1])[0, 1]) < 0.05


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
    def step_ids(ranks, micro, workers):
        batches = []
        for rank in range(ranks):
            plan = BatchPlan(micro, 12, rank, ranks)
            steps = micro_batches(dataset(corpus), plan, first_step=3, last_step=5, num_workers=workers)
            batches.append([[ids for b in step.batches for ids in sequences_of(b)] for step in steps])
        return [sorted(itertools.chain(*parts)) for parts in zip(*batches, strict=True)]

    reference = step_ids(1, 12, 0)
    assert reference == step_ids(2, 3, 0) == step_ids(3, 2, 2)


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
