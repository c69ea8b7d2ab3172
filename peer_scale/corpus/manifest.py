"""The manifest `<prefix>.json` beside a `.bin/.idx` pair: what the pair was made from, and what its files must be."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from peer_scale.corpus.unknown import UnknownCounts
from peer_scale.errors import UserError
from peer_scale.storage import write_atomically

_FORMAT = "peer_scale tokens"
_VERSION = 1
_MAX_BYTES = 1 << 22  # a larger file of that name is something else
_BLOCK_BYTES = 1 << 22
_ENDINGS = ("bin", "idx")


@dataclass(frozen=True)
class InputSummary:
    """One input as it was named, with the number and total bytes of its files; both are 0 for a data set."""

    path: str
    files: int
    bytes: int


@dataclass(frozen=True)
class PairManifest:
    """What is written of a pair. The fields are the keys of the file, in this order.

    Attributes:
        key: digest of what decides the pair's bytes and how its parts were cut.
        tokenizer_digest: digest of the tokenizer that gave the ids.
        vocab_size: number of ids of this tokenizer.
        num_documents, num_tokens: documents and tokens in the pair.
        bin_bytes, bin_sha256, idx_bytes, idx_sha256: size and checksum of each file.
        fingerprint: digest of samples of both files, as `store.pair_fingerprint` computes it.
        inputs: what the pair was made from.
        unknown: what of its text became [UNK]; None where an earlier version made the pair, which did not count it.
    """

    key: str
    tokenizer_digest: str
    vocab_size: int
    num_documents: int
    num_tokens: int
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    fingerprint: str
    inputs: tuple[InputSummary, ...]
    unknown: UnknownCounts | None = None

    @classmethod
    def read(cls, prefix: str) -> "PairManifest | None":
        """Return the manifest of a pair, None where there is none or the file is of another kind.

        Raises:
            UserError: it is of another version, or a key is missing or has a value of another type.
        """
        content = _content(prefix)
        if content is None:
            return None
        version = content.get("version")
        if version != _VERSION:
            raise UserError(f"{prefix}.json: version {version}, but only {_VERSION} can be read")
        try:
            return TypeAdapter(cls).validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(f"{prefix}.json: not a manifest of {prefix}.bin: {key}: {first['msg']}") from None

    def write(self, prefix: str) -> None:
        """Write the manifest whole, or not at all."""
        content = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        if self.unknown is None:
            del content["unknown"]
        write_atomically(Path(f"{prefix}.json"), (json.dumps(content, indent=2) + "\n").encode())

    def check(self, prefix: str, fingerprint: str) -> None:
        """Compare a pair with its manifest in constant time.

        Args:
            prefix: the pair.
            fingerprint: as its files have it now.

        Raises:
            UserError: the size of a file or the fingerprint differs.
        """
        for ending, expected in zip(_ENDINGS, (self.bin_bytes, self.idx_bytes), strict=True):
            actual = os.path.getsize(f"{prefix}.{ending}")
            if actual != expected:
                raise UserError(
                    f"{prefix}.{ending}: {actual} bytes, but {prefix}.json says {expected}; truncated or changed"
                )
        if fingerprint != self.fingerprint:
            raise UserError(f"{prefix}.bin or .idx: the content is not what {prefix}.json says; the file was changed")

    def check_every_byte(self, prefix: str) -> None:
        """Read a pair through and compare the checksums.

        Raises:
            UserError: a checksum differs.
        """
        for ending, expected in zip(_ENDINGS, (self.bin_sha256, self.idx_sha256), strict=True):
            digest = hashlib.sha256()
            with open(f"{prefix}.{ending}", "rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
            if digest.hexdigest() != expected:
                raise UserError(f"{prefix}.{ending}: its sha256 is not the one in {prefix}.json; the file was changed")


def has_manifest(prefix: str) -> bool:
    """Say whether there is a manifest, of whatever version."""
    return _content(prefix) is not None


def unknown_counts(prefixes: Iterable[str]) -> UnknownCounts | None:
    """Sum what of the pairs' texts became [UNK]; None where it was not counted for one of them."""
    total = UnknownCounts()
    for prefix in prefixes:
        manifest = PairManifest.read(prefix)
        if manifest is None or manifest.unknown is None:
            return None
        total += manifest.unknown
    return total


def _content(prefix: str) -> dict[str, Any] | None:
    path = f"{prefix}.json"
    if not os.path.isfile(path) or os.path.getsize(path) > _MAX_BYTES:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and content.get("format") == _FORMAT else None
