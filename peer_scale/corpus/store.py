"""Tokenised documents on disk: Megatron `.bin/.idx` pairs, opened in constant time and read through memory maps."""

import contextlib
import hashlib
import logging
import os
import struct
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from peer_scale.corpus.manifest import PairManifest
from peer_scale.corpus.wordpiece import WordPiece
from peer_scale.errors import UserError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, number of sequences, number of documents + 1
DTYPE_CODES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_LENGTH_BYTES, _POINTER_BYTES = 4, 8
_SAMPLES, _SAMPLE_BYTES = 32, 1024
_SAMPLE_SEQUENCES = 128


@dataclass(frozen=True)
class PairIndex:
    """What the header and the edges of an .idx say."""

    dtype: type[np.integer]
    num_sequences: int
    num_documents: int
    num_tokens: int

    @property
    def itemsize(self) -> int:
        """Bytes per token."""
        return np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class _Pair:
    prefix: str
    index: PairIndex
    data: "IndexedDataset"
    fingerprint: str

    def byte_offsets(self, documents: slice | np.ndarray) -> np.ndarray:
        """Return the bytes at which documents begin, int64; the one after the last begins where that one ends.

        Raises:
            UserError: one would begin outside the pair's tokens.
        """
        sequences = self.data.index.document_indices[documents]
        self._check_range(sequences, self.index.num_sequences, "sequence")
        pointers = self.data.index.sequence_pointers
        inside = pointers[np.minimum(sequences, self.index.num_sequences - 1)]
        end = self.index.num_tokens * self.index.itemsize
        self._check_range(inside, end, "byte")
        return np.where(sequences < self.index.num_sequences, inside, end)

    def _check_range(self, numbers: np.ndarray, last: int, unit: str) -> None:
        """Raise UserError where one of the index's numbers is not in [0, last]."""
        if numbers.size and int(numbers.view(np.uint64).max()) > last:  # in which a negative number is a huge one
            wrong = numbers[numbers.view(np.uint64) > last][0]
            raise UserError(f"{self.prefix}.idx: a document would begin at {unit} {wrong} of {last}; it is damaged")


class TokenStore:
    """The documents of one or more `.bin/.idx` pairs, numbered through all of them.

    Attributes:
        prefixes: the pairs' paths without their endings.
        num_documents: documents in all pairs.
        num_tokens: tokens in all pairs.
        fingerprint: changes when a byte count or sampled content changes; computed in constant time.
    """

    def __init__(self, pairs: Sequence[_Pair]) -> None:
        assert pairs
        self._pairs = tuple(pairs)
        self._ends = list(accumulate(pair.index.num_documents for pair in pairs))
        self._token_ends = list(accumulate(pair.index.num_tokens for pair in pairs))
        self.prefixes = tuple(pair.prefix for pair in pairs)
        self.num_documents = self._ends[-1]
        self.num_tokens = self._token_ends[-1]
        self.fingerprint = _hex_digest(*(pair.fingerprint.encode() for pair in pairs))

    @classmethod
    def open(cls, prefixes: Sequence[str]) -> "TokenStore":
        """Open pairs in a time that does not depend on their size.

        Args:
            prefixes: paths of which `.bin` and `.idx` exist.

        Raises:
            UserError: a file is missing, truncated, not an index, or not what its manifest describes.
        """
        pairs = []
        for prefix in prefixes:
            index, fingerprint = inspect_pair(prefix)
            pairs.append(_Pair(prefix, index, _quiet_indexed_dataset(prefix), fingerprint))
        return cls(pairs)

    def document_lengths(self, first: int, last: int) -> np.ndarray:
        """Return the tokens of documents [first, last), int64 [last - first], reading only their part of the index.

        Raises:
            UserError: a document ends before it begins, or in the middle of a token.
        """
        assert 0 <= first <= last <= self.num_documents, (first, last, self.num_documents)
        lengths = [np.empty(0, dtype=np.int64)]
        for pair, start, stop in self._overlaps(first, last):
            sizes = np.diff(pair.byte_offsets(slice(start, stop + 1)))
            bits = int(np.bitwise_or.reduce(sizes))  # of all at once: below 0 where one is, odd where one is, ...
            if bits < 0 or bits % pair.index.itemsize:
                document = start + int(np.argmax((sizes < 0) | (sizes % pair.index.itemsize != 0)))
                raise UserError(
                    f"{pair.prefix}.idx: document {document} (counted from 0) would be {sizes[document - start]} bytes "
                    f"long, at {pair.index.itemsize} per token; the index is damaged"
                )
            lengths.append(sizes // pair.index.itemsize)
        return np.concatenate(lengths)

    def token_offset(self, document: int) -> int:
        """Count the tokens before a document; `num_documents` gives all."""
        return int(self.token_offsets(np.array([document]))[0])

    def token_offsets(self, documents: np.ndarray) -> np.ndarray:
        """Count the tokens before each of any documents, int64 of the same shape."""
        assert documents.min() >= 0 and documents.max() <= self.num_documents, (documents, self.num_documents)
        offsets = np.full(documents.shape, self.num_tokens, np.int64)
        first = before = 0
        for pair, end, token_end in zip(self._pairs, self._ends, self._token_ends, strict=True):
            here = (first <= documents) & (documents < end)
            offsets[here] = before + pair.byte_offsets(documents[here] - first) // pair.index.itemsize
            first, before = end, token_end
        return offsets

    def document_at(self, token: int) -> int:
        """Find the document that holds a token, of all tokens' numbers; it takes some tens of small reads."""
        assert 0 <= token < self.num_tokens, (token, self.num_tokens)
        return bisect_right(range(self.num_documents), token, key=self.token_offset) - 1

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """Return `length` tokens of a document from `offset` on, int64 [length]."""
        assert 0 <= document < self.num_documents, (document, self.num_documents)
        ((pair, start, stop),) = self._overlaps(document, document + 1)
        begin, end = pair.byte_offsets(slice(start, stop + 1)).tolist()
        position = begin + offset * pair.index.itemsize
        assert offset >= 0 and length >= 0, (offset, length)
        assert position + length * pair.index.itemsize <= end, (document, offset, length)
        return pair.data.bin_reader.read(pair.index.dtype, length, position).astype(np.int64)

    def check_ids(self, ids: np.ndarray, vocab_size: int, *, document: int, offset: int) -> None:
        """Check that the tokens of a document from `offset` on, int64 [n], are ids of a vocabulary.

        Raises:
            UserError: one is not; the message names its file, its document and its place there, and the id.
        """
        unsigned = ids.view(np.uint64)  # in which a negative id is a huge one
        if not ids.size or int(unsigned.max()) < vocab_size:
            return
        index = int(np.argmax(unsigned >= vocab_size))
        ((pair, own, _),) = self._overlaps(document, document + 1)
        raise UserError(
            f"{pair.prefix}.bin: document {own}, token {offset + index} (both counted from 0) has id {ids[index]}, "
            f"which is outside the tokenizer's vocabulary of {vocab_size}"
        )

    def dtypes(self) -> list[tuple[str, type[np.integer]]]:
        """Return each pair's prefix and token dtype."""
        return [(pair.prefix, pair.index.dtype) for pair in self._pairs]

    def __reduce__(self) -> tuple[Callable[[Sequence[str]], "TokenStore"], tuple[tuple[str, ...]]]:
        return TokenStore.open, (self.prefixes,)

    def _overlaps(self, first: int, last: int) -> Iterator[tuple[_Pair, int, int]]:
        """Yield each pair with the first and last of its documents, in its own numbers, that lie in [first, last)."""
        for number in range(bisect_right(self._ends, first), len(self._pairs)):
            begin = self._ends[number] - self._pairs[number].index.num_documents
            if begin >= last:
                break
            yield self._pairs[number], max(first, begin) - begin, min(last, self._ends[number]) - begin


def check_vocab(store: TokenStore, wordpiece: WordPiece) -> None:
    """Check that a store can be made of a tokenizer's ids and, as far as its samples tell, is.

    The rest is checked window by window as it is read.

    Raises:
        UserError: the vocabulary exceeds a pair's dtype, or a sampled token is outside the vocabulary.
    """
    for prefix, dtype in store.dtypes():
        if wordpiece.vocab_size - 1 > np.iinfo(dtype).max:
            name = np.dtype(dtype).name
            raise UserError(f"{prefix}.bin: its dtype {name} cannot hold a vocabulary of {wordpiece.vocab_size}")
    for document in np.linspace(0, store.num_documents - 1, _SAMPLES, dtype=np.int64).tolist():
        length = int(store.document_lengths(document, document + 1)[0])
        ids = store.read(document, 0, min(length, _SAMPLE_BYTES))
        store.check_ids(ids, wordpiece.vocab_size, document=document, offset=0)


def pair_fingerprint(prefix: str) -> str:
    """Digest the sizes and evenly spaced samples, first and last bytes included, of a pair's two files."""
    parts = []
    for path in (f"{prefix}.idx", f"{prefix}.bin"):
        size = os.path.getsize(path)
        parts.append(struct.pack("<Q", size))
        with open(path, "rb", buffering=0) as file:
            last = max(size - _SAMPLE_BYTES, 0)
            for sample in range(_SAMPLES):
                file.seek(last * sample // (_SAMPLES - 1))
                parts.append(file.read(_SAMPLE_BYTES))
    return _hex_digest(*parts)


def verify(prefix: str) -> None:
    """Read a pair through and compare it with its manifest.

    Raises:
        UserError: there is no manifest, or a file is missing or not what the manifest describes.
    """
    manifest = PairManifest.read(prefix)
    if manifest is None:
        raise UserError(f"{prefix}.json: no manifest of {prefix}.bin there to verify it against")
    inspect_pair(prefix)
    manifest.check_every_byte(prefix)


def inspect_pair(prefix: str) -> tuple[PairIndex, str]:
    """Check a pair in constant time.

    Returns:
        What its index says, and its fingerprint.

    Raises:
        UserError: a file is missing, truncated, not an index, or not what its manifest describes.
    """
    for path in (f"{prefix}.bin", f"{prefix}.idx"):
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such file; {prefix}.bin and {prefix}.idx are needed together")
    fingerprint = pair_fingerprint(prefix)
    manifest = PairManifest.read(prefix)
    if manifest is not None:
        manifest.check(prefix, fingerprint)
    index = _read_index(prefix)
    expected = index.num_tokens * index.itemsize
    actual = os.path.getsize(f"{prefix}.bin")
    if actual < expected:
        raise UserError(f"{prefix}.bin: {actual} bytes, but {prefix}.idx says {expected}; the file is truncated")
    if actual > expected:
        raise UserError(
            f"{prefix}.bin: {actual} bytes, but {prefix}.idx says {expected} of {np.dtype(index.dtype).name}; "
            "the two files do not belong together"
        )
    return index, fingerprint


def _read_index(prefix: str) -> PairIndex:
    path = f"{prefix}.idx"
    size = os.path.getsize(path)
    with open(path, "rb", buffering=0) as file:
        header = file.read(INDEX_HEADER.size)
        if len(header) < INDEX_HEADER.size or header[: len(INDEX_MAGIC)] != INDEX_MAGIC:
            raise UserError(f"{path}: not a Megatron index (bad header)")
        _, version, code, num_sequences, num_bounds = INDEX_HEADER.unpack(header)
        if version != INDEX_VERSION:
            raise UserError(f"{path}: version {version} of the Megatron index, but only {INDEX_VERSION} can be read")
        if code not in DTYPE_CODES:
            raise UserError(f"{path}: dtype code {code}; token ids have one of {sorted(DTYPE_CODES)}")
        pointers = INDEX_HEADER.size + _LENGTH_BYTES * num_sequences
        bounds = pointers + _POINTER_BYTES * num_sequences
        expected = bounds + _POINTER_BYTES * num_bounds
        if size < expected:
            raise UserError(f"{path}: {size} bytes, but its header's counts need {expected}; the file is truncated")
        if num_sequences == 0 or num_bounds < 2:
            raise UserError(f"{path}: holds no document")

        def value(position: int, num_bytes: int) -> int:
            file.seek(position)
            return int.from_bytes(file.read(num_bytes), "little")

        first, last = value(bounds, _POINTER_BYTES), value(expected - _POINTER_BYTES, _POINTER_BYTES)
        if (first, last) != (0, num_sequences):
            raise UserError(f"{path}: its documents span sequences {first} to {last} of 0 to {num_sequences}")
        end_pointer = value(bounds - _POINTER_BYTES, _POINTER_BYTES)
        end_length = value(pointers - _LENGTH_BYTES, _LENGTH_BYTES)
    itemsize = np.dtype(DTYPE_CODES[code]).itemsize
    _check_lengths(path, num_sequences, itemsize)
    num_tokens = end_pointer // itemsize + end_length
    if num_tokens == 0:
        raise UserError(f"{path}: holds no token")
    return PairIndex(DTYPE_CODES[code], num_sequences, num_bounds - 1, num_tokens)


def _check_lengths(path: str, num_sequences: int, itemsize: int) -> None:
    """Check, as far as samples tell, that a sequence is as long as its length says where the next one begins.

    Raises:
        UserError: one is not, or the first does not begin at 0.
    """
    end_of_lengths = INDEX_HEADER.size + _LENGTH_BYTES * num_sequences
    for first in np.linspace(0, num_sequences - 1, _SAMPLES, dtype=np.int64).tolist():
        count = min(_SAMPLE_SEQUENCES, num_sequences - first)
        lengths = np.fromfile(path, "<i4", count, offset=INDEX_HEADER.size + _LENGTH_BYTES * first)
        begins = np.fromfile(path, "<i8", count, offset=end_of_lengths + _POINTER_BYTES * first)
        wrong = np.flatnonzero(np.diff(begins) != lengths[:-1].astype(np.int64) * itemsize)
        if len(wrong) or (first == 0 and begins[0] != 0):
            sequence = first + int(wrong[0]) if len(wrong) else 0
            raise UserError(
                f"{path}: sequence {sequence} (counted from 0) has {lengths[sequence - first]} tokens of {itemsize} "
                f"bytes by its length, but another number by where it begins and ends; the index is damaged"
            )


def _quiet_indexed_dataset(prefix: str) -> "IndexedDataset":
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # megatron-core warns on import of every fused kernel that is not installed
        # It reports every step of opening at INFO, which a program's own logging would show.
        logger = logging.getLogger("megatron")
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.WARNING)
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        return IndexedDataset(prefix, mmap=True)


def _hex_digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
