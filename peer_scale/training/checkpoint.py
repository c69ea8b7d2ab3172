"""Checkpoints: written by DeepSpeed into a folder aside, committed by a manifest and a rename.

SAVE/step_00000100/peer_scale.json      the manifest: configuration, progress, size of every file; written last
SAVE/step_00000100/tokenizer/           what turns text into the model's ids
SAVE/step_00000100/...                  what DeepSpeed writes
SAVE/latest                             name of the newest committed folder
SAVE/.writing_step_00000200/            one that was not finished: never loaded, removed by the next start
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from peer_scale.corpus.wordpiece import WordPiece
from peer_scale.errors import UserError
from peer_scale.parallel.agreement import Agreement
from peer_scale.settings.run import RunConfig
from peer_scale.storage import fsync_folder, write_atomically
from peer_scale.training.progress import Progress

FORMAT_VERSION = 1
MANIFEST = "peer_scale.json"
LATEST = "latest"
TOKENIZER = "tokenizer"
_PREFIX, _ASIDE = "step_", ".writing_"


def identity(run: RunConfig, *, data_fingerprint: str, tokenizer_digest: str, data_parallel: int) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that loads it, by section."""
    training = dataclasses.asdict(run.training)
    return {
        "model": dataclasses.asdict(run.model),
        "objective": dataclasses.asdict(run.objective),
        "data": {
            "fingerprint": data_fingerprint,
            "tokenizer": tokenizer_digest,
            "seed": run.seed,
            "validation_fraction": run.data.validation_fraction,
            "seq_length": training["seq_length"],
            "global_batch_size": training["global_batch_size"],
        },
        "layout": {
            "data_parallel": data_parallel,
            "tensor_parallel": run.tensor_parallel,
            "pipeline_parallel": run.pipeline_parallel,
            "zero_stage": run.zero_stage,
            "precision": training["precision"],
        },
    }


def provenance(run: RunConfig) -> dict[str, Any]:
    """What is told of a run where its weights go on to, and may differ in a run that resumes it."""
    return {"model": run.name, "data_path": [str(path) for path in run.data.data_path]}


class CheckpointFolder:
    """The checkpoints of one run; `sections` are what the manifest says of it: its identity and its provenance."""

    def __init__(
        self, path: Path, agreement: Agreement, sections: dict[str, Any], tokenizer: WordPiece, keep_last: int
    ) -> None:
        self._path, self._agreement, self._keep_last = path, agreement, keep_last
        self._sections, self._tokenizer = sections, tokenizer
        agreement.first_rank(self._remove_unfinished)

    def save(self, engine: Any, progress: Progress) -> None:
        """Write, commit, and drop the oldest; UserError on all ranks where any could not write (old ones stay good)."""
        name = f"{_PREFIX}{progress.step:08d}"
        aside = self._path / (_ASIDE + name)
        self._agreement.first_rank(lambda: shutil.rmtree(aside, ignore_errors=True))
        engine.save_checkpoint(str(self._path), tag=aside.name, save_latest=False)
        self._agreement.everyone(lambda: self._raise_write_error(engine, aside))
        self._agreement.first_rank(lambda: self._commit(aside, name, progress))

    def _raise_write_error(self, engine: Any, aside: Path) -> None:
        error = engine.checkpoint_engine.take_error()
        if error is not None:
            reason = _first_line(error)
            raise UserError(
                f"--save {aside.parent}: the checkpoint could not be written ({reason}); older ones stay good"
            )

    def _commit(self, aside: Path, name: str, progress: Progress) -> None:
        try:
            self._tokenizer.save(aside / TOKENIZER)
            files = sorted(path for path in aside.rglob("*") if path.is_file())
            for path in files:
                _fsync(path)
            manifest = {
                "format_version": FORMAT_VERSION,
                **self._sections,
                "progress": dataclasses.asdict(progress),
                "files": {str(path.relative_to(aside)): path.stat().st_size for path in files},
            }
            write_atomically(aside / MANIFEST, json.dumps(manifest, indent=1).encode())
            final = self._path / name
            shutil.rmtree(final, ignore_errors=True)
            aside.replace(final)
            fsync_folder(self._path)
            write_atomically(self._path / LATEST, name.encode())
        except OSError as error:
            raise UserError(
                f"--save {self._path}: the checkpoint could not be committed ({error}); older ones stay good"
            ) from None
        for old in committed(self._path)[: -self._keep_last]:
            shutil.rmtree(old, ignore_errors=True)

    def _remove_unfinished(self) -> None:
        for leftover in self._path.glob(f"{_ASIDE}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def committed(path: Path) -> list[Path]:
    """Committed checkpoints in `path`, oldest first."""
    return sorted(folder for folder in path.glob(f"{_PREFIX}*") if (folder / MANIFEST).is_file())


def newest(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest committed checkpoint under `path` (or `path` itself) and its manifest; None where there is none.

    Raises UserError for a manifest that cannot be read, or a file that is missing or of another size than it says.
    """
    folders = [path] if (path / MANIFEST).is_file() else committed(path)
    if not folders:
        return None
    folder = folders[-1]
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST}: not a checkpoint's manifest: {type(error).__name__}: {error}") from None
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder / MANIFEST}: format {manifest.get('format_version')}; this version reads {FORMAT_VERSION}"
        )
    for name, size in files.items():
        actual = (folder / name).stat().st_size if (folder / name).is_file() else None
        if actual != size:
            raise UserError(
                f"{folder / name}: is {'missing' if actual is None else f'{actual} bytes'}, not {size} bytes as saved"
            )
    return folder, manifest


def check_identity(folder: Path, manifest: dict[str, Any], run_identity: dict[str, Any]) -> None:
    """Raise UserError naming every field in which the checkpoint and the run differ."""
    saved = json.loads(json.dumps({section: manifest.get(section) for section in run_identity}))
    wanted = json.loads(json.dumps(run_identity))
    differences = _differences(saved, wanted, "")
    if differences:
        raise UserError(f"--load {folder}: saved by another run: {'; '.join(differences)}")


def _differences(saved: Any, wanted: Any, where: str) -> list[str]:
    if isinstance(saved, dict) and isinstance(wanted, dict):
        keys = sorted({*saved, *wanted})
        return [d for key in keys for d in _differences(saved.get(key), wanted.get(key), f"{where}.{key}".lstrip("."))]
    return [] if saved == wanted else [f"{where} {saved} there, {wanted} here"]


def load(engine: Any, folder: Path, manifest: dict[str, Any]) -> Progress:
    """Put a checkpoint's weights and optimizer state into the engine; gives how far it had come."""
    loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise UserError(f"--load {folder}: DeepSpeed found nothing to load there")
    return Progress(**manifest["progress"])


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
