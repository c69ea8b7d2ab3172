"""Plain text: documents of any length with blank lines between them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from peer_scale.corpus.formats.base import BYTE_ORDER_MARK, Piece
from peer_scale.corpus.formats.lines import LineFile, character_end

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class TextFile(LineFile):
    """A text file in UTF-8, plain or compressed."""

    endings: ClassVar[tuple[str, ...]] = (".txt",)
    spans_lines: ClassVar[bool] = True

    def pieces(self, start: int, stop: int, text_key: str) -> Iterator[Piece]:
        if start == 0:
            self.head()  # which refuses other encodings
        position, buffer = start, bytearray()
        inside = begun = False  # whether a document is being read, and whether a piece of it was yielded
        for data, ends, blank in self.fragments(start):
            if position >= stop:
                break
            if blank and ends:
                if inside:
                    yield Piece(self._text(buffer, position, begun), True)
                buffer, inside, begun = bytearray(), False, False
            elif inside or not blank:
                buffer += data
                inside = True
            position += len(data)
            if len(buffer) >= _PIECE_BYTES:
                cut = _cut(buffer)
                yield Piece(self._text(buffer[:cut], position - len(buffer) + cut, begun), False)
                del buffer[:cut]
                begun = True
        if inside:
            yield Piece(self._text(buffer, position, begun), True)

    def _text(self, buffer: bytearray, end: int, begun: bool) -> str:
        text = self.decode(bytes(buffer), end - len(buffer))
        return text if begun else text.removeprefix(BYTE_ORDER_MARK)


def _cut(buffer: bytearray) -> int:
    """Find where a long text can be cut without cutting a word, or at least no character."""
    return max(buffer.rfind(b"\n"), buffer.rfind(b" ")) + 1 or character_end(buffer, len(buffer))
