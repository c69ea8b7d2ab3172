"""Saving while training goes on: only the copy to host memory blocks.

    save    all ranks copy their pieces into host buffers; a thread of each writes its file and syncs it
    poll    after each later step, while a save is under way, the ranks ask each other whether all have written
    finish  the first rank commits: manifest, rename, `latest`; at the latest before the next save and at the end

A save that fails because a disk is full or does not answer is tried again, from the same copy.

Beside what it trains with, a rank holds one fp32 copy of what it saves, 12 bytes per parameter of its share, from the
first save on; when not saving in the background, one tensor.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peer_scale.checkpoints.folder import CheckpointFolder
from peer_scale.checkpoints.manifest import WEIGHT, FileEntry, Manifest, Piece, Sharding, TensorEntry
from peer_scale.checkpoints.pieces import write_tensors, write_tokenizer
from peer_scale.checkpoints.progress import Progress
from peer_scale.checkpoints.sections import RecentSteps, Sections
from peer_scale.checkpoints.state import OwnedPiece, TrainingState
from peer_scale.corpus.wordpiece import WordPiece
from peer_scale.errors import UserError
from peer_scale.parallel.coordination import RankCoordinator

_TRIES = 3


@dataclass(frozen=True)
class _Share:
    """What one rank has written, for the manifest."""

    pieces: list[tuple[str, Sharding, Piece]]
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class _Pending:
    step: int
    sections: Sections
    write: Callable[[], _Share]
    written: Future[_Share]
    tries_left: int


class SaveError(RuntimeError):
    """A checkpoint could not be written, as often as it was tried; older ones stay good."""


class CheckpointWriter:
    """Saving of one run's checkpoints; all ranks call the same methods in the same order.

    Every method raises SaveError, on all ranks, where any rank could not write.

    Attributes:
        failed_in_a_row: saves that have failed since the last one that did not.
        has_saved: whether there is a checkpoint to go on from.
    """

    def __init__(
        self,
        path: Path,
        folder: CheckpointFolder,
        state: TrainingState,
        coordinator: RankCoordinator,
        sections: Sections,
        tokenizer: WordPiece,
        *,
        in_background: bool,
        retry_after: float = 30.0,
    ) -> None:
        """Take over a run's folder; what cannot be written is tried again `retry_after` seconds later, twice."""
        self._path, self._folder, self._state, self._agreement = path, folder, state, coordinator
        self._sections, self._tokenizer = sections, tokenizer
        self._host = _HostCopy() if in_background else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_yield_to_training)
        self._pending: _Pending | None = None
        self._rank, self._retry_after = dist.get_rank(), retry_after
        self.failed_in_a_row, self.has_saved = 0, folder.goes_on
        coordinator.first_rank(folder.remove_unfinished)

    def save(self, progress: Progress, recent: RecentSteps | None = None) -> None:
        """Begin to save the state of this moment; waits for an earlier save first."""
        self.finish()
        step = progress.step
        aside = self._agreement.first_rank(lambda: self._folder.begin(step))
        scalars = self._state.scalars()
        sections = dataclasses.replace(self._sections, progress=progress, optimizer=scalars, recent=recent)
        pieces = self._state.owned()
        copies = None if self._host is None else self._host.copy(pieces)

        def write() -> _Share:
            return self._write(aside, pieces, copies or (piece.read() for piece in pieces))

        self._pending = _Pending(step, sections, write, self._start(write), tries_left=_TRIES - 1)
        if self._host is None:
            self.finish()

    def poll(self) -> None:
        """Commit a save that all ranks have written; costs nothing where none is under way."""
        if self._pending is not None and self._agreement.all(self._pending.written.done()):
            self._settle(self._pending)

    def finish(self) -> None:
        """Wait for a save that is under way and commit it."""
        while self._pending is not None:
            self._settle(self._pending)

    def close(self) -> None:
        """Finish, and wait until outdated checkpoints are deleted."""
        try:
            self.finish()
        finally:
            self._thread.shutdown()

    def _start(self, write: Callable[[], _Share], wait: float = 0.0) -> Future[_Share]:
        def wait_and_write() -> _Share:
            time.sleep(wait)
            return write()

        return _run_now(wait_and_write) if self._host is None else self._thread.submit(wait_and_write)

    def _settle(self, pending: _Pending) -> None:
        """Commit what has been written, or begin to write it again."""
        try:
            share = self._agreement.everyone(lambda: self._try(pending.written.result))
            shares = self._agreement.gather(share)
            self._agreement.first_rank(lambda: self._try(lambda: self._commit(pending, shares)))
        except UserError as error:
            self._agreement.first_rank(lambda: self._folder.abandon(pending.step))
            if pending.tries_left:
                written = self._start(pending.write, self._retry_after)
                self._pending = dataclasses.replace(pending, written=written, tries_left=pending.tries_left - 1)
                return
            self._pending = None
            self.failed_in_a_row += 1
            raise SaveError(str(error)) from None
        self._pending = None
        self.failed_in_a_row, self.has_saved = 0, True

    def _write(self, aside: Path, pieces: list[OwnedPiece], tensors: Iterable[Tensor]) -> _Share:
        """Write this rank's file, and on the first rank the tokenizer."""
        aside.mkdir(parents=True, exist_ok=True)
        name = f"rank_{self._rank:05d}.safetensors"
        files = {}
        if pieces:
            files[name] = write_tensors(aside / name, {piece.key: (piece.length,) for piece in pieces}, tensors)
        if self._rank == 0:
            files |= write_tokenizer(aside, self._tokenizer)
        fragments = [(piece.fragment, piece.length) for piece in pieces if piece.kind == WEIGHT]
        return _Share([(f.name, f.sharding, Piece(name, f.shard, f.start, length)) for f, length in fragments], files)

    def _commit(self, pending: _Pending, shares: list[_Share]) -> None:
        manifest = Manifest(
            pending.sections, _tensor_entries(shares), {name: f for share in shares for name, f in share.files.items()}
        )
        for outdated in self._folder.commit(pending.step, manifest):
            self._thread.submit(shutil.rmtree, outdated, ignore_errors=True)

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            raise UserError(
                f"--save {self._path}: the checkpoint could not be written ({error}; {_TRIES} tries); older ones stay "
                "good"
            ) from None


def _yield_to_training() -> None:
    """Let the thread have what training on the same cores leaves over (Linux has a priority for each thread)."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _run_now(action: Callable[[], _Share]) -> Future[_Share]:
    outcome: Future[_Share] = Future()
    try:
        outcome.set_result(action())
    except OSError as error:
        outcome.set_exception(error)
    return outcome


class _HostCopy:
    """Buffers for what a rank saves, made at the first save (page-locked where there is a GPU) and used again."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def copy(self, pieces: list[OwnedPiece]) -> list[Tensor]:
        """Copy the numbers of this moment."""
        lengths = [piece.length for piece in pieces]
        if self._buffer is None:
            self._buffer = torch.empty(sum(lengths), pin_memory=torch.cuda.is_available())
        copies = list(self._buffer.split(lengths))
        for piece, copy in zip(pieces, copies, strict=True):
            copy.copy_(piece.read(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


def _tensor_entries(shares: list[_Share]) -> dict[str, TensorEntry]:
    """Collect what all ranks have written of each tensor; they must have written all of it, once."""
    shardings: dict[str, Sharding] = {}
    pieces: dict[str, list[Piece]] = {}
    for name, sharding, piece in (item for share in shares for item in share.pieces):
        assert shardings.setdefault(name, sharding) == sharding, f"ranks differ in the shape of {name}"
        pieces.setdefault(name, []).append(piece)
    entries = {}
    for name, sharding in sorted(shardings.items()):
        found = tuple(sorted(pieces[name], key=lambda piece: (piece.shard, piece.start)))
        entries[name] = TensorEntry(sharding.shape, sharding.dim, sharding.count, sharding.padding, found)
        gap = entries[name].gap()
        assert gap is None, f"{name}: the ranks did not write it whole, or twice: {gap}"
    return entries
