"""Tensors to and from a checkpoint's safetensors files, a slice at a time."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peer_scale.checkpoints.manifest import MANIFEST, TOKENIZER, WEIGHT, FileEntry, Sharding, TensorEntry, key_of
from peer_scale.corpus.wordpiece import WordPiece
from peer_scale.errors import DamagedError, UserError

_CHUNK = 8 << 20
_OPEN_FILES = 64


def write_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[Tensor], **metadata: str
) -> FileEntry:
    """Write fp32 tensors of the given shapes as they come, synced to disk; give the file's size and checksum.

    The library's own writer wants all tensors at once and does not give the checksum. Raises OSError.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for block in _blocks(len(text).to_bytes(8, "little") + text, shapes, tensors):
            file.write(block)
            digest.update(block)
            del block  # a view of a tensor, which is to be gone before the next is made
        file.flush()
        os.fsync(file.fileno())
        return FileEntry(file.tell(), digest.hexdigest())


def _blocks(header: bytes, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[Tensor]) -> Iterable[Any]:
    yield header
    remaining = iter(tensors)
    for key, shape in shapes.items():  # not zip, which holds a tensor while the next is made
        yield from _content(key, shape, next(remaining))
    assert next(remaining, None) is None, "more tensors than were announced"


def _content(key: str, shape: tuple[int, ...], tensor: Tensor) -> Iterable[memoryview]:
    assert tensor.shape == shape, f"{key}: {tuple(tensor.shape)} where {shape} was announced"
    numbers: Any = tensor.to("cpu", torch.float32).flatten().contiguous().numpy()
    content = memoryview(numbers).cast("B")
    for start in range(0, len(content), _CHUNK):
        yield content[start : start + _CHUNK]


def write_tokenizer(folder: Path, tokenizer: WordPiece) -> dict[str, FileEntry]:
    """Write a checkpoint's tokenizer; give what the manifest says of its files. Raises OSError and UserError."""
    tokenizer.save(folder / TOKENIZER)
    paths = sorted((folder / TOKENIZER).iterdir())
    return {f"{TOKENIZER}/{path.name}": describe_file(path) for path in paths}


def describe_file(path: Path) -> FileEntry:
    """Give size and checksum of a file that is there."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
            size += len(block)
    return FileEntry(size, digest.hexdigest())


def check_size(path: Path, entry: FileEntry) -> None:
    """Raise DamagedError where a file is missing or has another size than the manifest says."""
    actual = path.stat().st_size if path.is_file() else None
    if actual != entry.bytes:
        found = "missing" if actual is None else f"{actual} bytes"
        raise DamagedError(f"{path}: is {found}, not {entry.bytes} bytes as saved")


def check_file(path: Path, entry: FileEntry) -> None:
    """Raise DamagedError where a file is missing, of another size, or of other content than the manifest says."""
    check_size(path, entry)
    try:
        actual = describe_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if actual != entry:
        raise DamagedError(f"{path}: is damaged: its content has another checksum than {MANIFEST} says")


class TensorReader:
    """Any part of a checkpoint's tensors, under whatever layout it was saved; only what is asked for is read.

    Every method raises UserError naming the file that cannot be read.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorEntry]) -> None:
        self.folder, self.tensors = folder, tensors
        self._open = functools.lru_cache(maxsize=_OPEN_FILES)(self._open_file)

    def whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        """Read a tensor in its logical shape."""
        return self.rows(name, kind, 0, self.tensors[name].shape[0])

    def rows(self, name: str, kind: str, first: int, last: int) -> Tensor:
        """Read rows `first` to `last` (exclusive) along dimension 0 of the logical tensor."""
        sharding = self.tensors[name].sharding
        rows, *others = sharding.shard_shape
        row = math.prod(others)
        if sharding.count == 1:
            return self._range(name, kind, 0, first * row, last * row).view(-1, *others)
        found = torch.empty(last - first, *sharding.shape[1:])
        for shard in range(sharding.count):
            base = rows * shard if sharding.dim == 0 else 0
            start, end = max(first, base), min(last, base + rows)
            if start >= end:
                continue
            block = self._range(name, kind, shard, (start - base) * row, (end - base) * row).view(-1, *others)
            target = found[start - first : end - first]
            if sharding.dim == 1:
                target = target.narrow(1, others[0] * shard, others[0])
            target.copy_(block)
        return found

    def flat(self, name: str, kind: str, target: Sharding, shard: int, start: int, length: int) -> Tensor:
        """Read a flat range of a shard under another sharding: [length], zero where it is padding."""
        rows, *others = target.shard_shape
        row = math.prod(others)
        base = rows * shard if target.dim == 0 else 0
        first, last = start // row, -(-(start + length) // row)
        end = target.shape[0]
        found = self.rows(name, kind, min(base + first, end), min(base + last, end))
        if target.dim == 1:
            found = found.narrow(1, others[0] * shard, others[0])
        skip = start - first * row
        content = found.flatten()[skip : skip + length]
        return content if len(content) == length else torch.cat([content, torch.zeros(length - len(content))])

    def _range(self, name: str, kind: str, shard: int, start: int, end: int) -> Tensor:
        """Read a flat range of a shard as it was saved."""
        for piece in self.tensors[name].pieces:
            if piece.shard == shard and piece.start <= start and end <= piece.start + piece.length:
                return self._slice(piece.file, key_of(kind, name), start - piece.start, end - piece.start)
        found = torch.empty(end - start)
        for piece in self.tensors[name].pieces:
            low, high = max(start, piece.start), min(end, piece.start + piece.length)
            if piece.shard == shard and low < high:
                content = self._slice(piece.file, key_of(kind, name), low - piece.start, high - piece.start)
                found[low - start : high - start] = content
        return found

    def _slice(self, file: str, key: str, start: int, end: int) -> Tensor:
        try:
            content = self._open(file).get_slice(key)
            shape, dtype = content.get_shape(), content.get_dtype()
            if dtype == "F32" and len(shape) == 1 and shape[0] >= end:
                return content[start:end]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.folder / file}: cannot be read as safetensors: {error}") from None
        raise UserError(f"{self.folder / file}: {key} is {dtype} {shape}, where {MANIFEST} has {end} numbers in F32")

    def _open_file(self, file: str) -> Any:
        return safe_open(self.folder / file, framework="pt")
