"""What text and JSON-lines files share: UTF-8 lines, and a cut where a document ends."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, ClassVar

from peer_scale.corpus.formats.base import FileSlice, FileSource
from peer_scale.errors import UserError

FRAGMENT_BYTES = 1 << 20
"""How much of a line is read at once, so that a line of any length can be gone through."""


@dataclass(frozen=True)
class LineFile(FileSource):
    """A file whose documents end with a line.

    Attributes:
        spans_lines: whether a document goes on up to a blank line; otherwise each line is one.
    """

    spans_lines: ClassVar[bool]

    def slices(self, slice_bytes: int) -> Iterator[FileSlice]:
        size, start = self.num_bytes, 0
        with open(self.name, "rb") as file:
            while start < size:
                stop = min(self._document_end(file, start + slice_bytes), size)
                yield FileSlice(self, start, stop, stop - start)
                start = stop

    def decode(self, data: bytes, position: int) -> str:
        """Return the text of bytes that begin at `position` of the file, without a byte order mark.

        Raises:
            UserError: they are not UTF-8.
        """
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            place = position + error.start
            raise UserError(f"{self.name}: not UTF-8 at byte {place}; convert the file to UTF-8") from error
        return text.removeprefix("\ufeff") if position == 0 else text

    def _document_end(self, file: BinaryIO, position: int) -> int:
        """Find the first end of a document after a position that may be anywhere inside a line."""
        file.seek(position)
        whole_line = False  # whether the line was read from its beginning, so that it is known to be blank
        for fragment, blank in read_fragments(file):
            position += len(fragment)
            if fragment.endswith(b"\n"):
                if not self.spans_lines or (blank and whole_line):
                    break
                whole_line = True
        return position


def read_fragments(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Yield (line, whether it is blank), long lines in fragments, so that none is held whole."""
    at_start = True
    while fragment := file.readline(FRAGMENT_BYTES):
        ends = fragment.endswith(b"\n") or len(fragment) < FRAGMENT_BYTES
        yield fragment, at_start and ends and not fragment.strip()
        at_start = ends
