"""What every format gives: a source of documents and, where it is a file, the slices that it can be read in."""

import contextlib
import hashlib
import lzma
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from peer_scale.errors import UserError

BYTE_ORDER_MARK = "\ufeff"
FAILURES = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged, truncated or vanished file raises; pyarrow's streams raise OSError."""

SAMPLED_BYTES = 1 << 24  # of a file, to tell whether it changed
MIN_SAMPLED_BYTES = 3 << 14
_SAMPLE_BYTES = 1 << 14  # the least that is read at one place
_MAX_SAMPLES = 256


class Piece(NamedTuple):
    """Text of a document, which may come in several pieces."""

    text: str
    ends_document: bool


@dataclass(frozen=True)
class Source(ABC):
    """One input of a corpus. Each format is a subclass.

    A source that is not a file is read by one process, which hands the texts to the workers.

    Attributes:
        name: path of the file, or name of the data set.
    """

    name: str

    @classmethod
    @abstractmethod
    def takes(cls, name: str) -> bool:
        """Say whether a name is one of this format's, without looking whether anything of that name exists."""

    @abstractmethod
    def identity(self, sampled_bytes: int = SAMPLED_BYTES) -> list[str]:
        """Return texts that change when the documents may have changed; prepared corpora are keyed by them.

        Args:
            sampled_bytes: how much of a file may be read for it.
        """

    @abstractmethod
    def documents(self, text_key: str) -> Iterator[str]:
        """Yield the documents in order.

        Args:
            text_key: the key or column that holds the text, in a format that has any.

        Raises:
            UserError: the source cannot be read, or is not what its format asks for.
        """


@dataclass(frozen=True)
class FileSource(Source):
    """A file, which workers read in slices that end where a document ends.

    Attributes:
        endings: how the names of such files end, in lower case.
    """

    endings: ClassVar[tuple[str, ...]]

    @classmethod
    def takes(cls, name: str) -> bool:
        return name.lower().endswith(cls.endings)

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return os.path.getsize(self.name)

    def identity(self, sampled_bytes: int = SAMPLED_BYTES) -> list[str]:
        """Name the file by its path, size, time of modification, and a digest of samples of its content.

        The samples are there because size and time do not tell every change: a program may set the time back, and
        some file systems count whole seconds. The time of the last status change and the inode would tell more, but
        they also change where the content does not: by chmod, or when a job stages its input to a node's own disk.

        What is not noticed: an edit that keeps the file's size and time of modification and lies between all samples.
        A file of up to `sampled_bytes` is read whole, and has no such place.
        """
        with named_failures(self.name):
            status = os.stat(self.name)
            content = _sample(self.name, status.st_size, sampled_bytes)
        return [f"{os.path.abspath(self.name)} {status.st_size} {status.st_mtime_ns} {content}"]

    def slices(self, slice_bytes: int) -> Iterator["FileSlice"]:
        """Cut the file into slices of about `slice_bytes`, without reading it through.

        A format that can only be read from its beginning leaves the file in one slice, as here.
        """
        yield FileSlice(self, 0, self.num_bytes, self.num_bytes)

    @abstractmethod
    def pieces(self, start: int, stop: int, text_key: str) -> Iterator[Piece]:
        """Yield the documents of the slice [start, stop) in pieces that are small beside a worker's memory.

        Raises:
            UserError: as `documents`.
        """

    def documents(self, text_key: str) -> Iterator[str]:
        texts: list[str] = []
        for file_slice in self.slices(self.num_bytes):
            for text, ends_document in file_slice.pieces(text_key):
                texts.append(text)
                if ends_document:
                    yield "".join(texts)
                    texts = []


@dataclass(frozen=True)
class FileSlice:
    """A range of a file that ends where a document ends.

    Attributes:
        source: the file.
        start: what its format counts: the first byte, or the first row group.
        stop: the byte or row group after the last one.
        num_bytes: how much there is to read, as it lies on disk.
    """

    source: FileSource
    start: int
    stop: int
    num_bytes: int

    def pieces(self, text_key: str) -> Iterator[Piece]:
        """Yield the documents of the slice in pieces; `FileSource.pieces` says how.

        Raises:
            UserError: as `FileSource.pieces`, or the file is damaged; it names the file.
        """
        with named_failures(self.source.name):
            yield from self.source.pieces(self.start, self.stop, text_key)


@contextlib.contextmanager
def named_failures(name: str) -> Iterator[None]:
    """Raise what fails while a file is read as a UserError that names the file."""
    try:
        yield
    except FAILURES as error:
        if isinstance(error, OSError) and error.errno and error.strerror:
            raise UserError(f"{name}: {error.strerror}") from error
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: damaged, cut short, or not of the kind that its name says ({reason})") from error


def usable_documents(texts: Iterable[str | None]) -> Iterator[str]:
    """Leave out what holds no text, a byte order mark before a text, and replace halves of surrogate pairs.

    JSON may hold such halves, but UTF-8, and so a tokenizer, cannot.
    """
    for text in texts:
        bare = text.removeprefix(BYTE_ORDER_MARK) if text else ""
        if bare and not bare.isspace():
            yield bare if bare.isascii() else bare.encode("utf-8", "replace").decode("utf-8")


def _sample(path: str, size: int, sampled_bytes: int) -> str:
    """Digest a whole file of up to `sampled_bytes`, or else blocks evenly spaced from its first to its last byte."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        if size <= sampled_bytes:
            while block := file.read(_SAMPLE_BYTES * 16):
                digest.update(block)
            return digest.hexdigest()
        length = max(_SAMPLE_BYTES, sampled_bytes // _MAX_SAMPLES)
        count = max(2, sampled_bytes // length)
        for number in range(count):
            file.seek((size - length) * number // (count - 1))
            digest.update(file.read(length))
    return digest.hexdigest()
