"""Writing files so that a partial one is never taken for a whole one, and checking that a folder can be written."""

import contextlib
import glob
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from peer_scale.errors import UserError


@contextlib.contextmanager
def write_aside(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a file beside `path` that takes its place, synced to disk, when the block ends without an exception.

    Its name cannot be foreseen, so that nobody who may write there can have put a link in its place. Without `sync` the
    disk is not waited for: for what is soon written anew.
    """
    temporary = f"{os.fspath(path)}.{secrets.token_hex(8)}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    if sync:
        fsync_folder(Path(path).absolute().parent)


def write_atomically(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a small file whole, or not at all."""
    with write_aside(path, sync=sync) as file:
        file.write(content)


def remove_unfinished_writes(*paths: str | os.PathLike[str]) -> None:
    """Delete what killed writers left beside `paths`; no other process may be writing these now."""
    for path in paths:
        for leftover in glob.glob(f"{glob.escape(os.fspath(path))}.*.tmp"):
            Path(leftover).unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(output: Path, flag: str) -> Iterator[Path]:
    """Give a folder to fill, which gets the name `output` when the block ends without an exception, else goes.

    Raises:
        UserError: `output` holds something, or cannot be written.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{flag} {output}: exists and is not an empty folder; give another one")
    aside = output.with_name(f".{output.name}.{secrets.token_hex(4)}.tmp")
    try:
        aside.mkdir(parents=True)
        yield aside
        fsync_folder(aside)
        aside.replace(output)  # an empty folder gives way
        fsync_folder(output.absolute().parent)
    except OSError as error:
        raise UserError(f"{flag} {output}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def stays_below(name: str) -> bool:
    """Say whether a file's name, put behind a folder's, stays in that folder; links on the way are not looked at."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not PurePosixPath(name).is_absolute() and ".." not in parts and "\0" not in name


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable_folder(folder: Path, flag: str) -> None:
    """Make `folder` if need be and write a byte into it; UserError naming the flag where that fails."""
    with named_if_unwritable(folder, flag):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()


@contextlib.contextmanager
def named_if_unwritable(folder: Path, flag: str) -> Iterator[None]:
    """Raise what the disk raises in the block as a UserError that names the flag and its folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written: {error.strerror}") from None


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Read a small file of ours; None where it is not there, or is no whole JSON object."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of ours with an object per line, without lines that are none; nothing where it is not there."""
    found = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                found.append(record)
    return found


def last_change(path: Path) -> float | None:
    """Give the unix time at which a file was last written; None where it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None
