"""Plain text: documents of any length with blank lines between them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from peer_scale.corpus.formats.base import Piece
from peer_scale.corpus.formats.lines import LineFile, read_fragments

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class TextFile(LineFile):
    """A text file in UTF-8."""

    endings: ClassVar[tuple[str, ...]] = (".txt",)
    spans_lines: ClassVar[bool] = True

    def pieces(self, start: int, stop: int, text_key: str) -> Iterator[Piece]:
        with open(self.name, "rb") as file:
            file.seek(start)
            position, buffer, inside = start, bytearray(), False
            for fragment, blank in read_fragments(file):
                if position >= stop:
                    break
                if blank:
                    if inside:
                        yield Piece(self.decode(bytes(buffer), position - len(buffer)), True)
                    buffer, inside = bytearray(), False
                else:
                    buffer += fragment
                    inside = True
                position += len(fragment)
                if len(buffer) >= _PIECE_BYTES:
                    cut = _cut(buffer)
                    yield Piece(self.decode(bytes(buffer[:cut]), position - len(buffer)), False)
                    del buffer[:cut]
            if inside:
                yield Piece(self.decode(bytes(buffer), position - len(buffer)), True)


def _cut(buffer: bytearray) -> int:
    """Find where a long text can be cut without cutting a word, or at least no character."""
    cut = max(buffer.rfind(b"\n"), buffer.rfind(b" ")) + 1
    if cut == 0:
        cut = len(buffer) - 1
        while cut > len(buffer) - 4 and buffer[cut] & 0xC0 == 0x80:  # UTF-8 continuation bytes
            cut -= 1
    return cut
