"""From what `--data-path` and `--input` name to documents: which format reads each path, and what is left out.

Another kind of file is another class in `formats/` and its name in `FILE_FORMATS`.
"""

import codecs
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from peer_scale.corpus.formats.base import BYTE_ORDER_MARK, FileSource, Source, named_failures
from peer_scale.corpus.formats.builtin import BuiltinCorpus
from peer_scale.corpus.formats.compression import COMPRESSION_ENDINGS, split_compression
from peer_scale.corpus.formats.hub import HubDataset
from peer_scale.corpus.formats.json_files import JsonFile
from peer_scale.corpus.formats.lines import other_encoding, read_head
from peer_scale.corpus.formats.parquet import ParquetFile
from peer_scale.corpus.formats.text import TextFile
from peer_scale.errors import UserError

FILE_FORMATS: tuple[type[FileSource], ...] = (TextFile, JsonFile, ParquetFile)
"""The formats of files; the first one that takes a name reads it."""

_ENDINGS = ", ".join(ending for file_format in FILE_FORMATS for ending in file_format.endings)
_KINDS = f"{_ENDINGS}, text and JSON also with {', '.join(COMPRESSION_ENDINGS)} behind it, and text without an ending"
_NAMES_IN_NOTICE = 3

_OTHER_KIND = "of a kind that is not read"
_EMPTY = "empty"
_TWICE = "reached by another path too, and read once"
_PACKED_TOO = "beside a file that has the same name but for the compression"
_REASONS = (_OTHER_KIND, _EMPTY, _TWICE, _PACKED_TOO)

_PARQUET_MAGIC = b"PAR1"
_JSON_BEGINNING = re.compile(r'\[?\s*\{\s*["}]|\[\s*\]\s*$')


@dataclass
class Inputs:
    """What paths stand for.

    Attributes:
        by_path: of each path as it was given, the sources that it adds, in the order in which they are read.
        left_out: names of files by the reason for which they are not read.
        guessed: names of the files without an ending that are read.
    """

    by_path: list[tuple[str, list[Source]]] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: {reason: [] for reason in _REASONS})
    guessed: list[str] = field(default_factory=list)

    @property
    def sources(self) -> list[Source]:
        """All sources, each once."""
        return [source for _, sources in self.by_path for source in sources]

    @property
    def notice(self) -> str | None:
        """One line that counts and names what is left out or read in a way that a user might not think of."""
        parts = [f"{len(names)} {reason} ({_some(names)})" for reason, names in self.left_out.items() if names]
        number = sum(map(len, self.left_out.values()))
        lines = [f"{number} file{'s' * (number != 1)} left out: {'; '.join(parts)}"] if parts else []
        if self.guessed:
            lines.append(f"{len(self.guessed)} without an ending read by content ({_some(self.guessed)})")
        return f"notice: {'; '.join(lines)}" if lines else None


def iter_documents(paths: Sequence[str], text_key: str = "text") -> Iterator[str]:
    """Yield the documents of every path in turn; only one document at a time is held in memory.

    Args:
        paths: .txt files (blank lines separate documents), .jsonl/.ndjson/.json files (one object per line, or
            arrays, or objects spread over lines), .parquet files, folders of these, Hugging Face data set ids
            (`owner/name`, or `owner/name:configuration`), or `builtin`.
        text_key: the key or column that holds the text.

    Raises:
        UserError: a path is missing, none holds a document, or one is damaged, not UTF-8, or its JSON or columns are
            not as they should be.
    """
    empty = True
    for source in find_sources(paths):
        for document in source.documents(text_key):
            empty = False
            yield document
    if empty:
        raise UserError(f"{', '.join(paths)}: holds no document")


def find_sources(paths: Sequence[str]) -> list[Source]:
    """Resolve paths into sources, as `find_inputs`."""
    return find_inputs(paths).sources


def find_inputs(paths: Sequence[str]) -> Inputs:
    """Resolve paths into sources, in order, the files of folders recursively and sorted, each file once.

    Raises:
        UserError: a path does not exist (nor can it be a hub id) or is of an unknown kind, or nothing is left to read.
    """
    inputs = Inputs()
    seen = _Seen(inputs)
    for path in paths:
        if BuiltinCorpus.takes(path):
            sources: list[Source] = [BuiltinCorpus(path)] if seen.is_new(path, path) else []
        elif os.path.isdir(path):
            sources = [source for source in _folder_files(path, inputs) if seen.is_new_file(source.name)]
        elif os.path.exists(path):
            sources = [source for source in _given_file(path, inputs) if seen.is_new_file(source.name)]
        elif HubDataset.takes(path) and _named_format(path) is None and not split_compression(path)[1]:
            sources = [HubDataset(path)] if seen.is_new(path, path) else []
        else:
            raise UserError(f"{path}: no such file or folder")
        inputs.by_path.append((path, sources))
    if not inputs.sources:
        if inputs.left_out[_EMPTY]:
            raise UserError(f"{_some(inputs.left_out[_EMPTY])}: the file is empty")
        raise UserError(f"{', '.join(paths)}: nothing to read")
    return inputs


class _Seen:
    """Which files were met, so that each is read once, by whatever paths it is reached."""

    def __init__(self, inputs: Inputs) -> None:
        self._left_out = inputs.left_out
        self._keys: set[object] = set()

    def is_new(self, key: object, name: str, reason: str = _TWICE) -> bool:
        """Say whether nothing was met that has this key; note the name as left out if something was."""
        if key in self._keys:
            self._left_out[reason].append(name)
            return False
        self._keys.add(key)
        return True

    def is_new_file(self, path: str) -> bool:
        """Say whether a file was met neither by another path or link, nor in another compression beside it."""
        status = os.stat(path)
        real = os.path.realpath(path)
        # The numbers tell hard links, but network file systems may have none worth the name for other files.
        key = (status.st_dev, status.st_ino) if status.st_nlink > 1 and status.st_ino else real
        packed_too = ("whatever its compression", split_compression(real)[0])
        return self.is_new(key, path) and self.is_new(packed_too, path, _PACKED_TOO)


def _named_format(path: str) -> type[FileSource] | None:
    return next((file_format for file_format in FILE_FORMATS if file_format.takes(path)), None)


def _format(path: str, inputs: Inputs) -> type[FileSource] | None:
    """Choose the format of a file by its ending or, where it has none, by how it begins."""
    named = _named_format(path)
    # "part-00000", "wiki_00.bz2", "shard.00017": a number is no ending.
    if named is not None or not re.fullmatch(r"(\.\d+)?", os.path.splitext(split_compression(path)[0])[1]):
        return named
    guessed = _format_of_content(read_head(path), is_compressed=split_compression(path)[1] != "")
    if guessed is not None:
        inputs.guessed.append(path)
    return guessed


def _format_of_content(head: bytes, *, is_compressed: bool) -> type[FileSource] | None:
    if head.startswith(_PARQUET_MAGIC):
        return None if is_compressed else ParquetFile
    if b"\0" in head or other_encoding(head):
        return None
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return None
    return JsonFile if _JSON_BEGINNING.match(text.lstrip().lstrip(BYTE_ORDER_MARK).lstrip()) else TextFile


def _given_file(path: str, inputs: Inputs) -> list[FileSource]:
    if not os.path.isfile(path):
        raise UserError(f"{path}: a pipe or device; write the text to a file first")
    found = _found_file(path, inputs)
    if inputs.left_out[_OTHER_KIND][-1:] == [path]:
        raise UserError(f"{path}: unknown kind of file; the kinds read are {_KINDS}")
    return found


def _folder_files(folder: str, inputs: Inputs) -> list[FileSource]:
    """Find the files of a folder and of those below it that are not empty, hidden, or of an unknown kind."""
    found: list[FileSource] = []
    visited: set[str] = set()

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}") from error

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        visited.add(os.path.realpath(parent))
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(".") and os.path.realpath(os.path.join(parent, name)) not in visited
        ]
        for name in names:
            path = os.path.join(parent, name)
            if not name.startswith("."):
                found += _found_file(path, inputs)
    if not found:
        others = inputs.left_out[_OTHER_KIND]
        but = f"; it holds {_some(others)}" if others else ""
        raise UserError(f"{folder}: the folder holds no file with text in it ({_KINDS}){but}")
    return sorted(found, key=lambda source: source.name)


def _found_file(path: str, inputs: Inputs) -> list[FileSource]:
    """Make the source of a file, or note why there is none."""
    with named_failures(path):
        status = os.stat(path)
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        inputs.left_out[_EMPTY].append(path)
        return []
    file_format = _format(path, inputs) if stat.S_ISREG(status.st_mode) else None
    if file_format is None:
        inputs.left_out[_OTHER_KIND].append(path)
        return []
    return [file_format(path)]


def _some(names: Sequence[str]) -> str:
    shown = sorted(names)[:_NAMES_IN_NOTICE]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
