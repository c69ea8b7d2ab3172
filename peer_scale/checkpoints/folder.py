"""The folder of a run's checkpoints: what is committed, what is half-written, which are kept.

SAVE/step_00000100/             a committed checkpoint: its name comes from a rename, after all its files are on disk
SAVE/latest                     name of the newest committed one
SAVE/.writing_step_00000200/    one that was not finished: never loaded, removed by the next start
SAVE/.removing_step_00000050/   one that is being deleted, likewise
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from peer_scale.checkpoints.manifest import MANIFEST, Manifest, read_manifest
from peer_scale.checkpoints.pieces import check_size
from peer_scale.errors import UserError
from peer_scale.storage import fsync_folder, write_atomically

LATEST = "latest"
_PREFIX, _WRITING, _REMOVING = "step_", ".writing_", ".removing_"


class CheckpointFolder:
    """The folder in the hands of one process, the first rank; every method raises OSError where the disk does.

    Kept are the newest `keep_last` checkpoints and those of steps that `keep_every` divides (None: no others).
    """

    def __init__(self, path: Path, keep_last: int, keep_every: int | None = None) -> None:
        self._path, self._keep_last, self._keep_every = path, keep_last, keep_every

    def remove_unfinished(self) -> None:
        """Delete what an earlier run left half-written or half-deleted."""
        for leftover in (*self._path.glob(f"{_WRITING}*"), *self._path.glob(f"{_REMOVING}*")):
            shutil.rmtree(leftover, ignore_errors=True)

    def begin(self, step: int) -> Path:
        """Make an empty folder to write the checkpoint of `step` into."""
        aside = self._aside(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        return aside

    def abandon(self, step: int) -> None:
        """Delete what was begun and cannot be finished."""
        shutil.rmtree(self._aside(step), ignore_errors=True)

    def commit(self, step: int, manifest: Manifest) -> list[Path]:
        """Make what was begun the newest checkpoint; give folders out of the way that are now to be deleted."""
        aside = self._aside(step)
        manifest.write(aside)
        final = self._path / f"{_PREFIX}{step:08d}"
        outdated = [self._put_away(final)] if final.exists() else []
        aside.replace(final)
        fsync_folder(self._path)
        write_atomically(self._path / LATEST, final.name.encode())
        return outdated + [self._put_away(old) for old in self._superfluous()]

    def _superfluous(self) -> list[Path]:
        every = self._keep_every
        older = committed(self._path)[: -self._keep_last]
        return [folder for folder in older if every is None or step_of(folder) % every]

    def _put_away(self, folder: Path) -> Path:
        """Take a checkpoint's name from it before any of its files go; `latest` must not name it then."""
        latest = self._path / LATEST
        if latest.is_file() and latest.read_text() == folder.name:
            latest.unlink()
        away = self._path / f"{_REMOVING}{folder.name}"
        shutil.rmtree(away, ignore_errors=True)
        return folder.replace(away)

    def _aside(self, step: int) -> Path:
        return self._path / f"{_WRITING}{_PREFIX}{step:08d}"


def step_of(folder: Path) -> int:
    """Read the step in a checkpoint's name."""
    return int(folder.name.removeprefix(_PREFIX))


def committed(path: Path) -> list[Path]:
    """List the committed checkpoints in `path`, oldest first."""
    folders = (folder for folder in path.glob(f"{_PREFIX}*") if re.fullmatch(rf"{_PREFIX}\d+", folder.name))
    return sorted((folder for folder in folders if (folder / MANIFEST).is_file()), key=step_of)


def newest(path: Path) -> tuple[Path, Manifest] | None:
    """Find the newest committed checkpoint under `path` (or `path` itself) and its manifest; None where there is none.

    Raises UserError for a manifest that cannot be read, or a file that is missing or of another size than it says.
    """
    folders = [path] if (path / MANIFEST).is_file() else committed(path)
    if not folders:
        return None
    folder = folders[-1]
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        check_size(folder / name, entry)
    return folder, manifest


def require_found(path: Path) -> tuple[Path, Manifest]:
    """Do as `newest` does, but raise UserError where there is none."""
    found = newest(path)
    if found is None:
        raise UserError(
            f"--load {path}: no committed checkpoint there; give the trainer's --save folder or a step in it"
        )
    return found
