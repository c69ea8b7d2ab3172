"""Part files (a slice of the input as tokens and document lengths) and their merging into one `.bin/.idx`."""

import hashlib
import itertools
import os
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from peer_scale.corpus.formats.base import FileSlice, FileSource, Source
from peer_scale.corpus.store import DTYPE_CODES, INDEX_HEADER, INDEX_MAGIC, INDEX_VERSION
from peer_scale.corpus.unknown import UnknownCounts
from peer_scale.corpus.wordpiece import WordPiece
from peer_scale.errors import UserError
from peer_scale.storage import write_aside

T = TypeVar("T")

# A part is: the tokens, the documents' lengths as int64, and this: number of documents, number of tokens, what of the
# text became [UNK], magic.
_TRAILER = struct.Struct(f"<QQ{len(fields(UnknownCounts))}Q8s")
_MAGIC = b"PEERPRT2"
_BATCH_CHARS = 1 << 19  # text handed to the tokenizer at once; its result is some hundred times larger than the ids
_MAX_DOCUMENT_TOKENS = np.iinfo(np.int32).max  # the .idx holds lengths as int32
_COPY_BYTES = 1 << 22
_INDEX_CHUNK = 1 << 20


@dataclass(frozen=True)
class PartInput:
    """What one part is made from: slices of files, or the texts themselves where the source is not a file."""

    name: str
    slices: tuple[FileSlice, ...] = ()
    texts: tuple[str, ...] = ()
    num_bytes: int = 0


@dataclass(frozen=True)
class Part:
    """A finished part file."""

    path: str
    num_documents: int
    num_tokens: int
    unknown: UnknownCounts


@dataclass(frozen=True)
class WrittenFile:
    """Size and sha256 of a merged file."""

    num_bytes: int
    sha256: str


class _Text(NamedTuple):
    """What the tokenizer is given at once: a document or a piece of one, and the name of its file."""

    text: str
    ends_document: bool
    name: str


def token_dtype(vocab_size: int) -> type[np.integer]:
    """Return uint16 where every id fits, else int32."""
    return np.uint16 if vocab_size - 1 <= np.iinfo(np.uint16).max else np.int32


def in_blocks(items: Iterable[T], size_of: Callable[[T], int], block_size: int) -> Iterator[list[T]]:
    """Put items together, in order, until a block has at least `block_size`; the last one may have less."""
    block: list[T] = []
    size = 0
    for item in items:
        block.append(item)
        size += size_of(item)
        if size >= block_size:
            yield block
            block, size = [], 0
    if block:
        yield block


def cut_into_parts(sources: Sequence[Source], text_key: str, part_bytes: int) -> Iterator[PartInput]:
    """Cut the sources, in order, into inputs of about `part_bytes` each; neighbouring small files share one."""
    numbers = itertools.count()
    for are_files, group in itertools.groupby(sources, lambda source: isinstance(source, FileSource)):
        if are_files:
            files = (source for source in group if isinstance(source, FileSource))
            slices = (file_slice for file in files for file_slice in file.slices(part_bytes))
            for block in in_blocks(slices, lambda file_slice: file_slice.num_bytes, part_bytes):
                num_bytes = sum(file_slice.num_bytes for file_slice in block)
                yield PartInput(f"{next(numbers):08d}", slices=tuple(block), num_bytes=num_bytes)
            continue
        for source in group:
            # An eighth, because these travel to the workers through a pipe.
            for texts in in_blocks(source.documents(text_key), len, part_bytes // 8):
                # The content is part of the name, because what a hub serves under a name may change.
                name = f"{next(numbers):08d}-{digest_of(*texts)[:32]}"
                yield PartInput(name, texts=tuple(texts), num_bytes=sum(map(len, texts)))


def digest_of(*texts: str) -> str:
    """Return the sha256 of texts, each after its length in 8 bytes."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogateescape")  # file names need not be UTF-8
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def write_part(part_input: PartInput, path: str, tokenizer: WordPiece, text_key: str) -> Part:
    """Tokenise into a part file; this runs in a worker process.

    Raises:
        UserError: as `formats.base.Source.documents`, or a document is too long for the index.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    dtype = token_dtype(tokenizer.vocab_size)
    lengths, length, num_tokens, unknown = array("q"), 0, 0, UnknownCounts()
    with write_aside(path) as file:
        for batch in in_blocks(_texts(part_input, text_key), lambda piece: len(piece.text), _BATCH_CHARS):
            encoded, counts = tokenizer.encode_and_count([piece.text for piece in batch])
            unknown += counts
            for ids, (_, ends_document, name) in zip(encoded, batch, strict=True):
                file.write(ids.astype(dtype).tobytes())
                length += len(ids)
                if length > _MAX_DOCUMENT_TOKENS:
                    raise UserError(f"{name}: a document of over {_MAX_DOCUMENT_TOKENS} tokens; cut it by blank lines")
                if ends_document and length:
                    lengths.append(length)
                    num_tokens += length
                    length = 0
        file.write(lengths.tobytes())
        file.write(_TRAILER.pack(len(lengths), num_tokens, *astuple(unknown), _MAGIC))
    return Part(path, len(lengths), num_tokens, unknown)


def read_part(path: str, dtype: type[np.integer]) -> Part | None:
    """Return what a finished part holds, None where there is none."""
    if not os.path.exists(path):
        return None
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(size - _TRAILER.size, 0))
        trailer = file.read()
    if len(trailer) < _TRAILER.size:
        return None
    num_documents, num_tokens, *unknown, magic = _TRAILER.unpack(trailer)
    expected = num_tokens * np.dtype(dtype).itemsize + num_documents * 8 + _TRAILER.size
    if magic != _MAGIC or size != expected:
        return None
    return Part(path, num_documents, num_tokens, UnknownCounts(*unknown))


def merge_bin(parts: Sequence[Part], path: str, dtype: type[np.integer]) -> WrittenFile:
    """Join the tokens of the parts into a `.bin`."""
    return _write_hashed(path, (block for part in parts for block in _token_blocks(part, dtype)))


def merge_index(parts: Sequence[Part], path: str, dtype: type[np.integer]) -> WrittenFile:
    """Write the `.idx` of the parts, one sequence per document, without holding a whole array of it."""
    return _write_hashed(path, _index_blocks(parts, dtype))


def _texts(part_input: PartInput, text_key: str) -> Iterator[_Text]:
    from_files = (
        _Text(*piece, file_slice.source.name)
        for file_slice in part_input.slices
        for piece in file_slice.pieces(text_key)
    )
    given = (_Text(text, True, "the data set") for text in part_input.texts)
    for text, ends_document, name in itertools.chain(from_files, given):
        start = 0
        while len(text) - start > _BATCH_CHARS:
            # Cut after white space, which no token reaches across.
            cut = text.rfind(" ", start, start + _BATCH_CHARS) + 1 or start + _BATCH_CHARS
            yield _Text(text[start:cut], False, name)
            start = cut
        yield _Text(text[start:], ends_document, name)


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
    for start in range(0, count + 1, _INDEX_CHUNK):
        yield np.arange(start, min(start + _INDEX_CHUNK, count + 1), dtype=np.int64).tobytes()
