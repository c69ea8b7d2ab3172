import os
import pickle
import struct
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

HEADER = struct.Struct("<9sQBQQ")


def write_index(path: Path, lengths: np.ndarray, itemsize: int = 2, code: int = 8) -> None:
    """Writes an .idx by hand after the format's description, one sequence a document."""
    ends = np.cumsum(lengths.astype(np.int64) * itemsize)
    with path.open("wb") as file:
        file.write(HEADER.pack(b"MMIDIDX\0\0", 1, code, len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write((ends - lengths * itemsize).astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


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
    write_index(tmp_path / "huge.idx", lengths)
    with (tmp_path / "huge.bin").open("wb") as file:
        try:
            file.truncate(2 * int(lengths.sum()))
        except OSError:
            pytest.skip("the file system has no files of this size")
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


@pytest.mark.heavy
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
    with pytest.raises(UserError, match=r"corpus\.bin: holds token id \d+, beyond the tokenizer's vocabulary of \d+"):
        check_vocab(TokenStore.open([pair]), too_small)
    check_vocab(TokenStore.open([pair]), wordpiece)
