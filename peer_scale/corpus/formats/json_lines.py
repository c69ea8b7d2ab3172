"""JSON lines: one object per line, one of whose keys holds the text of a document."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from peer_scale.corpus.formats.base import Piece, usable_documents
from peer_scale.corpus.formats.lines import LineFile
from peer_scale.errors import UserError

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class JsonLinesFile(LineFile):
    """A file of JSON objects, one per line; blank lines are passed over."""

    endings: ClassVar[tuple[str, ...]] = (".jsonl", ".json")
    spans_lines: ClassVar[bool] = False

    def pieces(self, start: int, stop: int, text_key: str) -> Iterator[Piece]:
        for document in usable_documents(self._texts(start, stop, text_key)):
            yield Piece(document, True)

    def _texts(self, start: int, stop: int, text_key: str) -> Iterator[str]:
        with open(self.name, "rb") as file:
            file.seek(start)
            position = start
            while position < stop and (line := file.readline()):
                text = self.decode(line, position)
                if text.strip():
                    yield self._text_of(text, text_key, position)
                position += len(line)

    def _text_of(self, line: str, text_key: str, position: int) -> str:
        def fail(problem: str) -> UserError:
            return UserError(f"{self.name}, line {_line_number(self.name, position)}: {problem}")

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
    """Return the number, from 1, of the line that begins at a byte of the file."""
    number = 1
    with open(path, "rb") as file:
        while position > 0 and (block := file.read(min(position, _BLOCK_BYTES))):
            number += block.count(b"\n")
            position -= len(block)
    return number
