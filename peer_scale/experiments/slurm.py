"""An experiment as Slurm jobs: for each run one that pre-trains, by slurm/base.sh, and one behind it that measures."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peer_scale.errors import UserError
from peer_scale.experiments.config import TFIDF
from peer_scale.experiments.plan import RunName
from peer_scale.experiments.pretraining import RunFolder, is_pretrained, trainer_flags
from peer_scale.experiments.processes import command
from peer_scale.experiments.run import Conductor
from peer_scale.storage import read_json_object, write_atomically

_JOBS = "slurm.json"
_CHECKOUT = Path(__file__).resolve().parents[2]
TEMPLATE = _CHECKOUT / "slurm" / "base.sh"
"""Where a checkout has the script of pre-training jobs; an installed package has none."""


@dataclass(frozen=True)
class SlurmOptions:
    """How jobs are submitted.

    Attributes:
        file: the experiment's YAML.
        template: slurm/base.sh.
        pretraining: sbatch's options for the pre-training jobs.
        measuring: sbatch's options for the others.
        dry_run: print the commands instead.
    """

    file: Path
    template: Path
    pretraining: Sequence[str] = ()
    measuring: Sequence[str] = ()
    dry_run: bool = False


def submit(conductor: Conductor, wanted: Sequence[RunName], options: SlurmOptions, say: Callable[[str], None]) -> None:
    """Submit the jobs of all runs that are not finished and have none in the queue; `say` is told of each.

    Raises:
        UserError: Slurm refuses a job, or there is no slurm/base.sh.
    """
    if not options.template.is_file():
        raise UserError(f"--slurm-script {options.template}: no such file; give slurm/base.sh of a checkout")
    queued = set() if options.dry_run else _queued()
    for run in wanted:
        folder = conductor.run_folder(run)
        if conductor.is_done(run):
            continue
        before = read_json_object(folder.path / _JOBS) or {}
        waiting = [job for job in before.values() if job in queued]
        if waiting:
            say(f"{run}: in the queue already, job {' and '.join(waiting)}")
            continue
        jobs = _submit_run(conductor, run, folder, options, say)
        if not options.dry_run:
            write_atomically(folder.path / _JOBS, json.dumps(jobs).encode())
            say(f"{run}: {', '.join(f'{what} job {job}' for what, job in jobs.items())}")


def _submit_run(
    conductor: Conductor, run: RunName, folder: RunFolder, options: SlurmOptions, say: Callable[[str], None]
) -> dict[str, str]:
    arm = conductor.plan.arms[run.arm]
    jobs: dict[str, str] = {}
    dependency: list[str] = []
    common = ["sbatch", "--parsable", f"--job-name={conductor.plan.config.name}-{run}"]
    output = f"--output={folder.path / 'slurm-%j.out'}"
    if arm.arm.kind != TFIDF and not is_pretrained(folder, arm):
        flags = trainer_flags(folder, arm, run.seed)
        words = [*common, output, *options.pretraining, str(options.template), *flags]
        jobs["pre-training"] = _sbatch(words, options, say)
        # a job whose condition can never come true would wait for ever
        dependency = [f"--dependency=afterok:{jobs['pre-training']}", "--kill-on-invalid-dep=yes"]
    folder.path.mkdir(parents=True, exist_ok=True)
    again = _measuring_command(conductor, run, options)
    words = [*common, output, "--open-mode=append", *dependency, *options.measuring, f"--wrap={again}"]
    jobs["measuring"] = _sbatch(words, options, say)
    return jobs


def _measuring_command(conductor: Conductor, run: RunName, options: SlurmOptions) -> str:
    """Give the shell command that finishes a run: this one, for that run alone."""
    path = os.pathsep.join([str(_CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    output = conductor.folder.absolute()
    again = command("experiment", options.file.absolute(), "--output", output, "--only", str(run))
    return f"PYTHONPATH={shlex.quote(path)} exec {shlex.join(again)}"


def _sbatch(words: Sequence[str], options: SlurmOptions, say: Callable[[str], None]) -> str:
    """Submit a job; give its number."""
    if options.dry_run:
        say(shlex.join(words))
        return "JOB"
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"--slurm: cannot run sbatch: {error.strerror}") from None
    if done.returncode:
        raise UserError(f"--slurm: sbatch refuses: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def _queued() -> set[str]:
    """Give the numbers of this user's jobs that wait or run."""
    try:
        done = subprocess.run(
            ["squeue", "--me", "--noheader", "--format=%A"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise UserError(f"--slurm: cannot run squeue: {error.strerror}") from None
    if done.returncode:
        raise UserError(f"--slurm: squeue says: {done.stderr.strip()}")
    return set(done.stdout.split())
