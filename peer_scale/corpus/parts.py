"""Part files (a slice of the input as tokens and document lengths) and their merging into one `.bin/.idx`."""

import hashlib
import itertools
import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from peer_scale.corpus.readers import Slice, iter_pieces
from peer_scale.corpus.store import DTYPE_CODES, INDEX_HEADER, INDEX_MAGIC, INDEX_VERSION
from peer_scale.corpus.wordpiece import WordPiece
from peer_scale.errors import UserError
from peer_scale.storage import write_aside

# A part is: the tokens, the documents' lengths as int64, and this: number of documents, number of tokens, magic.
_TRAILER = struct.Struct("<QQ8s")
_MAGIC = b"PEERPART"
_BATCH_CHARS = 1 << 19  # text handed to the tokenizer at once; its result is some hundred times larger than the ids
_MAX_DOCUMENT_TOKENS = np.iinfo(np.int32).max  # the .idx holds lengths as int32
_COPY_BYTES = 1 << 22
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Task:
    """What one part is made of: slices of files, or the texts themselves where they come from a stream."""

    name: str
    slices: tuple[Slice, ...] = ()
    texts: tuple[str, ...] = ()
    num_bytes: int = 0


@dataclass(frozen=True)
class Part:
    """A finished part file."""

    path: str
    num_documents: int
    num_tokens: int


@dataclass(frozen=True)
class WrittenFile:
    """Size and sha256 of a merged file."""

    num_bytes: int
    sha256: str


def token_dtype(vocab_size: int) -> type[np.integer]:
    """Returns uint16 where every id fits, else int32."""
    return np.uint16 if vocab_size - 1 <= np.iinfo(np.uint16).max else np.int32


def write_part(task: Task, path: str, tokenizer: WordPiece, text_key: str) -> Part:
    """Tokenises a task into a part file; runs in a worker process.

    Raises:
        UserError: as `readers.iter_documents`, or a document is too long for the index.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    dtype = token_dtype(tokenizer.vocab_size)
    lengths, length, num_tokens = array("q"), 0, 0
    with write_aside(path) as file:
        for batch in _batches(_task_pieces(task, text_key)):
            for ids, (_, ends) in zip(tokenizer.encode([text for text, _ in batch]), batch, strict=True):
                file.write(np.array(ids, dtype=dtype).tobytes())
                length += len(ids)
                if length > _MAX_DOCUMENT_TOKENS:
                    names = ", ".join(part.path for part in task.slices)
                    raise UserError(f"{names}: a document of over {_MAX_DOCUMENT_TOKENS} tokens; cut it by blank lines")
                if ends and length:
                    lengths.append(length)
                    num_tokens += length
                    length = 0
        file.write(lengths.tobytes())
        file.write(_TRAILER.pack(len(lengths), num_tokens, _MAGIC))
    return Part(path, len(lengths), num_tokens)


def read_part(path: str, dtype: type[np.integer]) -> Part | None:
    """Returns what a finished part holds, None where there is none."""
    if not os.path.exists(path):
        return None
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(size - _TRAILER.size, 0))
        trailer = file.read()
    if len(trailer) < _TRAILER.size:
        return None
    num_documents, num_tokens, magic = _TRAILER.unpack(trailer)
    expected = num_tokens * np.dtype(dtype).itemsize + num_documents * 8 + _TRAILER.size
    return Part(path, num_documents, num_tokens) if magic == _MAGIC and size == expected else None


def merge_bin(parts: Sequence[Part], path: str, dtype: type[np.integer]) -> WrittenFile:
    """Joins the parts' tokens into a `.bin`."""
    return _write_hashed(path, (block for part in parts for block in _token_blocks(part, dtype)))


def merge_index(parts: Sequence[Part], path: str, dtype: type[np.integer]) -> WrittenFile:
    """Makes the `.idx` of the parts, one sequence a document, without holding a whole array of it."""
    return _write_hashed(path, _index_blocks(parts, dtype))


def _task_pieces(task: Task, text_key: str) -> Iterator[tuple[str, bool]]:
    whole = itertools.chain(
        itertools.chain.from_iterable(iter_pieces(part, text_key) for part in task.slices),
        ((text, True) for text in task.texts),
    )
    for text, ends in whole:
        start = 0
        while len(text) - start > _BATCH_CHARS:
            # Cut after white space, which no token reaches across.
            cut = text.rfind(" ", start, start + _BATCH_CHARS) + 1 or start + _BATCH_CHARS
            yield text[start:cut], False
            start = cut
        yield text[start:], ends


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_hashed(path: str, blocks: Iterable[bytes]) -> WrittenFile:
    digest, num_bytes = hashlib.sha256(), 0
    with write_aside(path) as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
            num_bytes += len(block)
    return WrittenFile(num_bytes, digest.hexdigest())


def _token_blocks(part: Part, dtype: type[np.integer]) -> Iterator[bytes]:
    with open(part.path, "rb") as file:
        yield from _read_blocks(file, part.num_tokens * np.dtype(dtype).itemsize)


def _read_blocks(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    while num_bytes > 0:
        block = file.read(min(num_bytes, _COPY_BYTES))
        assert block, f"{file.name} ended {num_bytes} bytes early"
        num_bytes -= len(block)
        yield block


def _length_blocks(parts: Sequence[Part], dtype: type[np.integer]) -> Iterator[np.ndarray]:
    for part in parts:
        with open(part.path, "rb") as file:
            file.seek(part.num_tokens * np.dtype(dtype).itemsize)
            for block in _read_blocks(file, part.num_documents * 8):
                yield np.frombuffer(block, dtype=np.int64)


def _index_blocks(parts: Sequence[Part], dtype: type[np.integer]) -> Iterator[bytes]:
    code = next(code for code, known in DTYPE_CODES.items() if known is dtype)
    count = sum(part.num_documents for part in parts)
    yield INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, code, count, count + 1)
    for lengths in _length_blocks(parts, dtype):
        yield lengths.astype(np.int32).tobytes()
    position = 0
    for lengths in _length_blocks(parts, dtype):
        ends = position + np.cumsum(lengths * np.dtype(dtype).itemsize)
        yield np.concatenate([[position], ends[:-1]]).astype(np.int64).tobytes()
        position = int(ends[-1])
    for start in range(0, count + 1, _CHUNK):
        yield np.arange(start, min(start + _CHUNK, count + 1), dtype=np.int64).tobytes()
