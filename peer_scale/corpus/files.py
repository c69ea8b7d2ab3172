"""Writing large files so that no reader takes a part of one for the whole, and no two processes write the same."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from peer_scale.storage import fsync_folder

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # file systems without locks


@contextlib.contextmanager
def write_aside(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file beside `path` that takes its place, synced to disk, when the block ends without an exception."""
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    fsync_folder(Path(path).absolute().parent)


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Waits until no other process holds the lock; a process that dies gives it back."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # the one before us has deleted this file, and another may hold the new one
    try:
        yield
    finally:
        os.unlink(path)
        os.close(descriptor)
