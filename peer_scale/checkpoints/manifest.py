"""What a checkpoint says of itself, and how its tensors lie in its files whatever layout wrote them.

SAVE/step_00000100/peer_scale.json           the manifest, written last: what is described here
SAVE/step_00000100/rank_00000.safetensors    what rank 0 keeps of the weights and of Adam's moments
SAVE/step_00000100/tokenizer/                what turns text into the model's ids

A tensor is cut twice. Tensor-parallel ranks have equal shards of it along one dimension (`Sharding`); ZeRO gives each
data-parallel rank a flat range of a shard, a `Piece`. Names and shapes are those of the whole, unpadded tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from peer_scale.checkpoints.sections import Sections, parse_sections
from peer_scale.checkpoints.upgrade import from_format_2, with_blocks, with_split
from peer_scale.configuration import shown
from peer_scale.errors import DamagedError, UserError
from peer_scale.storage import stays_below, write_atomically

FORMAT_VERSION = 3
MANIFEST = "peer_scale.json"
DIGEST = "digest"
TOKENIZER = "tokenizer"

WEIGHT, EXP_AVG, EXP_AVG_SQ = "weight", "exp_avg", "exp_avg_sq"
_MOST_SHARDS = 4096
_MOST_DIMENSIONS = 8
KINDS = (WEIGHT, EXP_AVG, EXP_AVG_SQ)
"""What is kept of each parameter, in fp32: the master weight and Adam's two moments."""

VOCABULARY_PARAMETERS = ("embeddings.word.weight", "mlm_head.bias")
"""Those with a row per entry of the vocabulary, to which a model adds padding rows."""


def key_of(kind: str, name: str) -> str:
    """Name a piece in its file."""
    return f"{kind}/{name}"


@dataclass(frozen=True)
class Sharding:
    """Equal shards of a tensor along `dim`; None: whoever has it has all of it.

    `padding` rows at the end of dimension 0 make the shards equal. They are zero and never stored.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    count: int = 1
    padding: int = 0

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of one shard, with its padding."""
        sizes = [self.shape[0] + self.padding, *self.shape[1:]]
        if self.dim is not None:
            sizes[self.dim] //= self.count
        return tuple(sizes)

    def stored(self, shard: int) -> int:
        """Count the numbers at the beginning of a shard that are not padding."""
        rows, *others = self.shard_shape
        first = rows * shard if self.dim == 0 else 0
        return max(min(rows, self.shape[0] - first), 0) * math.prod(others)


class Piece(NamedTuple):
    """A flat range of a shard and the file it is in."""

    file: str
    shard: int
    start: int
    length: int


@dataclass(frozen=True)
class TensorEntry:
    """A parameter by its logical shape, and the pieces that it is put together from."""

    shape: tuple[int, ...]
    shard_dim: int | None
    shards: int
    padding: int
    pieces: tuple[Piece, ...]
    dtype: str = "float32"

    @property
    def sharding(self) -> Sharding:
        """How it was shared out by the ranks that wrote it."""
        return Sharding(self.shape, self.shard_dim, self.shards, self.padding)

    def gap(self) -> str | None:
        """Say where the pieces do not cover each number of each shard once; None where they do."""
        if not self._is_possible:
            return f"shape {list(self.shape)} with {self.padding} rows of padding cannot be cut in {self.shards} shards"
        by_shard: dict[int, list[Piece]] = defaultdict(list)
        for piece in self.pieces:
            by_shard[piece.shard].append(piece)
        for shard in range(self.shards):
            position, length = 0, self.sharding.stored(shard)
            for piece in sorted(by_shard.pop(shard, []), key=lambda p: p.start):
                if piece.start != position:
                    return f"shard {shard}: {piece.file} goes on from {piece.start}, not from {position}"
                position += piece.length
            if position != length:
                return f"shard {shard}: {position} of its {length} numbers are there"
        return f"there is no shard {min(by_shard)}" if by_shard else None

    @property
    def _is_possible(self) -> bool:
        """Whether what a stranger's file may say makes sense, and is small enough to be looked at one by one."""
        sizes = [*self.shape, self.padding, *(piece.length for piece in self.pieces)]
        dims = range(len(self.shape))
        return (
            0 < self.shards <= _MOST_SHARDS
            and len(self.shape) <= _MOST_DIMENSIONS
            and all(0 <= size < 2**48 for size in sizes)
            and (self.shard_dim in dims if self.shard_dim is not None else self.shards == 1)
        )


class FileEntry(NamedTuple):
    """Size and checksum of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All of a checkpoint but its numbers; `sections` is what is said of the run."""

    sections: Sections
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]

    def write(self, folder: Path) -> None:
        """Write the manifest into `folder`, one line per section and per tensor, and its own digest at the end."""
        members = {"format_version": FORMAT_VERSION, **self.sections.as_json(), "files": self.files}
        lines = {key: json.dumps(value) for key, value in members.items()}
        lines["tensors"] = _object({name: json.dumps(asdict(entry)) for name, entry in self.tensors.items()})
        lines[DIGEST] = json.dumps(digest_of(json.loads(_object(lines))))
        write_atomically(folder / MANIFEST, _object(lines).encode())


def digest_of(content: Mapping[str, Any]) -> str:
    """Give the SHA-256 of a manifest's JSON in one way of writing it: keys sorted, no space between."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _object(members: Mapping[str, str]) -> str:
    """Join members that are JSON already to a JSON object, one per line."""
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {value}" for key, value in members.items()) + "\n}"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest in `folder`, of this format or of format 2.

    Raises:
        DamagedError: it cannot be read, is not what was written, or its pieces leave a gap in a tensor.
        UserError: it is of another format, or says what this version does not know.
    """
    path = folder / MANIFEST
    content, tensors, files = _read_json(path)
    try:
        entries = TypeAdapter(dict[str, TensorEntry]).validate_python(tensors)
        checksums = TypeAdapter(dict[str, FileEntry]).validate_python(files)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: not a checkpoint's manifest: {where}: {first['msg']}") from None
    _check_names(path, checksums, entries)
    for name, entry in entries.items():
        gap = entry.gap()
        if gap is not None:
            raise DamagedError(f"{path}: {name} is not whole: {gap}")
    return Manifest(parse_sections(content, str(path)), entries, checksums)


def _check_names(path: Path, files: Mapping[str, FileEntry], entries: Mapping[str, TensorEntry]) -> None:
    """Raise UserError unless all files lie in the manifest's folder, and pieces in files that it lists."""
    folder = path.parent.resolve()
    for name, file in files.items():
        if not stays_below(name) or not (folder / name).resolve().is_relative_to(folder):
            raise UserError(f"{path}: names the file {shown(name)}, which is not within its folder")
        if file.bytes < 0:
            raise UserError(f"{path}: {shown(name)} would have {file.bytes} bytes")
    for name, entry in entries.items():
        for piece in entry.pieces:
            if piece.file not in files:
                raise UserError(f"{path}: {shown(name)} lies in {shown(piece.file)}, which is not among its files")


def _read_json(path: Path) -> tuple[dict[str, Any], Any, Any]:
    """Read sections, tensors and files, of the content that was written and of the present format, else not checked."""
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
        written = content.pop(DIGEST, None)  # earlier versions wrote none
        if written is not None and written != digest_of(content):
            raise DamagedError(f"{path}: is damaged: its content has another digest than it says itself")
        version, tensors, files = (content.pop(key) for key in ("format_version", "tensors", "files"))
        if version == 2:
            version, content = FORMAT_VERSION, from_format_2(content)
        content = with_blocks(with_split(content))
    except DamagedError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path}: not a checkpoint's manifest: {type(error).__name__}: {error}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format {version}; this version reads 2 and {FORMAT_VERSION}")
    return content, tensors, files
