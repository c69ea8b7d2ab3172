"""Where a run begins: at its own last checkpoint, at another one that it is told, or afresh."""

from __future__ import annotations

import functools
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from peer_scale.checkpoints.folder import newest, put_damaged_aside, require_found, step_of
from peer_scale.checkpoints.identity import changes, check_identity, differences, differences_of_weights
from peer_scale.checkpoints.loading import find_damage
from peer_scale.checkpoints.manifest import Manifest
from peer_scale.checkpoints.sections import Saving, Sections, split_of
from peer_scale.errors import UserError
from peer_scale.parallel.coordination import RankCoordinator
from peer_scale.parallel.tensor_parallel import TensorParallel
from peer_scale.settings.run import OutputConfig
from peer_scale.training.run_folders import SET_ASIDE, RunFolders


@dataclass(frozen=True)
class StartingPoint:
    """What a run goes on from or begins with.

    Attributes:
        run: the name of the run, which all its checkpoints and logs have.
        folder: the checkpoint to load; None: initial weights.
        manifest: that checkpoint's.
        only_weights: whether the run begins at step 0 with that checkpoint's weights.
    """

    run: str
    folder: Path | None = None
    manifest: Manifest | None = None
    only_weights: bool = False

    @property
    def step(self) -> int:
        """The last step that is done."""
        return 0 if self.manifest is None or self.only_weights else self.manifest.sections.progress.step

    def saving_in(self, save: Path) -> Saving | None:
        """Give where in the order of the checkpoints in `save` the run goes on; None where it does not go on there."""
        if self.folder is None or self.manifest is None or self.folder.resolve().parent != save.resolve():
            return None
        return self.manifest.sections.saving


def find_start(
    output: OutputConfig,
    own: Sections,
    tensor_parallel: TensorParallel,
    folders: RunFolders,
    say: Callable[[str], None],
    environ: Mapping[str, str] = os.environ,
) -> StartingPoint:
    """Look into --save, then --load, then --init-from; `own` describes the run; `say` what is done.

    What --save holds of this run comes first, so that a command that is started again by a scheduler goes on where it
    was, however it began.

    Raises:
        UserError: --save holds another run and `--set-aside` is not given, --load is not there, or a checkpoint cannot
            be read or does not fit the run.
    """
    found = _in_save(output, own, tensor_parallel, folders, say, environ)
    if found is None and output.load is not None:
        found = _in_load(output.load, own, tensor_parallel, say)
    if found is not None:
        if output.init_from is not None:
            say(f"--init-from {output.init_from}: not read again, since the run goes on")
        return found
    if output.init_from is not None:
        return _weights_of(output.init_from, own, tensor_parallel, say)
    return StartingPoint(_new_run())


def find_sound_start(
    output: OutputConfig,
    own: Sections,
    tensor_parallel: TensorParallel,
    folders: RunFolders,
    coordinator: RankCoordinator,
    say: Callable[[str], None],
) -> StartingPoint:
    """Do as `find_start` does, on all ranks alike, and check each file of what is to be loaded.

    What --save holds and is damaged gives way to the checkpoint before it, unless `--strict-load` is given or it is the
    one that --load names.

    Raises:
        UserError: as `find_start`; or what is to be loaded is damaged.
    """
    while True:
        start = coordinator.first_rank(lambda: find_start(output, own, tensor_parallel, folders, say))
        if start.folder is None or start.manifest is None:
            return start
        damage = find_damage(coordinator, start.folder, start.manifest)
        if damage is None:
            return start
        if not _gives_way(start.folder, output) or not coordinator.first_rank(
            functools.partial(put_damaged_aside, say, start.folder, damage)
        ):
            raise UserError(damage)


def _gives_way(folder: Path, output: OutputConfig) -> bool:
    if output.strict_load or output.save is None or folder.resolve().parent != output.save.resolve():
        return False
    return output.load is None or output.load.resolve() != folder.resolve()


def _in_save(
    output: OutputConfig,
    own: Sections,
    tensor_parallel: TensorParallel,
    folders: RunFolders,
    say: Callable[[str], None],
    environ: Mapping[str, str],
) -> StartingPoint | None:
    save, load = output.save, output.load
    if save is None:
        return None
    found = newest(save, None if output.strict_load else functools.partial(put_damaged_aside, say))
    if found is None:
        return None
    folder, manifest = found
    told = differences(manifest, own, tensor_parallel)
    if told and output.set_aside and (load is None or save.resolve() not in load.resolve().parents):
        say(f"--save {save}: {_name(manifest)} is now in {folders.set_aside_save()}")
        return None
    if told:
        raise UserError(f"--save {save}: holds {_name(manifest)}, saved by another run: {told}; {SET_ASIDE}")
    if load is not None and load.resolve() != save.resolve():
        if load.resolve().parent == save.resolve():
            return _go_back(save, load, found, own, tensor_parallel, say, environ)
        say(f"--load {load}: not read, since --save {save} holds {_name(manifest)} of this run")
    _mention_latest(save, folder, say)
    return _going_on(folder, manifest, own, say)


def _go_back(
    save: Path,
    load: Path,
    found: tuple[Path, Manifest],
    own: Sections,
    tensor_parallel: TensorParallel,
    say: Callable[[str], None],
    environ: Mapping[str, str],
) -> StartingPoint:
    """Go on from the one of the run's checkpoints that was asked for, unless that has been done already."""
    folder, manifest = require_found(load)
    check_identity(folder, manifest, own, tensor_parallel)
    if _was_restarted(environ):
        say(f"--load {load}: not gone back to again, since the job was restarted")
        return _going_on(*found, own, say)
    if folder.resolve() != found[0].resolve():
        say(
            f"going back to step {step_of(folder)} from {_name(found[1])}, which gives way to what is saved from now on"
        )
    return _going_on(folder, manifest, own, say)


def _in_load(
    load: Path, own: Sections, tensor_parallel: TensorParallel, say: Callable[[str], None]
) -> StartingPoint | None:
    if not load.exists():
        raise UserError(f"--load {load}: no such folder; give a --save folder or a step in it, or drop --load")
    found = newest(load)
    if found is None:
        say(f"--load {load}: no committed checkpoint there; starting fresh")
        return None
    folder, manifest = found
    check_identity(folder, manifest, own, tensor_parallel)
    _mention_latest(load, folder, say)
    return _going_on(folder, manifest, own, say)


def _going_on(folder: Path, manifest: Manifest, own: Sections, say: Callable[[str], None]) -> StartingPoint:
    sections = manifest.sections
    if sections.imported is not None:
        say(f"starting from {folder}: weights of {', '.join(sections.imported.values())}")
        return StartingPoint(_new_run(), folder, manifest)
    changed = changes(manifest, own)
    say(f"resuming from {folder} after step {sections.progress.step}" + (f"; changed: {changed}" if changed else ""))
    if split_of(sections) == "documents":
        say("text is held out by documents, not by tokens, as by the version that began this run")
    return StartingPoint(_new_run() if sections.saving is None else sections.saving.run, folder, manifest)


def _weights_of(
    path: Path, own: Sections, tensor_parallel: TensorParallel, say: Callable[[str], None]
) -> StartingPoint:
    folder, manifest = require_found(path, "--init-from")
    told = differences_of_weights(manifest, own, tensor_parallel)
    if told:
        raise UserError(f"--init-from {folder}: weights of another model: {told}")
    say(f"starting from the weights of {folder}")
    return StartingPoint(_new_run(), folder, manifest, only_weights=True)


def _mention_latest(path: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Say so where somebody has written the name of another checkpoint into `latest`."""
    latest = path / "latest"
    named = latest.read_text().strip() if latest.is_file() else folder.name
    if named != folder.name and (path / named).is_dir() and folder.parent == path:
        say(f"{latest} names {named}, but {folder.name} was saved after it; --load {path / named} goes back to it")


def _name(manifest: Manifest) -> str:
    """Name a checkpoint by its run and step."""
    sections = manifest.sections
    run = sections.provenance.model if sections.saving is None else f"{sections.provenance.model} {sections.saving.run}"
    return f"step {sections.progress.step} of {run}"


def _new_run() -> str:
    """Make a name for a run: when it began, and what tells it from another one of the same second."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def _was_restarted(environ: Mapping[str, str]) -> bool:
    """Say whether a scheduler or launcher has started the same command again."""
    counts = (environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return any(count.isdigit() and int(count) > 0 for count in counts)
