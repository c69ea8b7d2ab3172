"""What text and JSON files share: UTF-8 lines, perhaps compressed, and a cut where a document ends."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, ClassVar, NamedTuple

from peer_scale.corpus.formats.base import BYTE_ORDER_MARK, FileSlice, FileSource, named_failures
from peer_scale.corpus.formats.compression import open_decompressed, split_compression
from peer_scale.errors import UserError

FRAGMENT_BYTES = 1 << 20
"""How much of a line is held at once, so that a line of any length can be gone through."""

TO_THE_END = sys.maxsize
"""Where the slice of a compressed file stops: nobody knows its length before it is read."""

HEAD_BYTES = 1 << 16
"""How much of a file's beginning is looked at to see what it is."""

_BLOCK_BYTES = 1 << 17
_UNWRITTEN = b"\0" * 64  # as a download, or a crash, may leave in a file
_UTF8_MARK = BYTE_ORDER_MARK.encode()
# First bytes of the characters that str.strip takes for white space and bytes.strip does not, and of the mark.
_MAY_BEGIN_WHITE_SPACE = frozenset(b"\x1c\x1d\x1e\x1f\xc2\xe1\xe2\xe3" + _UTF8_MARK[:1])
_UTF32_MARKS = (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class Fragment(NamedTuple):
    """A line with its end, or a part of a long line.

    Attributes:
        data: the bytes.
        ends: whether the line ends here; the last one of a file may have no end.
        blank: whether the line has nothing but white space up to here.
    """

    data: bytes
    ends: bool
    blank: bool


@dataclass(frozen=True)
class LineFile(FileSource):
    """A file whose documents end with a line.

    Attributes:
        spans_lines: whether a document goes on up to a blank line; otherwise each line is one.
    """

    spans_lines: ClassVar[bool]

    @classmethod
    def takes(cls, name: str) -> bool:
        return super().takes(split_compression(name)[0])

    @property
    def is_compressed(self) -> bool:
        """Whether the name says that the file is compressed, so that it cannot be cut."""
        return split_compression(self.name)[1] != ""

    def slices(self, slice_bytes: int) -> Iterator[FileSlice]:
        if self.is_compressed:
            yield FileSlice(self, 0, TO_THE_END, self.num_bytes)
            return
        size, start = self.num_bytes, 0
        with named_failures(self.name), open(self.name, "rb") as file:
            while start < size:
                stop = min(self._document_end(file, start + slice_bytes), size)
                yield FileSlice(self, start, stop, stop - start)
                start = stop

    def fragments(self, start: int) -> Iterator[Fragment]:
        """Read the content from a byte on; of a compressed file, from 0."""
        with open_decompressed(self.name) as file:
            if start:
                file.seek(start)
            yield from read_fragments(file)

    def head(self) -> bytes:
        """Read the beginning of the content.

        Raises:
            UserError: it is in UTF-16 or UTF-32.
        """
        head = read_head(self.name)
        encoding = other_encoding(head)
        if encoding:
            raise UserError(f"{self.name}: {encoding}, not UTF-8; convert the file to UTF-8")
        return head

    def decode(self, data: bytes, position: int) -> str:
        """Return the text of bytes that begin at `position` of the content.

        Raises:
            UserError: they are not UTF-8, or were never written: what was to come is a run of zeros.
        """
        unwritten = data.find(_UNWRITTEN)
        if unwritten >= 0:
            raise UserError(f"{self.name}: zeros from byte {position + unwritten} on; the file was not written whole")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            place = f"byte {position + error.start}" + (" of its content" if self.is_compressed else "")
            raise UserError(f"{self.name}: not UTF-8 at {place}; convert the file to UTF-8") from error

    def _document_end(self, file: BinaryIO, position: int) -> int:
        """Find the first end of a document after a position that may be anywhere inside a line."""
        file.seek(position)
        whole_line = False  # whether the line was read from its beginning, so that it is known to be blank
        for data, ends, blank in read_fragments(file):
            position += len(data)
            if ends:
                if not self.spans_lines or (blank and whole_line):
                    break
                whole_line = True
        return position


def read_head(path: str) -> bytes:
    """Read the beginning of a file's content, through its compression.

    Raises:
        UserError: it cannot be read; the message names it.
    """
    with named_failures(path), open_decompressed(path) as file:
        return file.read(HEAD_BYTES)


def other_encoding(head: bytes) -> str | None:
    """Name the encoding that a file's beginning shows where it is UTF-16 or UTF-32; else return None.

    UTF-16 without a mark shows by its zero bytes, which are every other byte of western text.
    """
    if head.startswith(_UTF32_MARKS):
        return "UTF-32"
    if head.startswith(_UTF16_MARKS):
        return "UTF-16"
    return "UTF-16 or no text" if head.count(0) * 4 > len(head) else None


def read_fragments(file: BinaryIO) -> Iterator[Fragment]:
    r"""Yield lines, long ones in fragments of whole characters, so that none is held whole.

    Lines end with \n, \r\n or \r, and also with \r\r\n, which is a line end that was translated twice.
    """
    blank = at_start = True
    for data in _lines(file):
        ends = data.endswith((b"\n", b"\r"))
        blank = (at_start or blank) and is_blank(data)
        yield Fragment(data, ends, blank)
        at_start = ends


def is_blank(data: bytes) -> bool:
    """Say whether there is nothing but white space, as str.strip knows it, and byte order marks."""
    stripped = data.strip()
    if not stripped or stripped[0] not in _MAY_BEGIN_WHITE_SPACE:
        return not stripped
    return not stripped.decode("utf-8", "replace").replace(BYTE_ORDER_MARK, "").strip()


def count_lines(blocks: Iterable[bytes]) -> int:
    """Count the ends of lines, as `read_fragments` knows them."""
    number, held = 0, b""
    for block in blocks:
        data = held + block
        body = data.rstrip(b"\r")  # the rest may belong to the end that the next block begins with
        held = data[len(body) :]
        number += body.count(b"\n") + body.count(b"\r") - body.count(b"\r\n") - body.count(b"\r\r\n")
    return number + len(held)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield lines with their ends; of a line that is longer than a fragment, the beginning without an end."""
    rest = b""
    while block := file.read(_BLOCK_BYTES):
        data = rest + block
        lines = data.splitlines(keepends=True)
        # The next block may go on with an unfinished line, or with the line feed of these carriage returns.
        open_lines = len(data) - len(data.rstrip(b"\r")) or int(not data.endswith(b"\n"))
        finished = len(lines) - open_lines
        rest = b"".join(lines[finished:])
        yield from _with_doubled_ends(lines[:finished], data)
        if len(rest) >= FRAGMENT_BYTES:
            cut = character_end(rest, len(rest.rstrip(b"\r")) or len(rest))
            yield rest[:cut]
            rest = rest[cut:]
    yield from _with_doubled_ends(rest.splitlines(keepends=True), rest)


def _with_doubled_ends(lines: list[bytes], data: bytes) -> list[bytes]:
    r"""Put \r\r\n, which splitlines takes for two ends, back to its line."""
    if b"\r\r\n" not in data:
        return lines
    joined: list[bytes] = []
    for line in lines:
        if line == b"\r\n" and joined and joined[-1].endswith(b"\r"):
            joined[-1] += line
        else:
            joined.append(line)
    return joined


def character_end(data: bytes | bytearray, stop: int) -> int:
    """Return the last end of a whole UTF-8 character up to `stop`, which is itself taken for one if none is near."""
    start = stop - 1  # of the last character
    while start > max(0, stop - 4) and data[start] & 0xC0 == 0x80:  # continuation bytes
        start -= 1
    return start or stop
