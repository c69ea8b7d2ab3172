"""What is held out: shares by tokens, every token in one part; the rule of earlier versions as it was."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer_scale.corpus.store import TokenStore
from peer_scale.errors import UserError
from peer_scale.samples.split import Part, split_text
from peer_scale.samples.windows import Windows
from token_files import write_pair, write_sparse_pair

ANY_ID = 2**31
WILD = np.random.default_rng(0)
LENGTHS = {
    "one": [5000],
    "one of 50 tokens": [50],
    "two, the last long": [10, 40_000],
    "two, the last short": [40_000, 10],
    "three, one long at the end": [3, 5, 30_000],
    "three, empty ones around": [0, 30_000, 0],
    "ten, of few tokens or very many": [7, 20_000, 1, 0, 5000, 2, 9000, 0, 1, 11_000],
    "ten equal": [1000] * 10,
    "ten thousand": np.minimum(WILD.pareto(1.1, 10_000) * 3, 20_000).astype(int).tolist(),
    "a thousand, a long one at the end": [*WILD.integers(0, 8, 999).tolist(), 60_000],
}


def opened(folder, lengths, num_pairs=1):
    """Write documents of these lengths, whose tokens are numbered through, into so many pairs."""
    ends = np.cumsum(lengths)
    documents = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    shares = np.array_split(np.arange(len(documents)), num_pairs)
    prefixes = [
        write_pair(folder / f"pair{number}", [documents[index] for index in share], (np.int32, np.int64)[number % 2])
        for number, share in enumerate(shares)
    ]
    return TokenStore.open(prefixes)


def all_tokens(windows):
    return np.concatenate([windows.tokens(number, ANY_ID) for number in range(len(windows))])


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_by_default_at_least_98_percent_are_trained_on_and_every_token_is_in_one_part(tmp_path, lengths):
    store = opened(tmp_path, lengths)
    total = sum(lengths)
    parts = [Windows(store, part, width=61) for part in split_text(store, 0.01, "tokens")]
    trained, held_out = map(all_tokens, parts)
    assert len(trained) >= 0.98 * total
    assert len(held_out) >= 1
    np.testing.assert_array_equal(np.concatenate([trained, held_out]), np.arange(total))
    assert [windows.num_tokens for windows in parts] == [len(trained), len(held_out)]
    ends = np.cumsum(lengths)
    for windows, tokens in zip(parts, (trained, held_out), strict=True):
        for number in range(0, len(windows), 1 + len(windows) // 50):
            window = windows.tokens(number, ANY_ID)
            assert 1 <= len(window) <= 61
            assert len(set(np.searchsorted(ends, window, side="right"))) == 1, "a window is of one document"
        first, last = np.searchsorted(ends, [tokens[0], tokens[-1]], side="right")
        assert windows.part.first <= first and last < windows.part.last


def test_ordinary_documents_stay_whole(tmp_path):
    first, held_out = split_text(opened(tmp_path, LENGTHS["ten thousand"]), 0.01, "tokens")
    assert (first.skip, first.cut, held_out.skip, held_out.cut) == (0, 0, 0, 0)
    assert first.last == held_out.first


def test_where_the_text_is_cut(tmp_path):
    def split(name, lengths, fraction):
        (tmp_path / name).mkdir()
        return split_text(opened(tmp_path / name, lengths), fraction, "tokens")

    assert split("one", [1000], 0.01) == (Part(0, 1, cut=10), Part(0, 1, skip=990))
    assert split("long", [500, 0, 500], 0.01) == (Part(0, 3, cut=10), Part(2, 3, skip=490))
    assert split("near", [700, 285, 15], 0.01) == (Part(0, 2), Part(2, 3))
    assert split("far", [700, 284, 16], 0.01) == (Part(0, 3, cut=10), Part(2, 3, skip=6))
    assert split("within", [700, 300], 0.2) == (Part(0, 1), Part(1, 2))
    assert split("most", [100, 900], 0.99) == (Part(0, 1, cut=90), Part(0, 2, skip=10))
    assert split("two tokens", [2], 0.01) == (Part(0, 1, cut=1), Part(0, 1, skip=1))
    assert split("none", [10, 20], 0) == (Part(0, 2), None)


def test_pairs_are_one_text(tmp_path):
    lengths = [100, 0, 250, 30, 0, 600, 20]
    store = opened(tmp_path, lengths, num_pairs=3)
    before = [0, *np.cumsum(lengths).tolist()]
    assert [store.token_offset(document) for document in range(8)] == before
    for token in range(0, 1000, 7):
        assert store.document_at(token) == np.searchsorted(before, token, side="right") - 1
    for fraction in (0.01, 0.05, 0.3, 0.63, 0.8, 0.95):
        trained, held_out = (
            all_tokens(Windows(store, part, width=61)) for part in split_text(store, fraction, "tokens")
        )
        np.testing.assert_array_equal(np.concatenate([trained, held_out]), np.arange(1000))


def check_split(folder, lengths, num_pairs, fraction, width):
    total = sum(lengths)
    store = opened(folder, lengths, num_pairs)
    target = max(1, round(total * fraction))
    if target >= total:
        with pytest.raises(UserError, match="too few to hold"):
            split_text(store, fraction, "tokens")
        return
    parts = split_text(store, fraction, "tokens")
    trained, held_out = (all_tokens(Windows(store, part, width=width)) for part in parts)
    np.testing.assert_array_equal(np.concatenate([trained, held_out]), np.arange(total))
    assert 2 * abs(len(held_out) - target) <= min(target, total - target)


SPLITS = {
    "lengths": st.lists(st.integers(0, 40) | st.integers(0, 2000), min_size=3, max_size=30).filter(
        lambda lengths: all(sum(share) for share in np.array_split(lengths, 3))
    ),
    "num_pairs": st.sampled_from([1, 3]),
    "fraction": st.floats(1e-6, 0.999),
    "width": st.integers(1, 100),
}


@settings(max_examples=8, deadline=None)
@given(**SPLITS)
def test_any_split(tmp_path_factory, lengths, num_pairs, fraction, width):
    check_split(tmp_path_factory.mktemp("split"), lengths, num_pairs, fraction, width)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(**SPLITS)
def test_any_of_many_splits(tmp_path_factory, lengths, num_pairs, fraction, width):
    check_split(tmp_path_factory.mktemp("split"), lengths, num_pairs, fraction, width)


@pytest.mark.parametrize(("num_documents", "fraction", "first"), [(1000, 0.01, 990), (5, 0.01, 4), (10, 0.26, 7)])
def test_earlier_versions_rule_is_kept(tmp_path, num_documents, fraction, first):
    store = opened(tmp_path, [3] * num_documents)
    assert split_text(store, fraction, "documents") == (Part(0, first), Part(first, num_documents))
    assert split_text(store, 0, "documents") == (Part(0, num_documents), None)


def test_too_little_text_is_said(tmp_path):
    store = opened(tmp_path, [0, 1])
    with pytest.raises(UserError, match=r"the data has 1 token\(s\), too few to hold 1 out .* --validation-fraction 0"):
        split_text(store, 0.01, "tokens")
    with pytest.raises(UserError, match=r"the data has 2 document\(s\), too few to hold 2 out"):
        split_text(store, 0.9, "documents")


def test_a_pair_of_100_gb_is_split_at_once(tmp_path):
    lengths = np.full(50, 2**30)
    prefix = write_sparse_pair(tmp_path / "huge", lengths)
    opened(tmp_path, [5])  # imports megatron-core
    started = time.perf_counter()
    store = TokenStore.open([prefix])
    trained, held_out = (Windows(store, part, width=509) for part in split_text(store, 0.01, "tokens"))
    for window in (trained.tokens(len(trained) - 1, 100), held_out.tokens(0, 100)):
        assert len(window) in (508, 509) and not window.any()
    assert time.perf_counter() - started < 0.5
    assert trained.num_tokens + held_out.num_tokens == 50 * 2**30
    assert held_out.num_tokens / store.num_tokens == pytest.approx(0.01)
