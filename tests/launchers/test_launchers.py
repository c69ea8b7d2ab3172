"""What ranks find out about themselves under real launchers on this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peer_scale.parallel.environment import ProcessEnvironment, default_num_threads
from runs import PROJECT

ALONE = ProcessEnvironment(0, 1, 0, 1, "127.0.0.1", 1, "torchrun")
PRINT_ENVIRONMENT = """
import dataclasses, json, os, sys
from pathlib import Path
from peer_scale.parallel.environment import default_num_threads, detect_environment
found = detect_environment(os.environ)
answer = dataclasses.asdict(found) | {"threads": default_num_threads(found, os.environ)}
Path(sys.argv[1], f"rank{found.rank}.json").write_text(json.dumps(answer))
"""


def launch(command: list[str], tmp_path: Path) -> list[dict[str, object]]:
    """What two ranks of a real launcher find, by rank."""
    script = tmp_path / "print_environment.py"
    script.write_text(PRINT_ENVIRONMENT)
    launcher_prefixes = ("SLURM_", "OMPI_", "PMI", "OMP_", "MASTER_", "LOCAL_", "TORCHELASTIC_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(launcher_prefixes)}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]


def check_two_local_ranks(ranks: list[dict[str, object]], launcher: str) -> None:
    for rank, found in enumerate(ranks):
        assert (found["rank"], found["local_rank"]) == (rank, rank)
        assert (found["world_size"], found["local_world_size"], found["launcher"]) == (2, 2, launcher)
        assert found["threads"] == max(1, (default_num_threads(ALONE, {}) or 0) // 2)
    assert ranks[0]["master_port"] == ranks[1]["master_port"]


def test_real_torchrun(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    check_two_local_ranks(launch(torchrun, tmp_path), "torchrun")


@pytest.mark.mpi
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun (Debian's openmpi-bin)")
def test_real_mpirun(tmp_path: Path) -> None:
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=True).stdout
    options = ["--oversubscribe"] if "Open MPI" in version else []
    if options and os.geteuid() == 0:
        options.append("--allow-run-as-root")
    ranks = launch(["mpirun", *options, "-n", "2", sys.executable], tmp_path)
    check_two_local_ranks(ranks, "mpirun")
    assert ranks[0]["master_addr"] == "127.0.0.1"
