"""What started a run and with what: commit, versions, hosts, devices, command; the same on all ranks, and kept."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import peer_scale
from peer_scale.errors import UserError, one_line
from peer_scale.parallel.coordination import RankCoordinator
from peer_scale.storage import read_json_lines

PACKAGE = "peer_scale"
_LIBRARIES = ("deepspeed", "megatron-core", "transformers")
_NOT_COMPARED = ("driver",)  # newer ones run what was made for older ones
_GIT_SECONDS = 30.0


@dataclass(frozen=True)
class Software:
    """What one rank runs; versions by name, None where there is none of it.

    Attributes:
        commit: of the checkout that the package lies in; None where it is installed, or git does not tell.
        dirty: whether files of that checkout were changed since; None where it is installed, or git does not tell.
        versions: of the package, Python, torch, what torch was built with, the GPUs' driver and the libraries.
        is_installed: whether the package lies in no checkout.
    """

    commit: str | None
    dirty: bool | None
    versions: dict[str, str | None]
    is_installed: bool

    def compared(self) -> dict[str, str | None]:
        """Give what must be the same on all ranks, without what is not known here (a node may have no git)."""
        versions = {name: version for name, version in self.versions.items() if name not in _NOT_COMPARED}
        is_known = self.is_installed or self.commit is not None
        return {**versions, "git commit": self.commit} if is_known else versions


@dataclass(frozen=True)
class RunStart:
    """One start of a run, as it is written into starts.jsonl and, but for its number, into checkpoints.

    Attributes:
        unix_time: when the first rank's process began.
        command: that process's words.
        software: the same on all ranks.
        hosts: of the ranks, each once, in the order of the ranks.
        host_of_rank: one for each rank.
        devices: kinds of GPUs, or of CPUs where there are none.
        slurm: the job's number and how often Slurm has started it again.
    """

    unix_time: float
    command: tuple[str, ...]
    software: Software
    host_of_rank: tuple[str, ...]
    devices: tuple[str, ...]
    slurm: dict[str, Any] | None

    @property
    def hosts(self) -> list[str]:
        """Give each host once."""
        return list(dict.fromkeys(self.host_of_rank))

    def as_json(self) -> dict[str, Any]:
        """Give what is kept of it."""
        return {
            "unix_time": self.unix_time,
            "command": list(self.command),
            "commit": self.software.commit,
            "dirty": self.software.dirty,
            "versions": self.software.versions,
            "hosts": self.hosts,
            "devices": list(self.devices),
            "world_size": len(self.host_of_rank),
            "slurm": self.slurm,
        }

    def as_comment(self) -> str:
        """Give a few lines for the head of run.yaml."""
        software, hosts = self.software, Counter(self.host_of_rank)
        commit = "an installed package" if software.is_installed else f"commit {software.commit or 'unknown'}"
        versions = ", ".join(f"{name} {version}" for name, version in software.versions.items() if version is not None)
        shown = [f"{number} on {host}" for host, number in list(hosts.items())[:8]]
        shown += [f"and {len(hosts) - 8} more hosts"] if len(hosts) > 8 else []
        lines = [
            f"started {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.unix_time))}: {' '.join(self.command)}",
            f"{commit}{' with changes' if software.dirty else ''}; {versions}",
            f"{len(self.host_of_rank)} ranks ({', '.join(shown)}): {', '.join(self.devices)}",
        ]
        return "".join(f"# {one_line(line)}\n" for line in lines)


def versions() -> dict[str, str | None]:
    """Give the versions of what a run stands on, None where it is not there."""
    has_gpus = torch.cuda.is_available()
    found: dict[str, str | None] = {
        PACKAGE: peer_scale.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_gpus else None,
        "driver": _driver(),
    }
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def find_software(package: Path = Path(peer_scale.__file__).parent, *, with_changes: bool = True) -> Software:
    """Find out what this process runs.

    Args:
        package: the package's folder.
        with_changes: whether to look for changed files, which takes a while on a network disk.
    """
    checkout = package.resolve().parent
    if not (checkout / ".git").exists():
        return Software(None, None, versions(), is_installed=True)
    commit = _git(checkout, "rev-parse", "HEAD")
    changed = _git(checkout, "status", "--porcelain", "--untracked-files=no") if with_changes else None
    return Software(commit, None if changed is None else bool(changed), versions(), is_installed=False)


def device_name(device: torch.device) -> str:
    """Give the kind of a GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine() or "CPU")


def describe_start(
    coordinator: RankCoordinator, device: torch.device, environ: Mapping[str, str] = os.environ, *, unix_time: float
) -> RunStart:
    """Describe this start of a run, on all ranks alike.

    Args:
        coordinator: of all ranks.
        device: this rank's.
        environ: the process's environment variables.
        unix_time: when this rank's process began; the first rank's counts.

    Raises:
        UserError: on all ranks alike: ranks differ in a version or in the commit.
    """
    software = find_software(with_changes=coordinator.is_first_rank)
    # of Python's own types: another version may not know ours
    ranks = coordinator.exchange((socket.gethostname(), device_name(device), software.compared()))
    difference = difference_of_software([(host, compared) for host, _, compared in ranks])
    if difference is not None:
        raise UserError(difference)
    start = RunStart(
        unix_time,
        tuple(sys.argv),
        software,
        tuple(host for host, _, _ in ranks),
        tuple(dict.fromkeys(name for _, name, _ in ranks)),
        _slurm(environ),
    )
    return coordinator.first_rank(lambda: start)


def difference_of_software(ranks: Sequence[tuple[str, Mapping[str, str | None]]]) -> str | None:
    """Say in one line which hosts have another version than most ranks, None where all have the same.

    Args:
        ranks: for each its host and what it runs, as far as that is known.
    """
    wrong, names = [], list(dict.fromkeys(name for _, software in ranks for name in software))
    for name in names:
        found = [(software[name], host) for host, software in ranks if name in software]
        (usual, _), *others = Counter(version for version, _ in found).most_common()
        for version, _ in others:
            hosts = list(dict.fromkeys(host for other, host in found if other == version))
            shown = ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")
            wrong.append(f"{name} is {version or 'not there'} on {shown} and {usual or 'not there'} elsewhere")
    if not wrong:
        return None
    return (
        f"the ranks do not run the same: {'; '.join(wrong)} (compared are {', '.join(names)}): give all nodes "
        "the same environment"
    )


def append_start(path: Path, start: RunStart, step: int) -> None:
    """Add this start, after so many steps, to starts.jsonl; OSError where the disk fails."""
    number = len(read_json_lines(path)) + 1
    line = json.dumps({"start": number, "step": step, **start.as_json()}) + "\n"
    with path.open("ab") as file:
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            file.write(b"\n")  # after a line that was cut short
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def process_began() -> float:
    """Give the unix time at which this process was started, or now where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return time.time()
    return time.time() - max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))


def _slurm(environ: Mapping[str, str]) -> dict[str, Any] | None:
    job = environ.get("SLURM_JOB_ID")
    if not job:
        return None
    count = environ.get("SLURM_RESTART_COUNT", "")
    return {"job_id": job, "restart_count": int(count) if count.isdecimal() else 0}


def _driver() -> str | None:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip() or None
    except OSError:
        return None


def _git(folder: Path, *words: str) -> str | None:
    """Give what git says of a folder, without running what its settings name; None where it says nothing."""
    command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", "--no-optional-locks", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
