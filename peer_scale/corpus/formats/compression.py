"""Compressed files as streams of what they hold; the ending of a name says how a file is compressed."""

import contextlib
import io
import lzma
import os
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

_ARROW_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_XZ = ".xz"
COMPRESSION_ENDINGS = (*_ARROW_CODECS, _XZ)
_BUFFER_BYTES = 1 << 17
_XZ_PADDING = b"\0\0\0\0"  # between streams


def split_compression(name: str) -> tuple[str, str]:
    """Split the ending of a compression off a name: `a.txt.GZ` into `a.txt` and `.gz`, `a.txt` into itself and ``."""
    base, ending = os.path.splitext(name)
    return (base, ending.lower()) if ending.lower() in COMPRESSION_ENDINGS else (name, "")


@contextlib.contextmanager
def open_decompressed(path: str) -> Iterator[BinaryIO]:
    """Open a file, through its compression where it has one; a compressed one can only be read from its beginning.

    Files of several members, one after the other, are read to their end. Where one is cut short or damaged, reading
    raises what `base.FAILURES` lists; the standard library's readers would end silently before a damaged member.
    """
    ending = split_compression(path)[1]
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(open(path, "rb"))
        if ending == _XZ:
            file = io.BufferedReader(_XzStream(file), _BUFFER_BYTES)
        elif ending:
            import pyarrow

            stream = pyarrow.CompressedInputStream(file, _ARROW_CODECS[ending])
            file = stack.enter_context(io.BufferedReader(stream, _BUFFER_BYTES))
        yield cast(BinaryIO, file)


class _XzStream(io.RawIOBase):
    """The content of the streams of an .xz file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decompressor: lzma.LZMADecompressor | None = None
        self._packed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            if not self._packed and (self._decompressor is None or self._decompressor.needs_input):
                self._packed = self._file.read(_BUFFER_BYTES)
            if self._decompressor is None:
                self._packed = self._without_padding()
                if not self._packed:
                    return 0
                self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            if not self._packed and self._decompressor.needs_input:
                raise EOFError("the last stream is cut short")
            data = self._decompressor.decompress(self._packed, max_length=len(buffer))
            self._packed = b""
            if self._decompressor.eof:
                self._packed, self._decompressor = self._decompressor.unused_data, None
        buffer[: len(data)] = data
        return len(data)

    def _without_padding(self) -> bytes:
        packed = self._packed
        while True:
            while packed.startswith(_XZ_PADDING):
                packed = packed[len(_XZ_PADDING) :]
            if packed.strip(b"\0") or not (more := self._file.read(_BUFFER_BYTES)):
                return packed
            packed += more
