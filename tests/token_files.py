"""`.bin/.idx` pairs written by hand after the format's description, with numpy alone."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

HEADER = struct.Struct("<9sQBQQ")
CODES = {np.uint8: 1, np.int8: 2, np.int16: 3, np.int32: 4, np.int64: 5, np.uint16: 8}


def write_index(path: Path, lengths: np.ndarray, dtype: type = np.uint16, bounds: np.ndarray | None = None) -> None:
    """Write an .idx of sequences of `lengths`; each is a document, or `bounds` says where documents begin and end."""
    lengths = lengths.astype(np.int64)
    ends = np.cumsum(lengths) * np.dtype(dtype).itemsize
    bounds = np.arange(len(lengths) + 1) if bounds is None else bounds
    with path.open("wb") as file:
        file.write(HEADER.pack(b"MMIDIDX\0\0", 1, CODES[dtype], len(lengths), len(bounds)))
        file.write(lengths.astype("<i4").tobytes())
        file.write((ends - lengths * np.dtype(dtype).itemsize).astype("<i8").tobytes())
        file.write(bounds.astype("<i8").tobytes())


def write_sparse_pair(prefix: Path, lengths: np.ndarray) -> str:
    """Write documents of zeros, uint16, that take no room; skip the test where no file can be as large."""
    write_index(Path(f"{prefix}.idx"), lengths)
    with Path(f"{prefix}.bin").open("wb") as file:
        try:
            file.truncate(2 * int(lengths.sum()))
        except OSError:
            pytest.skip("the file system has no files of this size")
    return str(prefix)


def write_pair(prefix: Path, documents: Sequence[np.ndarray], dtype: type = np.int32) -> str:
    """Write each document as one sequence."""
    write_index(Path(f"{prefix}.idx"), np.array([len(document) for document in documents]), dtype)
    np.concatenate(documents).astype(dtype).tofile(f"{prefix}.bin")
    return str(prefix)
