"""Raw text in its usual forms as a stream of documents: text, JSON lines, parquet, folders, hub data sets, built-in."""

import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from peer_scale.corpus.builtin import iter_builtin_documents
from peer_scale.errors import UserError

BUILTIN = "builtin"
_KINDS = {".txt": "text", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_ENDINGS = ", ".join(_KINDS)
# owner/name or name, optionally followed by :configuration
_HUB_ID = re.compile(r"^\w[\w.-]*(?:/[\w.-]+)?(?::[\w.-]+)?$")
_PIECE_BYTES = 1 << 20
_PARQUET_ROWS = 1024


@dataclass(frozen=True)
class Slice:
    """A part of a file that ends where a document ends.

    Attributes:
        path: the file.
        kind: "text", "jsonl" or "parquet".
        start: first byte, or first row group of a parquet file.
        stop: the byte or row group after the last one.
        num_bytes: how much there is to read, as it lies on disk.
    """

    path: str
    kind: str
    start: int
    stop: int
    num_bytes: int


@dataclass(frozen=True)
class Stream:
    """A source without files: the built-in corpus or a hub data set, by its name."""

    name: str


def iter_documents(paths: Sequence[str], text_key: str = "text") -> Iterator[str]:
    """Yields the documents of every path in turn; only one document at a time is held in memory.

    Args:
        paths: .txt files (blank lines separate documents), .jsonl/.json files (one object a line), .parquet files,
            folders of these, Hugging Face data set ids (`owner/name`, or `owner/name:configuration`), or `builtin`.
        text_key: the key or column that holds the text.

    Raises:
        UserError: a path is missing, holds no document, is not UTF-8, or its JSON or columns are not as they should be.
    """
    for path in paths:
        empty = True
        for source in find_sources([path]):
            for document in _source_documents(source, text_key):
                empty = False
                yield document
        if empty:
            raise UserError(f"{path}: holds no document")


def find_sources(paths: Sequence[str]) -> list[str | Stream]:
    """Resolves paths into files and streams, in order, folders recursively and sorted.

    Raises:
        UserError: a path does not exist (nor can it be a hub id), has another ending, or is empty.
    """
    sources: list[str | Stream] = []
    for path in paths:
        if path == BUILTIN:
            sources.append(Stream(path))
        elif os.path.isdir(path):
            sources += _folder_files(path)
        elif os.path.exists(path):
            _kind(path)
            if os.path.getsize(path) == 0:
                raise UserError(f"{path}: the file is empty")
            sources.append(path)
        elif _HUB_ID.match(path) and os.path.splitext(path)[1] not in _KINDS:
            sources.append(Stream(path))
        else:
            raise UserError(f"{path}: no such file or folder")
    return sources


def slice_file(path: str, slice_bytes: int) -> Iterator[Slice]:
    """Cuts a file at document ends into slices of about `slice_bytes`, without reading it through."""
    kind = _kind(path)
    if kind == "parquet":
        yield from _row_group_slices(path, slice_bytes)
        return
    size, start = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while start < size:
            stop = min(_document_end(file, start + slice_bytes, kind), size)
            yield Slice(path, kind, start, stop, stop - start)
            start = stop


def iter_pieces(part: Slice, text_key: str) -> Iterator[tuple[str, bool]]:
    """Yields (text, whether a document ends with it); only text files come in several pieces a document."""
    if part.kind == "text":
        yield from _text_pieces(part)
        return
    documents = _jsonl_documents if part.kind == "jsonl" else _parquet_documents
    for document in documents(part, text_key):
        yield _without_surrogates(document), True


def iter_stream(stream: Stream, text_key: str) -> Iterator[str]:
    """Yields the documents of a stream.

    Raises:
        UserError: the name is neither a path nor a data set that can be loaded, or it lacks the column.
    """
    if stream.name == BUILTIN:
        yield from iter_builtin_documents()
        return
    name, _, configuration = stream.name.partition(":")
    from huggingface_hub import HfApi

    try:
        # Asked first because load_dataset tries half a minute for a name that nothing answers to.
        revision = HfApi().dataset_info(name).sha
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{stream.name}: neither an existing path nor a data set that can be loaded ({reason})"
        ) from error
    yield from load_hub_documents(name, configuration or None, revision, text_key)


def load_hub_documents(name: str, configuration: str | None, revision: str | None, text_key: str) -> Iterator[str]:
    """Streams the text of a data set's `train` split through the `datasets` library.

    Raises:
        UserError: it cannot be loaded, has no such column, or a value of it is not a string.
    """
    import datasets

    try:
        rows = iter(datasets.load_dataset(name, configuration, split="train", revision=revision, streaming=True))
        first = next(rows, None)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: the data set's train split cannot be loaded ({reason})") from error
    for row in itertools.chain([first] if first else [], rows):
        if text_key not in row:
            raise UserError(f"{name}: no column {text_key!r}; its columns are {', '.join(row)} (--text-key names one)")
        text = row[text_key]
        if text is not None and not isinstance(text, str):
            raise UserError(f"{name}: column {text_key!r} holds {type(text).__name__}, not strings")
        if text and not text.isspace():
            yield _without_surrogates(text)


def _source_documents(source: str | Stream, text_key: str) -> Iterator[str]:
    if isinstance(source, Stream):
        yield from iter_stream(source, text_key)
        return
    pieces: list[str] = []
    for part in slice_file(source, os.path.getsize(source)):
        for text, ends in iter_pieces(part, text_key):
            pieces.append(text)
            if ends:
                yield "".join(pieces)
                pieces = []


def _kind(path: str) -> str:
    kind = _KINDS.get(os.path.splitext(path)[1].lower())
    if kind is None:
        raise UserError(f"{path}: unknown kind of file; the endings read are {_ENDINGS}")
    return kind


def _folder_files(folder: str) -> list[str]:
    found: list[str] = []
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(parent))
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(parent, name)) not in visited
        ]
        files = (os.path.join(parent, name) for name in names if not name.startswith("."))
        found += [file for file in files if os.path.splitext(file)[1].lower() in _KINDS and os.path.getsize(file)]
    if not found:
        raise UserError(f"{folder}: the folder holds no file with text in it ({_ENDINGS})")
    return sorted(found)


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Yields (line, whether it is blank), lines longer than a piece in fragments, so that none is held whole."""
    at_start = True
    while fragment := file.readline(_PIECE_BYTES):
        whole = fragment.endswith(b"\n") or len(fragment) < _PIECE_BYTES
        yield fragment, at_start and whole and not fragment.strip()
        at_start = whole


def _document_end(file: BinaryIO, position: int, kind: str) -> int:
    """Finds the first document end after a position that may be anywhere inside a line."""
    file.seek(position)
    position_in_line = True
    for fragment, blank in _lines(file):
        position += len(fragment)
        if fragment.endswith(b"\n") and (kind == "jsonl" or (blank and not position_in_line)):
            break
        position_in_line = position_in_line and not fragment.endswith(b"\n")
    return position


def _text_pieces(part: Slice) -> Iterator[tuple[str, bool]]:
    with open(part.path, "rb") as file:
        file.seek(part.start)
        position, buffer, inside = part.start, bytearray(), False
        for fragment, blank in _lines(file):
            if position >= part.stop:
                break
            if blank:
                if inside:
                    yield _decode(bytes(buffer), part.path, position - len(buffer)), True
                buffer, inside = bytearray(), False
            else:
                buffer += fragment
                inside = True
            position += len(fragment)
            if len(buffer) >= _PIECE_BYTES:
                cut = _cut(buffer)
                yield _decode(bytes(buffer[:cut]), part.path, position - len(buffer)), False
                del buffer[:cut]
        if inside:
            yield _decode(bytes(buffer), part.path, position - len(buffer)), True


def _cut(buffer: bytearray) -> int:
    """Finds where a long text can be cut without cutting a word, or at least no character."""
    cut = max(buffer.rfind(b"\n"), buffer.rfind(b" ")) + 1
    if cut == 0:
        cut = len(buffer) - 1
        while cut > len(buffer) - 4 and buffer[cut] & 0xC0 == 0x80:  # UTF-8 continuation bytes
            cut -= 1
    return cut


def _decode(data: bytes, path: str, position: int) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {position + error.start}; convert the file to UTF-8") from error
    return text.removeprefix("\ufeff") if position == 0 else text


def _jsonl_documents(part: Slice, text_key: str) -> Iterator[str]:
    with open(part.path, "rb") as file:
        file.seek(part.start)
        position = part.start
        while position < part.stop and (line := file.readline()):
            text = _decode(line, part.path, position)
            if text.strip():
                document = _text_of(text, text_key, part.path, position)
                if document and not document.isspace():
                    yield document
            position += len(line)


def _text_of(line: str, text_key: str, path: str, position: int) -> str:
    def fail(problem: str) -> UserError:
        return UserError(f"{path}, line {_line_number(path, position)}: {problem}")

    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise fail(f"not JSON ({error}); every line must be one JSON object") from error
    if not isinstance(record, dict):
        raise fail(f"a JSON {type(record).__name__}, not an object with the key {text_key!r}")
    if text_key not in record:
        raise fail(f"no key {text_key!r}; its keys are {', '.join(record)} (--text-key names one)")
    if not isinstance(record[text_key], str):
        raise fail(f"the value of {text_key!r} is a {type(record[text_key]).__name__}, not a string")
    return record[text_key]


def _line_number(path: str, position: int) -> int:
    number = 1
    with open(path, "rb") as file:
        while position > 0 and (block := file.read(min(position, _PIECE_BYTES))):
            number += block.count(b"\n")
            position -= len(block)
    return number


def _without_surrogates(text: str) -> str:
    """Replaces halves of surrogate pairs, which JSON may hold but UTF-8, and so a tokenizer, cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _open_parquet(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a parquet file ({' '.join(str(error).split())})") from error


def _row_group_slices(path: str, slice_bytes: int) -> Iterator[Slice]:
    with _open_parquet(path) as file:
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    start = unpacked = packed = 0
    for number, group in enumerate(groups):
        unpacked += group.total_byte_size
        packed += sum(group.column(column).total_compressed_size for column in range(group.num_columns))
        if unpacked >= slice_bytes or number + 1 == len(groups):
            yield Slice(path, "parquet", start, number + 1, packed)
            start, unpacked, packed = number + 1, 0, 0


def _parquet_documents(part: Slice, text_key: str) -> Iterator[str]:
    import pyarrow

    with _open_parquet(part.path) as file:
        names = file.schema_arrow.names
        if text_key not in names:
            raise UserError(f"{part.path}: no column {text_key!r}; it has {', '.join(names)} (--text-key names one)")
        kind = file.schema_arrow.field(text_key).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
            raise UserError(f"{part.path}: column {text_key!r} holds {kind}, not strings")
        groups = range(part.start, part.stop)
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=groups, columns=[text_key]):
            yield from _batch_texts(batch, part.path, text_key)


def _batch_texts(batch: Any, path: str, text_key: str) -> list[str]:
    try:
        texts = batch.column(text_key).to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: column {text_key!r} holds text that is not UTF-8") from error
    return [text for text in texts if text and not text.isspace()]  # a null is a row without text
