"""What a machine may lack for a run, found at its start: memory that ranks share, room for checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

_MIB, _GIB = 2**20, 2**30
_SHARED_BY_NCCL = 512 * _MIB  # per rank, generously
_SHARED_OTHERWISE = 64 * _MIB
_CHECKPOINT_BYTES = 12  # per parameter: a weight and two moments in fp32
_CHECKPOINTS = 2
SHARED_MEMORY = Path("/dev/shm")


def shared_memory_shortage(folder: Path, *, num_ranks: int, has_gpus: bool) -> str | None:
    """Say in a line what is wrong with the memory that processes share; None where nothing is.

    Args:
        folder: where the system keeps it.
        num_ranks: on this node.
        has_gpus: whether NCCL talks through it.
    """
    needed = num_ranks * (_SHARED_BY_NCCL if has_gpus else _SHARED_OTHERWISE)
    if not folder.is_dir():
        return f"{folder} is not there; processes share memory through it: mount a tmpfs there"
    disk = shutil.disk_usage(folder)
    if disk.free < needed:
        return (
            f"{folder} has {size(disk.free)} free of {size(disk.total)}, {num_ranks} ranks want {size(needed)}: "
            "remount it with a greater size, docker run --shm-size=8g (or --ipc=host), a memory-backed volume in "
            "Kubernetes"
        )
    return None


def disk_shortage(save: Path, num_parameters: int) -> str | None:
    """Say in a line that the --save folder has no room for two checkpoints; None where it has, or does not tell."""
    one = _CHECKPOINT_BYTES * num_parameters
    try:
        free = shutil.disk_usage(save).free
    except OSError:
        return None
    if free >= _CHECKPOINTS * one:
        return None
    return (
        f"--save {save}: {size(free)} free, and a checkpoint takes {size(one)}: make room for {_CHECKPOINTS}, since "
        "a new one is written before an old one goes"
    )


def size(number: int) -> str:
    """Give a number of bytes as people read it."""
    return f"{number / _GIB:.1f} GiB" if number >= _GIB else f"{number / _MIB:.1f} MiB"
