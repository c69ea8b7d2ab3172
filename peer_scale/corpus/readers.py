"""From what `--data-path` and `--input` name to documents: which format reads each path.

Another kind of file is another class in `formats/` and its name in `FILE_FORMATS`.
"""

import os
from collections.abc import Iterator, Sequence

from peer_scale.corpus.formats.base import FileSource, Source
from peer_scale.corpus.formats.builtin import BuiltinCorpus
from peer_scale.corpus.formats.hub import HubDataset
from peer_scale.corpus.formats.json_lines import JsonLinesFile
from peer_scale.corpus.formats.parquet import ParquetFile
from peer_scale.corpus.formats.text import TextFile
from peer_scale.errors import UserError

FILE_FORMATS: tuple[type[FileSource], ...] = (TextFile, JsonLinesFile, ParquetFile)
"""The formats of files; the first one that takes a name reads it."""

_ENDINGS = ", ".join(ending for file_format in FILE_FORMATS for ending in file_format.endings)


def iter_documents(paths: Sequence[str], text_key: str = "text") -> Iterator[str]:
    """Yield the documents of every path in turn; only one document at a time is held in memory.

    Args:
        paths: .txt files (blank lines separate documents), .jsonl/.json files (one object per line), .parquet files,
            folders of these, Hugging Face data set ids (`owner/name`, or `owner/name:configuration`), or `builtin`.
        text_key: the key or column that holds the text.

    Raises:
        UserError: a path is missing, holds no document, is not UTF-8, or its JSON or columns are not as they should be.
    """
    for path in paths:
        empty = True
        for source in find_sources([path]):
            for document in source.documents(text_key):
                empty = False
                yield document
        if empty:
            raise UserError(f"{path}: holds no document")


def find_sources(paths: Sequence[str]) -> list[Source]:
    """Resolve paths into sources, in order, the files of folders recursively and sorted.

    Raises:
        UserError: a path does not exist (nor can it be a hub id), has another ending, or is empty.
    """
    sources: list[Source] = []
    for path in paths:
        if BuiltinCorpus.takes(path):
            sources.append(BuiltinCorpus(path))
        elif os.path.isdir(path):
            sources += _folder_files(path)
        elif os.path.exists(path):
            sources.append(_file(path))
        elif HubDataset.takes(path) and _file_format(path) is None:
            sources.append(HubDataset(path))
        else:
            raise UserError(f"{path}: no such file or folder")
    return sources


def _file_format(path: str) -> type[FileSource] | None:
    return next((file_format for file_format in FILE_FORMATS if file_format.takes(path)), None)


def _file(path: str) -> FileSource:
    file_format = _file_format(path)
    if file_format is None:
        raise UserError(f"{path}: unknown kind of file; the endings read are {_ENDINGS}")
    if os.path.getsize(path) == 0:
        raise UserError(f"{path}: the file is empty")
    return file_format(path)


def _folder_files(folder: str) -> list[FileSource]:
    """Find the files of a folder and of those below it that are not empty, hidden, or of an unknown format."""
    found: list[FileSource] = []
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(parent))
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(parent, name)) not in visited
        ]
        for name in names:
            path = os.path.join(parent, name)
            file_format = None if name.startswith(".") else _file_format(path)
            if file_format is not None and os.path.getsize(path):
                found.append(file_format(path))
    if not found:
        raise UserError(f"{folder}: the folder holds no file with text in it ({_ENDINGS})")
    return sorted(found, key=lambda source: source.name)
