"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from peer_scale.errors import UserError
from peer_scale.storage import read_json_object

OWNER = ".owner.json"
_BEAT_SECONDS, _STALE_SECONDS = 10.0, 60.0
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""What file systems without locks answer."""


class FolderLock:
    """Holds a folder for this process, which the file `.owner.json` in it names.

    It is a POSIX record lock: the system gives it back when its process dies, by whatever signal, file servers (NFS)
    keep it for all their hosts, and forked children do not have it, so that a data worker that outlives its killed
    parent for some seconds holds up nobody. (`filelock` takes flock, which children inherit.) Where the file system
    has no locks, the file's modification time is renewed every ten seconds, and one that is a minute old is stale.
    """

    def __init__(self, folder: Path, flag: str, environ: Mapping[str, str] = os.environ) -> None:
        self._path, self._flag, self._job = folder / OWNER, flag, environ.get("SLURM_JOB_ID")
        self._descriptor: int | None = None
        self._heartbeat: _Heartbeat | None = None

    def acquire(self, *, use_locks: bool = True) -> None:
        """Become the owner at once, or raise UserError naming the process that is; OSError where the disk fails."""
        if use_locks and _has_locks(self._path.parent):
            self._descriptor = self._locked()
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, self._content(), 0)
        else:
            self._heartbeat = self._first_beat()

    def release(self) -> None:
        """Let the next one in."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self._descriptor is not None:
            if _names(self._path, self._descriptor):
                self._path.unlink()  # while it is locked: who has opened it already finds it without a name
            os.close(self._descriptor)
        self._descriptor = self._heartbeat = None

    def _locked(self) -> int:
        """Open and lock the file; the descriptor holds the lock."""
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise self._refusal() from None
                raise
            if _names(self._path, descriptor):
                return descriptor
            os.close(descriptor)  # its owner removed the file in between

    def _content(self) -> bytes:
        owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        return json.dumps({**owner, "slurm_job": self._job} if self._job else owner).encode()

    def _refusal(self) -> UserError:
        owner = read_json_object(self._path) or {}
        who = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in owner.items()) or "a process"
        return UserError(f"{self._flag} {self._path.parent}: another run is at work there ({who}); give another folder")

    def _first_beat(self) -> _Heartbeat:
        while True:
            try:
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            except FileExistsError:
                if not self._is_stale():
                    raise self._refusal() from None
                self._path.unlink(missing_ok=True)
                continue
            with open(descriptor, "wb") as file:
                file.write(self._content())
            return _Heartbeat(self._path)

    def _is_stale(self) -> bool:
        owner = read_json_object(self._path) or {}
        if owner.get("host") == socket.gethostname() and not _is_alive(owner.get("process")):
            return True
        with tempfile.NamedTemporaryFile(dir=self._path.parent) as now:  # by the file server's own clock
            try:
                return os.stat(now.name).st_mtime - self._path.stat().st_mtime > _STALE_SECONDS
            except FileNotFoundError:
                return True


class _Heartbeat:
    """Renews a file's time until it is stopped, and then removes the file."""

    def __init__(self, path: Path) -> None:
        self._path, self._ended = path, threading.Event()
        self._thread = threading.Thread(target=self._run, name="folder lock", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._path)


def _has_locks(folder: Path) -> bool:
    """Try on a file of its own: the folder's may be another run's, kept by a heartbeat."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return False
            raise
    return True


def _names(path: Path, descriptor: int) -> bool:
    """Say whether the path still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_alive(process: object) -> bool:
    if not isinstance(process, int):
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
