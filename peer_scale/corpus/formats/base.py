"""What every format gives: a source of documents and, where it is a file, the slices that it can be read in."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple


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
    def identity(self) -> list[str]:
        """Return texts that change when the documents may have changed; prepared corpora are keyed by them."""

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

    def identity(self) -> list[str]:
        status = os.stat(self.name)
        return [f"{os.path.abspath(self.name)} {status.st_size} {status.st_mtime_ns}"]

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
        """Yield the documents of the slice in pieces; `FileSource.pieces` says how."""
        return self.source.pieces(self.start, self.stop, text_key)


def usable_documents(texts: Iterable[str | None]) -> Iterator[str]:
    """Leave out what holds no text, and replace halves of surrogate pairs.

    JSON may hold such halves, but UTF-8, and so a tokenizer, cannot.
    """
    for text in texts:
        if text and not text.isspace():
            yield text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
