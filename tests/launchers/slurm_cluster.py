"""A real Slurm cluster on this machine, for tests: one controller, several node daemons, own folder, keys and ports."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "sinfo")


def missing_requirement() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "a Slurm cluster for tests is started as root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"needs Debian's slurm-wlm and munge: no {', '.join(absent)}"
    try:
        pwd.getpwnam("munge")
    except KeyError:
        return "there is no user munge"
    return None


@dataclass(frozen=True)
class Partition:
    """A partition of the nodes from `first` to before `end`, with options as slurm.conf writes them."""

    name: str
    first: int
    end: int
    options: str = ""


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster: `environ` makes Slurm's commands talk to it; `daemons` are those of its nodes."""

    folder: Path
    nodes: tuple[str, ...]
    environ: Mapping[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, *command: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
        """One of Slurm's commands, output captured."""
        options: dict[str, object] = {"env": self.environ, "timeout": 120, "capture_output": True, "text": True}
        return subprocess.run(command, check=False, **(options | kwargs))  # type: ignore[call-overload]

    def logs(self) -> str:
        """The ends of all daemons' logs."""
        return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.rglob("*.log")))


@contextmanager
def slurm_cluster(
    num_nodes: int = 2, gpus_per_node: int = 0, cpus_per_node: int = 4, partitions: Sequence[Partition] = ()
) -> Iterator[SlurmCluster]:
    """A cluster of nodes n0, n1, ..., up when entered; every process it started is gone when left.

    The first partition is the default one; without any there is one of all nodes.

    The node names do not resolve, as on a cluster without DNS. GPUs are counted only: there is no device behind them.
    """
    nodes = tuple(f"n{index}" for index in range(num_nodes))
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o711)  # munged runs as another user and must reach its own folder
    environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    for name in [name for name in environ if name.startswith(("SLURM_", "SBATCH_", "SRUN_")) and name != "SLURM_CONF"]:
        del environ[name]
    cluster = SlurmCluster(folder, nodes, environ)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(_end_processes_of, folder)
        _write_configuration(
            folder, nodes, gpus_per_node, cpus_per_node, partitions or (Partition("test", 0, num_nodes),)
        )
        try:
            _start_munged(folder, stack)
            _start(["slurmctld", "-D", "-i"], environ, folder / "slurmctld.out.log", stack)
            for node in nodes:
                log = folder / f"slurmd-{node}.out.log"
                cluster.daemons[node] = _start(["slurmd", "-D", "-N", node], environ, log, stack)
            _wait_until_idle(cluster)
            _run_once_on_every_node(cluster)
        except BaseException as error:
            raise RuntimeError(f"the Slurm cluster did not start: {error}\n{cluster.logs()}") from error
        yield cluster
        _cancel_all_jobs(cluster)


def _path() -> str:
    """PATH with the folders of system daemons, which a login shell may lack."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _write_configuration(
    folder: Path, nodes: tuple[str, ...], gpus_per_node: int, cpus_per_node: int, partitions: Sequence[Partition]
) -> None:
    controller_port, *node_ports = _free_ports(1 + len(nodes))
    host, address = socket.gethostname(), "127.0.0.1"
    gpus = f" Gres=gpu:{gpus_per_node}" if gpus_per_node else ""
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={host}({address})",
        f"SlurmctldPort={controller_port}",
        "SlurmUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge/socket,cred_expire=5",  # a requeued job waits until credentials have expired
        "CredType=cred/munge",
        "MpiDefault=none",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SwitchType=switch/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "GresTypes=gpu",
        "SlurmdParameters=config_overrides",  # more CPUs a node than this machine has
        "ReturnToService=2",
        "KillWait=30",
        "SlurmdTimeout=20",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "SchedulerParameters=batch_sched_delay=0,sched_interval=1",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd-%n.log",
        *(
            f"NodeName={node} NodeHostname={host} NodeAddr={address} Port={port} CPUs={cpus_per_node}{gpus}"
            for node, port in zip(nodes, node_ports, strict=True)
        ),
        *(
            f"PartitionName={one.name} Nodes={','.join(nodes[one.first : one.end])} State=UP "
            f"Default={'YES' if one is partitions[0] else 'NO'} {one.options}"
            for one in partitions
        ),
    ]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    devices = [folder / f"gpu{index}" for index in range(gpus_per_node)]
    for device in devices:
        device.touch()  # Slurm wants a file a GPU, but does not open it
    (folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))
    (folder / "state").mkdir()
    for node in nodes:
        (folder / f"spool-{node}").mkdir()


def _start(
    command: list[str], environ: Mapping[str, str], log: Path, stack: ExitStack, user: str | None = None
) -> subprocess.Popen[bytes]:
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output, user=user, group=user
        )
    stack.callback(_end, process)
    return process


def _start_munged(folder: Path, stack: ExitStack) -> None:
    home = folder / "munge"
    home.mkdir(mode=0o755)
    key = home / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    for path in (home, key):
        shutil.chown(path, "munge", "munge")
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "munged.log"}
    options = [f"--{option}={home / name}" for option, name in files.items()]
    _start(
        ["munged", "--foreground", "--num-threads=2", *options],
        {"PATH": _path()},
        folder / "munged.out.log",
        stack,
        user="munge",
    )
    deadline = time.monotonic() + 20
    while not (home / "socket").exists():
        if time.monotonic() > deadline:
            raise TimeoutError("munged made no socket")
        time.sleep(0.02)


def _wait_until_idle(cluster: SlurmCluster) -> None:
    deadline = time.monotonic() + 60
    while True:
        states = set(cluster.run("sinfo", "--noheader", "--Node", "--format=%N %T").stdout.splitlines())
        if states == {f"{node} idle" for node in cluster.nodes}:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"nodes are {sorted(states)}, not idle")
        time.sleep(0.1)


def _run_once_on_every_node(cluster: SlurmCluster) -> None:
    """A cluster that says idle may still schedule its first job late."""
    partitions = cluster.run("sinfo", "--noheader", "--format=%R %D").stdout.splitlines()
    for name, num_nodes in map(str.split, partitions):
        done = cluster.run("srun", f"--partition={name}", f"--nodes={num_nodes}", "--ntasks-per-node=1", "true")
        if done.returncode:
            raise RuntimeError(f"srun ended with {done.returncode}: {done.stderr}")


def _cancel_all_jobs(cluster: SlurmCluster) -> None:
    cluster.run("scancel", "--user=root")
    deadline = time.monotonic() + 20
    while cluster.run("squeue", "--noheader").stdout.strip() and time.monotonic() < deadline:
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_processes_of(folder: Path) -> None:
    """End what is left of this cluster's jobs: Slurm's step daemons leave their parent, but inherit SLURM_CONF."""
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
