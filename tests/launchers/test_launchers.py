"""What ranks find out about themselves under real launchers on this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from peer_scale.parallel.environment import ProcessEnvironment, default_num_threads
from rank_pool import RankPools, free_port
from runs import PROJECT, SMALL, TIMES, corpus, outside_of_ranks, read_metrics, train_in_pool

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


TRAINER = str(PROJECT / "peer_scale" / "pretrain.py")
SHORT = ("--train-iters", "40", "--global-batch-size", "8", "--micro-batch-size", "2", "--fp32", "--num-threads", "1")


def short_training(text_file: Path, log_dir: Path, *more: object) -> list[str]:
    return [*SMALL, *corpus(text_file), *SHORT, "--num-workers", "0", "--log-dir", str(log_dir), *map(str, more)]


def comparable(metrics: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics]


@pytest.fixture(scope="module")
def undisturbed(text_file: Path, rank_pools: RankPools, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    log_dir = tmp_path_factory.mktemp("undisturbed")
    return comparable(rank_pools.of(2).run(train_in_pool, short_training(text_file, log_dir))[0])


@pytest.mark.slow
def test_torchrun_on_two_nodes_starts_a_killed_rank_again(
    text_file: Path, undisturbed: list[dict], tmp_path: Path
) -> None:
    """Two torchruns on this machine stand for two nodes."""
    port = free_port()
    rendezvous = [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{port}",
        "--rdzv-id",
        "two",
        "--max-restarts",
        "3",
    ]
    flags = short_training(text_file, tmp_path / "logs", "--save", tmp_path / "save", "--save-interval", "5")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *rendezvous]
    log = (tmp_path / "said.txt").open("w")
    nodes = [
        subprocess.Popen(
            [*command, "--local-addr", "127.0.0.1", TRAINER, *flags], stdout=log, stderr=log, env=outside_of_ranks()
        )
        for _ in range(2)
    ]
    metrics = tmp_path / "logs" / "metrics.jsonl"
    try:
        wait_until(lambda: (tmp_path / "save" / "latest").exists() and metrics.read_bytes().count(b"\n") >= 7, nodes)
        ranks = [child for node in nodes for child in psutil.Process(node.pid).children()]
        victim = ranks[-1]
        for rank in ranks:
            rank.suspend()
        assert metrics.read_bytes().count(b"\n") < 40, "too late"
        victim.kill()
        ranks[0].resume()
        codes = [node.wait(timeout=240) for node in nodes]
    finally:
        for node in nodes:
            end(node)
    said = (tmp_path / "said.txt").read_text()
    assert codes == [0, 0], said
    assert "resuming from" in said
    assert comparable(read_metrics(tmp_path / "logs")) == undisturbed


def wait_until(condition: Callable[[], bool], processes: Sequence[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end(launcher: subprocess.Popen) -> None:
    """End a launcher that is still there, and then its ranks."""
    if launcher.poll() is None:
        ranks = psutil.Process(launcher.pid).children(recursive=True)
        for process in [launcher, *ranks]:
            process.send_signal(signal.SIGKILL)
        launcher.wait()


@pytest.mark.mpi
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun (Debian's openmpi-bin)")
def test_mpirun_trains_as_others_do(text_file: Path, undisturbed: list[dict], tmp_path: Path) -> None:
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=True).stdout
    options = (
        ["--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])] if "Open MPI" in version else []
    )
    command = ["mpirun", *options, "-n", "2", sys.executable, TRAINER, *short_training(text_file, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=outside_of_ranks(), check=False)
    assert done.returncode == 0, done.stderr
    assert comparable(read_metrics(tmp_path)) == undisturbed
