"""The folders that a run writes into: held by one process, and never another run's by mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from peer_scale.checkpoints.identity import differences_of_identities, identity_of
from peer_scale.checkpoints.sections import Sections
from peer_scale.errors import UserError
from peer_scale.folder_lock import FolderLock
from peer_scale.settings.run import OutputConfig
from peer_scale.storage import (
    named_if_unwritable,
    read_json_object,
    remove_unfinished_writes,
    require_writable_folder,
    write_atomically,
)
from peer_scale.training.provenance import RunStart, append_start

METRICS, DROPPED = "metrics.jsonl", "metrics.dropped.jsonl"
RUN_YAML, TENSORBOARD, PAGE = "run.yaml", "tensorboard", "report.html"
SET_ASIDE = "give another folder, or --set-aside to move what is there into a folder beside it"
_RUN = "run.json"
BEATS, STACKS, BAD_STEPS = "heartbeats", "stacks", "bad_steps"
STARTS, SUMMARY, PROMETHEUS = "starts.jsonl", "summary.json", "metrics.prom"
RANK_LOGS, PROFILES = "ranks", "profiles"
_OF_LOGS = (
    *(METRICS, DROPPED, RUN_YAML, TENSORBOARD, PAGE, BEATS, STACKS, BAD_STEPS),
    *(STARTS, SUMMARY, PROMETHEUS, RANK_LOGS, PROFILES, _RUN),
)
_OF_CHECKPOINTS = ("step_*", "latest", ".writing_*", ".removing_*", ".damaged_*")


class RunFolders:
    """The --save and --log-dir folders in the hands of one process, the first rank."""

    def __init__(self, output: OutputConfig) -> None:
        self._output = output
        self._locks: list[FolderLock] = []

    def claim(self) -> None:
        """Make the folders and keep other runs out; UserError where one cannot be written or another run is there."""
        claimed: set[Path] = set()
        for path, flag in ((self._output.save, "--save"), (self._output.log_dir, "--log-dir")):
            if path is None:
                continue
            require_writable_folder(path, flag)
            if path.resolve() not in claimed:
                self._locks.append(FolderLock(path, flag))
                with named_if_unwritable(path, flag):
                    self._locks[-1].acquire()
                claimed.add(path.resolve())

    def release(self) -> None:
        """Let other runs in."""
        while self._locks:
            self._locks.pop().release()

    def set_aside_save(self) -> Path:
        """Move all checkpoints in --save into a new folder in it, and give that."""
        assert self._output.save is not None
        return _set_aside(self._output.save, _OF_CHECKPOINTS)

    def prepare_logs(self, run: str, step: int, own: Sections, run_yaml: str, say: Callable[[str], None]) -> None:
        """Make --log-dir ready for the run that `own` describes and that goes on after `step`; `say` what is moved.

        Metrics are this run's where its name stands beside them. Those of a run with the same settings that is not
        gone on from are set aside, since nothing of it may be lost and a command may be started again before its first
        checkpoint.

        Raises:
            UserError: the metrics there are another run's, and `--set-aside` is not given; or the disk fails.
        """
        folder = self._output.log_dir
        if folder is None:
            return
        with named_if_unwritable(folder, "--log-dir"):
            self._check_logs(folder, run, step, own, say)
            remove_unfinished_writes(*(folder / name for name in (_RUN, RUN_YAML, SUMMARY, PROMETHEUS)))
            record = {"run": run, "model": own.provenance.model, "identity": identity_of(own)}
            write_atomically(folder / _RUN, json.dumps(record).encode())
            write_atomically(folder / RUN_YAML, run_yaml.encode())

    def note_start(self, origin: RunStart, step: int) -> None:
        """Write into the --log-dir folder what started the run, to go on after `step`; UserError as above."""
        folder = self._output.log_dir
        if folder is not None:
            with named_if_unwritable(folder, "--log-dir"):
                append_start(folder / STARTS, origin, step)

    def _check_logs(self, folder: Path, run: str, step: int, own: Sections, say: Callable[[str], None]) -> None:
        metrics = folder / METRICS
        if not metrics.is_file() or not metrics.stat().st_size:
            return
        record = read_json_object(folder / _RUN)
        if (record is None and step) or (record is not None and record.get("run") == run):
            return
        who = "a run" if record is None else f"{record.get('model')} {record.get('run')}"
        told = "" if record is None else differences_of_identities(record.get("identity", {}), own)
        is_same = record is not None and not told and not step
        if not is_same and not self._output.set_aside:
            raise UserError(
                f"--log-dir {folder}: holds the metrics of another run ({who}{': ' if told else ''}{told}); {SET_ASIDE}"
            )
        say(f"--log-dir {folder}: the logs of {who} are now in {_set_aside(folder, _OF_LOGS)}")


def _set_aside(folder: Path, patterns: tuple[str, ...]) -> Path:
    number = 1
    while (aside := folder / f"earlier_{number}").exists():
        number += 1
    aside.mkdir()
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            path.replace(aside / path.name)
    return aside
