"""Keeping two processes from writing the same files at once."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # file systems without locks


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
