"""The folder of a run's checkpoints: what is committed, what is half-written, which are kept.

SAVE/step_00000100/             a committed checkpoint: its name comes from a rename, after all its files are on disk
SAVE/latest                     name of the one that was saved last, for people
SAVE/.writing_step_00000200/    one that was not finished: never loaded, removed by the next start
SAVE/.removing_step_00000050/   one that is being deleted, likewise
SAVE/.damaged_step_00000100/    one that was found damaged by a start, which went on from the one before it

The newest checkpoint is the one that was saved last, whatever its step: manifests number them in the order of saving.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

from peer_scale.checkpoints.manifest import MANIFEST, Manifest, read_manifest
from peer_scale.checkpoints.pieces import check_size
from peer_scale.checkpoints.sections import Saving
from peer_scale.errors import DamagedError, UserError
from peer_scale.storage import fsync_folder, remove_unfinished_writes, write_atomically

LATEST = "latest"
_PREFIX, _WRITING, _REMOVING, _DAMAGED = "step_", ".writing_", ".removing_", ".damaged_"


class CheckpointFolder:
    """The folder in the hands of one process, the first rank; every method raises OSError where the disk does.

    Kept are the `keep_last` checkpoints that were saved last and those of steps that `keep_every` divides (None: no
    others). What a run has left behind by going back to an earlier checkpoint gives way first.
    """

    def __init__(
        self,
        path: Path,
        keep_last: int,
        keep_every: int | None = None,
        *,
        run: str | None = None,
        resumed: Saving | None = None,
    ) -> None:
        """Take the folder over for `run`, which goes on from the checkpoint that `resumed` is of."""
        self._path, self._keep_last, self._keep_every = path, keep_last, keep_every
        self._run, self._last = run, None if resumed is None else resumed.number

    def remove_unfinished(self) -> None:
        """Delete what an earlier run left half-written or half-deleted."""
        for leftover in (*self._path.glob(f"{_WRITING}*"), *self._path.glob(f"{_REMOVING}*")):
            shutil.rmtree(leftover, ignore_errors=True)
        remove_unfinished_writes(self._path / LATEST)

    @property
    def goes_on(self) -> bool:
        """Whether the run has a checkpoint in the folder to go on from."""
        return self._last is not None

    def begin(self, step: int) -> Path:
        """Make an empty folder to write the checkpoint of `step` into; whoever writes finds out where there is none."""
        aside = self._aside(step)
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            aside.mkdir(parents=True)
        return aside

    def abandon(self, step: int) -> None:
        """Delete what was begun and cannot be finished."""
        shutil.rmtree(self._aside(step), ignore_errors=True)

    def commit(self, step: int, manifest: Manifest) -> list[Path]:
        """Make what was begun the newest checkpoint; give folders out of the way that are now to be deleted."""
        aside = self._aside(step)
        saving = None
        if self._run is not None:
            saving = Saving(self._run, 1 + max(map(_number, self._savings.values()), default=0), self._last)
            manifest = dataclasses.replace(manifest, sections=dataclasses.replace(manifest.sections, saving=saving))
        manifest.write(aside)
        final = self._path / f"{_PREFIX}{step:08d}"
        outdated = [self._put_away(final)] if final.exists() else []
        aside.replace(final)
        fsync_folder(self._path)
        write_atomically(self._path / LATEST, final.name.encode())
        self._savings[final] = saving
        self._last = _number(saving)
        return outdated + [self._put_away(old) for old in superfluous(self._savings, self._keep_last, self._keep_every)]

    def _put_away(self, folder: Path) -> Path:
        """Take a checkpoint's name from it before any of its files go; `latest` must not name it then."""
        self._savings.pop(folder, None)
        latest = self._path / LATEST
        if latest.is_file() and latest.read_text() == folder.name:
            latest.unlink()
        away = self._path / f"{_REMOVING}{folder.name}"
        shutil.rmtree(away, ignore_errors=True)
        return folder.replace(away)

    @cached_property
    def _savings(self) -> dict[Path, Saving | None]:
        """The committed checkpoints, read when the first one is added: only one process does that."""
        return {folder: read_manifest(folder).sections.saving for folder in committed(self._path)}

    def _aside(self, step: int) -> Path:
        return self._path / f"{_WRITING}{_PREFIX}{step:08d}"


def superfluous(savings: Mapping[Path, Saving | None], keep_last: int, keep_every: int | None) -> list[Path]:
    """List the checkpoints that are not kept; the one that was saved last always is."""
    newest_first = sorted(savings, key=lambda folder: _age(folder, savings[folder]), reverse=True)
    current = _lineage(savings)
    ranked = [folder for folder in newest_first if folder in current]
    ranked += [folder for folder in newest_first if folder not in current]
    older = ranked[keep_last:]
    return [f for f in older if keep_every is None or f not in current or step_of(f) % keep_every]


def _lineage(savings: Mapping[Path, Saving | None]) -> set[Path]:
    """Find the checkpoints that the newest one goes back to; the others are of ways that the run has left."""
    numbered = {saving.number: (folder, saving.after) for folder, saving in savings.items() if saving is not None}
    lineage = {folder for folder, saving in savings.items() if saving is None}
    number = max(numbered, default=None)
    while number in numbered:
        folder, number = numbered[number]
        lineage.add(folder)
    if number is not None:  # that one is deleted; what it went back to is as old or older
        lineage |= {folder for each, (folder, _) in numbered.items() if each < number}
    return lineage


def _number(saving: Saving | None) -> int:
    return 0 if saving is None else saving.number


def _age(folder: Path, saving: Saving | None) -> tuple[int, int]:
    """Give what orders checkpoints by their saving; those of versions that did not number them are ordered by step."""
    return _number(saving), step_of(folder)


def step_of(folder: Path) -> int:
    """Read the step in a checkpoint's name."""
    return int(folder.name.removeprefix(_PREFIX))


def committed(path: Path) -> list[Path]:
    """List the committed checkpoints in `path`, by their steps."""
    folders = (folder for folder in path.glob(f"{_PREFIX}*") if re.fullmatch(rf"{_PREFIX}\d+", folder.name))
    return sorted((folder for folder in folders if (folder / MANIFEST).is_file()), key=step_of)


def newest(path: Path, gives_way: Callable[[Path, str], bool] | None = None) -> tuple[Path, Manifest] | None:
    """Find the checkpoint under `path` that was saved last (or `path` itself) and its manifest; None where none is.

    Args:
        path: a folder of checkpoints, or one of them.
        gives_way: is told of each damaged checkpoint in the folder and of what is wrong with it, and says whether the
            others will do; None: they will not.

    Raises:
        DamagedError: a manifest cannot be read, or a file is missing or of another size than it says.
        UserError: a manifest is not one of this version.
    """
    if (path / MANIFEST).is_file():
        folders, gives_way = [path], None
    else:
        folders = committed(path)
    found = []
    for folder in folders:
        try:
            found.append((folder, read_manifest(folder)))
        except DamagedError as error:
            if gives_way is None or not gives_way(folder, str(error)):
                raise
    if len(found) > 1:
        found.sort(key=lambda each: _age(each[0], each[1].sections.saving))
    while found:
        folder, manifest = found.pop()
        try:
            for name, entry in manifest.files.items():
                check_size(folder / name, entry)
            return folder, manifest
        except DamagedError as error:
            if gives_way is None or not gives_way(folder, str(error)):
                raise
    return None


def put_damaged_aside(say: Callable[[str], None], folder: Path, damage: str) -> bool:
    """Take its name from a damaged checkpoint, so that the one before it is the newest; False where there is no other.

    It is kept: what is left of it may be wanted, and what damaged it has to be found.
    """
    if len(committed(folder.parent)) < 2:
        return False
    aside = folder.with_name(f"{_DAMAGED}{folder.name}")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{_DAMAGED}{folder.name}_{number}")
    folder.rename(aside)
    fsync_folder(folder.parent)
    say(f"{damage}; put aside as {aside.name}, going on from the checkpoint before it")
    return True


def require_found(path: Path, flag: str = "--load") -> tuple[Path, Manifest]:
    """Do as `newest` does, but raise UserError where there is none."""
    found = newest(path)
    if found is None:
        raise UserError(
            f"{flag} {path}: no committed checkpoint there; give the trainer's --save folder or a step in it"
        )
    return found
