"""JSON lines, and JSON files of other shapes: objects, one of whose keys holds the text of a document."""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

from peer_scale.corpus.formats.base import BYTE_ORDER_MARK, FileSlice, Piece, usable_documents
from peer_scale.corpus.formats.compression import open_decompressed
from peer_scale.corpus.formats.json_values import iter_json_values, reason
from peer_scale.corpus.formats.lines import HEAD_BYTES, TO_THE_END, LineFile, count_lines
from peer_scale.errors import UserError

_BLOCK_BYTES = 1 << 20
_SPACE = " \t\r\n" + BYTE_ORDER_MARK


@dataclass(frozen=True)
class JsonFile(LineFile):
    """A file of JSON objects: one per line, or spread over lines (arrays, pretty-printed), which cannot be cut.

    Blank lines are passed over, and objects whose text is null, empty or white space.
    """

    endings: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson", ".json")
    spans_lines: ClassVar[bool] = False

    def slices(self, slice_bytes: int) -> Iterator[FileSlice]:
        if has_value_per_line(self.head()):
            yield from super().slices(slice_bytes)
        else:
            yield FileSlice(self, 0, TO_THE_END, self.num_bytes)

    def pieces(self, start: int, stop: int, text_key: str) -> Iterator[Piece]:
        by_line = start > 0 or has_value_per_line(self.head())
        texts = self._texts_of_lines(start, stop, text_key) if by_line else self._texts_of_values(text_key)
        for document in usable_documents(texts):
            yield Piece(document, True)

    def _texts_of_lines(self, start: int, stop: int, text_key: str) -> Iterator[str | None]:
        for number, (position, line) in enumerate(self._lines(start, stop), 1):
            if not line:
                continue
            try:
                text = self.decode(line, position).removeprefix(BYTE_ORDER_MARK)
                yield _text_of(_parsed(text), text_key)
            except _BadRecordError as error:
                raise self._fail(self._lines_before(start) + number, str(error)) from error

    def _lines(self, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """Yield (position, line) of the lines that begin in a slice; the blank ones as empty."""
        position, fragments = start, list[bytes]()
        for data, ends, blank in self.fragments(start):
            if not fragments and position >= stop:
                return
            fragments.append(data)
            if ends:
                line = b"".join(fragments)
                position += len(line)
                yield position - len(line), b"" if blank else line
                fragments = []
        if fragments and not blank:
            yield position, b"".join(fragments)

    def _texts_of_values(self, text_key: str) -> Iterator[str | None]:
        with open_decompressed(self.name) as file:
            for line, record in iter_json_values(self._decoded(file), self._fail):
                try:
                    yield _text_of(record, text_key)
                except _BadRecordError as error:
                    raise self._fail(line, str(error)) from error

    def _decoded(self, file: BinaryIO) -> Iterator[str]:
        decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
        while True:
            block = file.read(_BLOCK_BYTES)
            begun = decoder.getstate()[0]  # bytes of a character that goes on in this block
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError:
                self.decode(begun + block, position - len(begun))  # which tells the place
                raise
            if not block:
                return
            position += len(block)

    def _fail(self, line: int, problem: str) -> UserError:
        return UserError(f"{self.name}, line {line}: {problem}")

    def _lines_before(self, position: int) -> int:
        """Count the lines that end before a byte of the content."""

        def blocks() -> Iterator[bytes]:
            left = position
            with open_decompressed(self.name) as file:
                while left > 0 and (block := file.read(min(left, _BLOCK_BYTES))):
                    yield block
                    left -= len(block)

        return count_lines(blocks())


class _BadRecordError(ValueError):
    """What is wrong with a record."""


def has_value_per_line(head: bytes) -> bool:
    """Say of a file's beginning whether its first line with something in it is a JSON value, or damaged.

    Otherwise it is the beginning of a value or array that goes on in the next line.
    """
    text = head.decode("utf-8", "replace").lstrip(_SPACE)
    if not text.startswith("{"):
        return not text.startswith("[")
    line = text.replace("\r", "\n").partition("\n")[0].rstrip()
    if len(line) == len(text.rstrip()) and len(head) == HEAD_BYTES:
        return True  # longer than what is seen; a value that is spread over lines has shorter ones
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos < len(line)
    except (ValueError, RecursionError):
        return True
    return True


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _BadRecordError(f"not JSON ({reason(error)}); every line must be one JSON object") from error


def _text_of(record: Any, text_key: str) -> str | None:
    if not isinstance(record, dict):
        raise _BadRecordError(f"a JSON {type(record).__name__}, not an object with the key {text_key!r}")
    if text_key not in record:
        raise _BadRecordError(f"no key {text_key!r}; its keys are {', '.join(record)} (--text-key names one)")
    text = record[text_key]
    if text is not None and not isinstance(text, str):
        raise _BadRecordError(f"the value of {text_key!r} is a {type(text).__name__}, not a string")
    return text
