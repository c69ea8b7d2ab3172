"""What the doctor has found: a table to read, and a file to attach to a bug report."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peer_scale.doctor.machine import versions
from peer_scale.doctor.outcome import Outcome
from peer_scale.planning.measured import SECTION
from peer_scale.storage import named_if_unwritable, write_atomically

_STYLES = {"passed": "green", "failed": "bold red", "not tried": "yellow"}
# nothing of the environment goes into the report but these: others may hold keys and passwords
_ALLOWED = {
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING", "PYTORCH_CUDA_ALLOC_CONF"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TMPDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR"),
    *("CUDA_HOME", "CC", "CXX", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA"),
    *("NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_SHM_DISABLE", "NCCL_NET_GDR_LEVEL", "NCCL_ALGO"),
    *("NCCL_PROTO", "NCCL_DEBUG", "NCCL_NET_PLUGIN", "TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
    *("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"),
    *("SLURM_STEP_TASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "SLURM_GPUS_ON_NODE"),
}


def allowed_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Give the variables that say how ranks are started and talk, by a list of their names."""
    return {name: value for name, value in sorted(environ.items()) if name in _ALLOWED}


def write_report(
    path: Path,
    outcomes: Sequence[Outcome],
    *,
    bandwidth: Mapping[str, Any] | None,
    environ: Mapping[str, str],
    arguments: Sequence[str],
) -> None:
    """Write the file whole, or not at all; UserError where it cannot be written.

    `peer-scale plan --measured` takes the bandwidth from it.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    report = {
        "report": "peer-scale doctor",
        "written": now.isoformat(timespec="seconds"),
        "arguments": list(arguments),
        "versions": versions(),
        "machine": {
            "system": platform.platform(),
            "cpus": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "environment": allowed_environment(environ),
        "checks": [asdict(outcome) for outcome in outcomes],
        SECTION: bandwidth,
    }
    with named_if_unwritable(path, "--report"):
        write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())


def print_table(outcomes: Sequence[Outcome], file: TextIO | None = None) -> None:
    """Print a row per check and the sums: drawn on a terminal, plain lines elsewhere."""
    file = sys.stdout if file is None else file
    if file.isatty():
        table = Table(expand=False, show_lines=False)
        for heading in ("group", "check", "", "found"):
            table.add_column(heading, no_wrap=heading != "found")
        for outcome in outcomes:
            state = Text(outcome.state, style=_STYLES[outcome.state])
            table.add_row(outcome.group, outcome.name, state, Text(outcome.line))
        Console(file=file).print(table)
    else:
        widths = [max(len(getattr(one, name)) for one in outcomes) for name in ("group", "name", "state")]
        for one in outcomes:
            cells = (one.group, one.name, one.state)
            aligned = "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
            print(f"{aligned}  {one.line}", file=file)
    print(counted(outcomes), file=file)


def counted(outcomes: Sequence[Outcome]) -> str:
    """Say how many checks came out how."""
    counts = Counter[str](outcome.state for outcome in outcomes)
    return ", ".join(f"{counts[state]} {state}" for state in _STYLES)
