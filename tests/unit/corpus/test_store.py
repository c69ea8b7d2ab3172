import os
import pickle
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from corpus_files import run_tool
from peer_scale.corpus.store import TokenStore, check_vocab, verify
from peer_scale.corpus.wordpiece import SPECIAL_TOKENS, load_wordpiece, train_wordpiece
from peer_scale.errors import UserError
from token_files import HEADER, write_index, write_pair, write_sparse_pair


def test_documents_of_several_sequences_and_pairs_are_numbered_through(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(0)
    expected, prefixes = [], []
    for number, dtype in enumerate((np.int32, np.uint16, np.uint8)):
        prefixes.append(str(tmp_path / f"pair{number}"))
        builder = IndexedDatasetBuilder(f"{prefixes[-1]}.bin", dtype=dtype)
        for num_sequences in (2, 0, 1, 3, 0):  # 0: an empty document, also at the end
            sequences = [rng.integers(0, 256, rng.integers(1, 9)) for _ in range(num_sequences)]
            for sequence in sequences:
                builder.add_item(torch.tensor(sequence))
            builder.end_document()
            expected.append(np.concatenate([np.empty(0, np.int64), *sequences]).tolist())
        builder.finalize(f"{prefixes[-1]}.idx")
    store = TokenStore.open(prefixes)
    for opened in (store, pickle.loads(pickle.dumps(store))):
        assert opened.num_documents == 15
        assert opened.num_tokens == sum(map(len, expected))
        assert opened.fingerprint == store.fingerprint
        for first in range(16):
            for last in range(first, 16):
                lengths = opened.document_lengths(first, last)
                assert lengths.dtype == np.int64
                assert lengths.tolist() == [len(document) for document in expected[first:last]]
        for document, tokens in enumerate(expected):
            for offset in range(len(tokens) + 1):
                found = opened.read(document, offset, len(tokens) - offset)
                assert found.dtype == np.int64
                assert found.tolist() == tokens[offset:]
            with pytest.raises(AssertionError):
                opened.read(document, 0, len(tokens) + 1)


def test_a_huge_pair_opens_as_fast_as_a_small_one(tmp_path, pair):
    lengths = np.full(120, 2**30, dtype=np.int64)
    write_sparse_pair(tmp_path / "huge", lengths)
    with (tmp_path / "huge.bin").open("rb+") as file:
        file.seek(2 * (100 * 2**30 + 12345))
        file.write(np.arange(5, dtype=np.uint16).tobytes())
    TokenStore.open([pair])  # imports megatron-core
    started = time.perf_counter()
    store = TokenStore.open([str(tmp_path / "huge")])
    assert time.perf_counter() - started < 0.2
    assert store.num_tokens == 120 * 2**30
    assert store.read(100, 12344, 7).tolist() == [0, 0, 1, 2, 3, 4, 0]
    assert store.document_lengths(118, 120).tolist() == [2**30, 2**30]


def test_no_array_of_the_whole_corpus_is_made(tmp_path):
    lengths = np.random.default_rng(0).integers(0, 5, 1_000_000)
    write_index(tmp_path / "many.idx", lengths)
    (tmp_path / "many.bin").write_bytes(bytes(2 * int(lengths.sum())))
    TokenStore.open([str(tmp_path / "many")])  # imports megatron-core
    tracemalloc.start()
    store = TokenStore.open([str(tmp_path / "many")])
    assert store.document_lengths(500_000, 501_000).tolist() == lengths[500_000:501_000].tolist()
    document = 700_000 + int(np.argmax(lengths[700_000:]))
    assert store.read(document, 1, 3).tolist() == [0, 0, 0]
    assert tracemalloc.get_traced_memory()[1] < 400_000
    tracemalloc.stop()


def test_the_fingerprint_tells_contents_and_sizes_apart(tmp_path):
    found = []
    for number, (length, value) in enumerate([(50_000, 0), (50_000, 0), (50_000, 1), (50_001, 0)]):
        prefix = tmp_path / str(number)
        write_index(Path(f"{prefix}.idx"), np.array([length]))
        tokens = np.zeros(length, np.uint16)
        tokens[-1] = value
        tokens.tofile(f"{prefix}.bin")
        found.append(TokenStore.open([str(prefix)]).fingerprint)
    assert found[0] == found[1]
    assert len(set(found)) == 3


@pytest.mark.slow
def test_opening_says_nothing(pair):
    code = (
        "import logging, sys; logging.basicConfig(level=logging.DEBUG)\n"
        "from peer_scale.corpus.store import TokenStore\n"
        "TokenStore.open(sys.argv[1:]).read(0, 0, 1)"
    )
    result = subprocess.run([sys.executable, "-c", code, pair], capture_output=True, text=True, check=True)
    assert [line for line in (result.stdout + result.stderr).splitlines() if "megatron" in line.lower()] == []


def damage_header(prefix: str, data: bytes, position: int) -> None:
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(position)
        file.write(data)


BAD_PAIRS = [
    (lambda p: os.unlink(f"{p}.bin"), r"corpus\.bin: no such file; .*corpus\.bin and .*corpus\.idx are needed"),
    (lambda p: os.unlink(f"{p}.idx"), r"corpus\.idx: no such file"),
    (lambda p: damage_header(p, b"X", 0), r"corpus\.idx: not a Megatron index \(bad header\)"),
    (lambda p: os.truncate(f"{p}.idx", 20), r"corpus\.idx: not a Megatron index \(bad header\)"),
    (lambda p: damage_header(p, b"\2", 9), r"corpus\.idx: version 2 of the Megatron index, but only 1"),
    (lambda p: damage_header(p, b"\6", 17), r"corpus\.idx: dtype code 6; token ids have one of"),
    (
        lambda p: os.truncate(f"{p}.idx", 12_033),
        r"corpus\.idx: 12033 bytes, but its header's counts need 12042; .*trunc",
    ),
    (lambda p: damage_header(p, b"\0", 12_034), r"corpus\.idx: its documents span sequences 0 to 512 of 0 to 600"),
    (lambda p: os.truncate(f"{p}.bin", 1000), r"corpus\.bin: 1000 bytes, but .*corpus\.idx says \d+; .*truncated"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_PAIRS)
def test_damaged_pairs_are_named(copy, damage, message):
    os.unlink(f"{copy}.json")
    TokenStore.open([copy])
    damage(copy)
    with pytest.raises(UserError, match=message):
        TokenStore.open([copy])


def test_a_pair_that_is_not_its_manifests_is_named(copy):
    with open(f"{copy}.bin", "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(UserError, match=r"corpus\.bin: \d+ bytes, but .*corpus\.json says \d+; truncated or changed"):
        TokenStore.open([copy])
    os.truncate(f"{copy}.bin", os.path.getsize(f"{copy}.bin") - 2)
    TokenStore.open([copy])
    with open(f"{copy}.bin", "r+b") as file:
        file.write(b"\xff")
    with pytest.raises(UserError, match=r"the content is not what .*corpus\.json says"):
        TokenStore.open([copy])


def test_verify_finds_what_samples_miss(copy):
    verify(copy)
    with open(f"{copy}.bin", "r+b") as file:
        for position in range(1, os.path.getsize(f"{copy}.bin"), 13):
            file.seek(position)
            byte = file.read(1)
            file.seek(position)
            file.write(bytes([byte[0] ^ 1]))
            file.flush()
            try:
                TokenStore.open([copy])
                break  # a byte that the samples miss
            except UserError:
                file.seek(position)
                file.write(byte)
                file.flush()
        else:
            pytest.fail("the samples cover the whole file")
    with pytest.raises(UserError, match=r"corpus\.bin: its sha256 is not the one in .*corpus\.json"):
        verify(copy)
    result = run_tool("--verify", copy)
    assert (result.returncode, result.stderr.startswith(f"error: {copy}.bin: its sha256")) == (2, True)
    os.unlink(f"{copy}.json")
    with pytest.raises(UserError, match=r"corpus\.json: no manifest"):
        verify(copy)


def test_a_vocabulary_beyond_the_dtype_or_the_tokens_beyond_the_vocabulary_is_an_error(tmp_path, pair, wordpiece):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *(f"w{number}" for number in range(65_532))]))
    too_large = load_wordpiece(str(tmp_path / "vocab.txt"))
    with pytest.raises(UserError, match=r"corpus\.bin: its dtype uint16 cannot hold a vocabulary of 65537"):
        check_vocab(TokenStore.open([pair]), too_large)
    too_small = train_wordpiece(["a few words"], 64)
    store = TokenStore.open([pair])
    ids = store.read(0, 0, int(store.document_lengths(0, 1)[0]))
    with pytest.raises(UserError) as error:
        check_vocab(TokenStore.open([pair]), too_small)
    place = int(np.argmax(ids >= too_small.vocab_size))
    assert str(error.value) == (
        f"{pair}.bin: document 0, token {place} (both counted from 0) has id {ids[place]}, which is outside the "
        f"tokenizer's vocabulary of {too_small.vocab_size}"
    )
    check_vocab(TokenStore.open([pair]), wordpiece)


# pairs that a writer with a fault, a copy of the wrong file or a wrong type would give
def with_lengths(prefix, lengths):
    overwrite(prefix, HEADER.size, lengths, "<i4")


def with_pointer(prefix, sequence, pointer, num_sequences=20):
    overwrite(prefix, HEADER.size + 4 * num_sequences + 8 * sequence, [pointer], "<i8")


def with_bound(prefix, number, bound, num_sequences=20):
    overwrite(prefix, HEADER.size + 12 * num_sequences + 8 * number, [bound], "<i8")


def with_dtype(prefix, code):
    overwrite(prefix, HEADER.size - 17, [code], "u1")


def overwrite(prefix, position, values, dtype):
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(position)
        file.write(np.array(values, dtype).tobytes())


WRONG_PAIRS = {
    "another dtype, half as wide": (
        lambda p: with_dtype(p, 8),
        r"own\.idx: sequence 0 \(counted from 0\) has 10 tokens of 2 bytes by its length, but another number",
    ),
    "another dtype, twice as wide": (lambda p: with_dtype(p, 5), r"own\.idx: sequence 0 .* 10 tokens of 8 bytes"),
    "lengths that disagree": (lambda p: with_lengths(p, [10, 11, 9]), r"own\.idx: sequence 1 .* has 11 tokens"),
    "a pointer that goes back": (lambda p: with_pointer(p, 7, 80), r"own\.idx: sequence 6 .* has 10 tokens"),
    "a first pointer above 0": (lambda p: with_pointer(p, 0, 4), r"own\.idx: sequence 0 .* has 10 tokens"),
    "a document that ends before it begins": (
        lambda p: with_bound(p, 3, 8),
        r"own\.idx: document 3 \(counted from 0\) would be -160 bytes long, at 4 per token; the index is damaged",
    ),
    "more tokens than the index knows": (
        lambda p: Path(f"{p}.bin").write_bytes(bytes(840)),
        r"own\.bin: 840 bytes, but .*own\.idx says 800 of int32; the two files do not belong together",
    ),
}


@pytest.mark.parametrize(("damage", "message"), WRONG_PAIRS.values(), ids=WRONG_PAIRS)
def test_an_index_that_does_not_say_where_documents_lie_is_named(tmp_path, damage, message):
    prefix = write_pair(tmp_path / "own", [np.arange(10)] * 20)
    assert TokenStore.open([prefix]).document_lengths(0, 20).tolist() == [10] * 20
    damage(prefix)
    with pytest.raises(UserError, match=message):
        TokenStore.open([prefix]).document_lengths(0, 20)


def test_documents_end_between_tokens(tmp_path):
    """Pointers that the samples of the index miss, in the middle of a token."""
    prefix = write_pair(tmp_path / "own", [np.arange(2)] * 20_000, np.uint16)
    first = 5
    while True:
        with_pointer(prefix, first, 4 * first + 1, 20_000)
        try:
            store = TokenStore.open([prefix])
            break
        except UserError:  # a sample
            with_pointer(prefix, first, 4 * first, 20_000)
            first += 50
    with pytest.raises(UserError, match=rf"document {first - 1} \(counted from 0\) would be 5 bytes long, at 2 per"):
        store.document_lengths(0, 20_000)
