"""Writing files so that a partial one is never taken for a whole one, and checking that a folder can be written."""

import os
import tempfile
from pathlib import Path

from peer_scale.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Write aside, fsync, rename, fsync the folder."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable_folder(folder: Path, flag: str) -> None:
    """Make `folder` if need be and write a byte into it; UserError naming the flag where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written: {error.strerror}") from None
