"""A checkpoint's files cut anew, so that each rank of a coming layout finds its part in one of them.

Any layout loads any checkpoint as it is. This saves the ranks of a large run from all opening each other's files.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from peer_scale.checkpoints.manifest import (
    KINDS,
    TOKENIZER,
    VOCABULARY_PARAMETERS,
    FileEntry,
    Manifest,
    Piece,
    Sharding,
    TensorEntry,
    key_of,
)
from peer_scale.checkpoints.pieces import TensorReader, check_file, write_tensors
from peer_scale.checkpoints.sections import Reshaped
from peer_scale.errors import UserError
from peer_scale.models.config import padded_vocab_size
from peer_scale.storage import new_folder


@dataclass(frozen=True)
class Cut:
    """The ranks to cut for: `num_files` of them, `tensor_parallel` neighbours sharing each tensor, ZeRO-3 the rest."""

    tensor_parallel: int
    num_files: int

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1 or self.num_files < 1 or self.num_files % self.tensor_parallel:
            raise UserError(
                f"--num-files {self.num_files} is not a multiple of --tensor-model-parallel-size {self.tensor_parallel}"
            )

    def sharding(self, name: str, entry: TensorEntry) -> Sharding:
        """Say how the ranks share a tensor; raise UserError where their number does not divide it."""
        dim, count = entry.shard_dim, self.tensor_parallel
        if dim is None:
            return Sharding(entry.shape)
        if name in VOCABULARY_PARAMETERS:
            return Sharding(entry.shape, dim, count, padded_vocab_size(entry.shape[0], count) - entry.shape[0])
        if entry.shape[dim] % count:
            shape = list(entry.shape)
            raise UserError(f"--tensor-model-parallel-size {count} does not divide dimension {dim} of {name}, {shape}")
        return Sharding(entry.shape, dim, count)

    def pieces(self, sharding: Sharding) -> list[Piece]:
        """List the pieces of one tensor in the order of the files."""
        size = math.prod(sharding.shard_shape)
        length = -(-size * self.tensor_parallel // self.num_files)
        pieces = []
        for rank in range(self.num_files):
            part, shard = divmod(rank, self.tensor_parallel)
            if shard < sharding.count:
                start = part * length
                stored = min(length, sharding.stored(shard) - start)
                pieces.append(Piece(f"rank_{rank:05d}.safetensors", shard, start, stored))
        return [piece for piece in pieces if piece.length > 0]


def reshape(folder: Path, manifest: Manifest, output: Path, cut: Cut, *, verify: bool = True) -> None:
    """Write the checkpoint in `folder` into the folder `output`, cut anew; one piece at a time is in memory.

    With `verify`, what was written is read back and each tensor compared bit for bit.

    Raises:
        UserError: the checkpoint is damaged, the cut does not go, or `output` holds something or cannot be written;
            then nothing is left there.
    """
    with new_folder(output, "--output") as aside:
        for name, entry in manifest.files.items():
            check_file(folder / name, entry)
        shardings = {name: cut.sharding(name, entry) for name, entry in manifest.tensors.items()}
        reader = TensorReader(folder, manifest.tensors)
        written = _write(reader, manifest, shardings, cut, aside)
        if verify:
            for name, entry in written.files.items():
                check_file(aside / name, entry)
            _compare(reader, TensorReader(aside, written.tensors))


def _write(reader: TensorReader, manifest: Manifest, shardings: dict[str, Sharding], cut: Cut, aside: Path) -> Manifest:
    pieces = {name: cut.pieces(sharding) for name, sharding in shardings.items()}
    files = {name: entry for name, entry in manifest.files.items() if name.startswith(f"{TOKENIZER}/")}
    shutil.copytree(reader.folder / TOKENIZER, aside / TOKENIZER)
    for file in sorted({piece.file for found in pieces.values() for piece in found}):
        content = [(name, piece) for name, found in pieces.items() for piece in found if piece.file == file]
        files[file] = _write_file(reader, shardings, content, aside / file)
    entries = {
        name: TensorEntry(s.shape, s.dim, s.count, s.padding, tuple(pieces[name])) for name, s in shardings.items()
    }
    for name, entry in entries.items():
        assert entry.gap() is None, f"{name}: {entry.gap()}"
    reshaped = Reshaped(cut.tensor_parallel, cut.num_files)
    written = Manifest(replace(manifest.sections, reshaped=reshaped), entries, files)
    written.write(aside)
    return written


def _write_file(
    reader: TensorReader, shardings: dict[str, Sharding], content: list[tuple[str, Piece]], path: Path
) -> FileEntry:
    def tensors() -> Iterator[Tensor]:
        for name, piece in content:
            for kind in KINDS:
                yield reader.flat(name, kind, shardings[name], piece.shard, piece.start, piece.length)

    shapes = {key_of(kind, name): (piece.length,) for name, piece in content for kind in KINDS}
    return write_tensors(path, shapes, tensors())


def _compare(old: TensorReader, new: TensorReader) -> None:
    for name in old.tensors:
        for kind in KINDS:
            if not torch.equal(old.whole(name, kind), new.whole(name, kind)):
                raise UserError(f"verification: {name} ({kind}) is not what it was; nothing was written")
