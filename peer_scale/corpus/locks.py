"""Keeping two processes from writing the same files at once."""

import contextlib
import os
from collections.abc import Iterator

from filelock import FileLock

from peer_scale.folder_lock import NO_LOCKS


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Wait until no other process holds the lock, and hold it for the block.

    It is an flock on the file `path`, so the system gives it back when its process dies, by whatever signal. The file
    that such a process leaves behind is empty and locks nothing: the next process locks it and removes it.

    Where the file system has no flock the block runs without a lock. The library's other kind of lock, a file that is
    there while it is held, would outlive a killed process and stop all later ones. Two processes that prepare the
    same text there at once may make each other fail; every file is written aside and renamed, so neither leaves a
    wrong one.

    Raises:
        OSError: the file cannot be opened.
    """
    # The lock's file is removed here rather than by the library: versions differ in whether they do. Who waits for the
    # removed file finds that it has no name any more, and starts over with a new one.
    lock = FileLock(path, preserve_lock_file=True)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        lock.release()
