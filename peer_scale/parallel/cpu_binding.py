"""Which CPUs a rank runs on: those near its GPU, shared with the ranks whose GPUs are near the same ones.

Copies to and from a GPU, and the calls that start its kernels, take longer from the other side of a node.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from peer_scale.parallel.coordination import RankCoordinator

_SYSFS = Path("/sys")


@dataclass(frozen=True)
class Whereabouts:
    """What a rank tells the others; CPUs are written as the kernel does ("0-3,8").

    Attributes:
        host: its node's name.
        allowed: CPUs that its process was started on.
        near: those of them that are near its GPU; "" where it is not to be bound to them.
    """

    host: str
    allowed: str
    near: str


@dataclass(frozen=True)
class CpuShare:
    """The CPUs that a rank may count on.

    Attributes:
        cpus: where it may run.
        num_cores: how many physical cores are its own, other ranks having theirs.
        is_near: whether they were chosen here, near its GPU.
    """

    cpus: tuple[int, ...]
    num_cores: int
    is_near: bool

    def describe(self) -> str:
        """Say it for the start-up summary."""
        where = "near the GPU" if self.is_near else "as the process was started"
        return f"{cpu_list(self.cpus)}, {where}; {self.num_cores} cores of its own"


def bind_near_gpu(device: torch.device, coordinator: RankCoordinator) -> CpuShare | None:
    """Keep this process, and what it starts from now on, to its share of the CPUs near its GPU; None for a CPU.

    It stays where it is if Slurm, numactl or a container has confined it, or the machine does not say which CPUs are
    near. To be called on all ranks.
    """
    if device.type != "cuda":
        return None
    allowed = sorted(os.sched_getaffinity(0))
    near = near_cpus(_pci_address(device), allowed, _SYSFS)
    everyone = coordinator.exchange(Whereabouts(socket.gethostname(), cpu_list(allowed), cpu_list(near)))
    share = share_cpus(everyone, dist.get_rank(), _SYSFS)
    if share.is_near:
        try:
            os.sched_setaffinity(0, share.cpus)
        except OSError:  # a sandbox that forbids it
            return CpuShare(tuple(allowed), share.num_cores, is_near=False)
    return share


def near_cpus(pci_address: str | None, allowed: Collection[int], sysfs: Path) -> tuple[int, ...]:
    """Give the CPUs near a PCI device that a process is to be bound to, ascending.

    Nothing where the process may not run on all of the machine's CPUs, so that somebody has bound it already, and where
    the kernel does not know or all of them are near.

    Args:
        pci_address: such as "0000:1b:00.0"; None where it is not known.
        allowed: where the process may run.
        sysfs: the folder /sys.
    """
    try:
        online = parse_cpu_list((sysfs / "devices/system/cpu/online").read_text())
        near = parse_cpu_list((sysfs / "bus/pci/devices" / str(pci_address) / "local_cpulist").read_text())
    except (OSError, ValueError):
        return ()
    if set(online) != set(allowed) or not set(near) < set(online):
        return ()
    return near


def share_cpus(everyone: Sequence[Whereabouts], rank: int, sysfs: Path) -> CpuShare:
    """Give a rank its part of the CPUs that ranks of its node have in common, in whole cores.

    Args:
        everyone: what all ranks have told, in their order.
        rank: whose part.
        sysfs: the folder /sys of the rank's node.
    """
    own = everyone[rank]
    is_near = own.near != ""
    sharing = [
        other
        for other, told in enumerate(everyone)
        if (told.host, told.near) == (own.host, own.near) and (is_near or told.allowed == own.allowed)
    ]
    cores = _cores(parse_cpu_list(own.near or own.allowed), sysfs)
    count, place = len(sharing), sharing.index(rank)
    first, last = place * len(cores) // count, (place + 1) * len(cores) // count
    taken = cores[first:last] if is_near and last > first else cores
    cpus = sorted(cpu for core in taken for cpu in core)
    return CpuShare(tuple(cpus), max(1, last - first), is_near)


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """'0-2,8' -> (0, 1, 2, 8); ValueError for anything else."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ValueError(f"not a list of CPUs: {text!r}")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def cpu_list(cpus: Collection[int]) -> str:
    """(0, 1, 2, 8) -> '0-2,8'."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][1] + 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in parts)


def _cores(cpus: Collection[int], sysfs: Path) -> list[tuple[int, ...]]:
    """Put CPUs together that are threads of one core, ordered by their first; each its own where it is not said."""
    cores = set()
    for cpu in cpus:
        try:
            file = sysfs / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
            siblings = parse_cpu_list(file.read_text())
        except (OSError, ValueError):
            siblings = (cpu,)
        cores.add(tuple(sorted({cpu, *siblings} & set(cpus))))
    return sorted(cores)


def _pci_address(device: torch.device) -> str | None:
    """Say where the GPU is plugged in; None where this version of torch does not."""
    properties = torch.cuda.get_device_properties(device)
    try:
        domain, bus, slot = (getattr(properties, f"pci_{part}_id") for part in ("domain", "bus", "device"))
    except AttributeError:
        return None
    return f"{domain:04x}:{bus:02x}:{slot:02x}.0"
