"""Which rank this process is, as told by whatever started it: torchrun, deepspeed, srun, mpirun or nobody."""

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peer_scale.errors import UserError

_LOOPBACK = "127.0.0.1"
_DEFAULT_PORT = 29500
ANY_PORT = 0  # one process alone: whichever is free when it is bound; chosen before, another may have it by then
# Slurm numbers srun's steps from 0; its batch, interactive and extern steps are the last numbers of 32 bits.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class ProcessEnvironment:
    """The place of this process among all processes of the run, and the address where they meet.

    `launcher` is "torchrun", "deepspeed", "srun", "mpirun", "environment" (RANK set by someone else) or "none".
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str

    def __post_init__(self) -> None:
        if self.rank >= self.world_size:
            raise UserError(f"{self.launcher} gave rank {self.rank} of {self.world_size}; it must be below that")
        if self.local_rank >= self.local_world_size:
            raise UserError(
                f"{self.launcher} gave local rank {self.local_rank} of {self.local_world_size} on this node; "
                "it must be below that"
            )
        if self.local_world_size > self.world_size:
            raise UserError(
                f"{self.launcher} gave {self.local_world_size} ranks on this node, but only {self.world_size} in all"
            )


def detect_environment(environ: Mapping[str, str], local_rank_flag: int | None = None) -> ProcessEnvironment:
    """Give the rank of this process from the environment variables of its launcher.

    RANK (torchrun, deepspeed) wins over mpirun's variables, and those over srun's: inside a Slurm job all may be set,
    and the innermost launcher is the one that started this process. MASTER_ADDR and MASTER_PORT, where set, always win.

    Args:
        environ: The process's environment variables.
        local_rank_flag: `--local_rank` of older launchers, used where LOCAL_RANK is not set; negative is not given.

    Raises:
        UserError: A variable is malformed or missing, or does not fit the others.
    """
    if _text(environ, "RANK") is not None:
        return _from_rank_variables(environ, local_rank_flag)
    if _text(environ, "OMPI_COMM_WORLD_RANK") is not None:
        return _from_mpirun(
            environ, [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
        )
    # srun --mpi=pmi2 sets PMI_RANK as well, but only Hydra's mpirun has the local names.
    if _text(environ, "PMI_RANK") is not None and _text(environ, "MPI_LOCALRANKID") is not None:
        return _from_mpirun(environ, ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"])
    if _is_srun_task(environ):
        return _from_srun(environ)
    address = _text(environ, "MASTER_ADDR") or _LOOPBACK
    return ProcessEnvironment(0, 1, 0, 1, address, _master_port(environ) or ANY_PORT, "none")


def default_num_threads(env: ProcessEnvironment, environ: Mapping[str, str]) -> int | None:
    """CPU threads for this rank, so that the ranks of a node share its cores; None to leave torch's number alone.

    OMP_NUM_THREADS wins, unless it is the 1 that torchrun sets by itself for several ranks on a node (a user's own 1
    looks the same there). Then --cpus-per-task under srun. Then this rank's share of the cores, whether the launcher
    bound it to cores of its own or all ranks run on the same.
    """
    threads = _text(environ, "OMP_NUM_THREADS")
    is_default_of_torchrun = threads == "1" and env.launcher == "torchrun" and env.local_world_size > 1
    if threads is not None and not is_default_of_torchrun:
        return None
    if env.launcher == "srun":
        cpus_per_task = _integer(environ, "SLURM_CPUS_PER_TASK", minimum=1)
        if cpus_per_task is not None:
            return cpus_per_task
    own = os.sched_getaffinity(0)
    return fair_share(
        num_cpus=len(own),
        num_cores=_count_cores(own),
        launcher_cpus=_launcher_cpus(env, environ, len(own)),
        local_world_size=env.local_world_size,
    )


def fair_share(*, num_cpus: int, num_cores: int, launcher_cpus: int, local_world_size: int) -> int:
    """Give the threads of one of `local_world_size` ranks, one per physical core, at least 1.

    Args:
        num_cpus: Logical CPUs this rank may run on.
        num_cores: Physical cores they belong to.
        launcher_cpus: Logical CPUs its launcher may use on this node. Ranks bound to CPUs of their own have
            `num_cpus` up to an equal share of these; ranks that share a mask have more.
        local_world_size: Ranks on this node.
    """
    cpus = min(num_cpus, launcher_cpus // local_world_size)
    return max(1, cpus * num_cores // num_cpus)


def _from_rank_variables(environ: Mapping[str, str], local_rank_flag: int | None) -> ProcessEnvironment:
    """RANK, WORLD_SIZE and their like, which torchrun, deepspeed and many wrapper scripts set."""
    launcher = "environment"
    if _text(environ, "TORCHELASTIC_RUN_ID") is not None:
        launcher = "torchrun"
    elif _text(environ, "CROSS_RANK") is not None:
        launcher = "deepspeed"
    rank, world_size = _required_integer(environ, "RANK"), _required_integer(environ, "WORLD_SIZE", minimum=1)
    alone = world_size == 1
    local_rank = _integer(environ, "LOCAL_RANK")
    if local_rank is None and local_rank_flag is not None and local_rank_flag >= 0:
        local_rank = local_rank_flag
    if local_rank is None:
        local_rank = 0 if alone else _required_integer(environ, "LOCAL_RANK")
    local_world_size = _integer(environ, "LOCAL_WORLD_SIZE", minimum=1) or _integer(environ, "LOCAL_SIZE", minimum=1)
    if local_world_size is None:
        local_world_size = 1 if alone else _required_integer(environ, "LOCAL_WORLD_SIZE", minimum=1)
    address, port = _text(environ, "MASTER_ADDR"), _master_port(environ)
    if address is None and not alone:
        raise _not_set("MASTER_ADDR", "the host name of rank 0's node")
    if port is None and not alone:
        raise _not_set("MASTER_PORT", "a free port of rank 0's node")
    return ProcessEnvironment(
        rank,
        world_size,
        local_rank,
        local_world_size,
        address or _LOOPBACK,
        port or ANY_PORT,
        launcher,
    )


def _from_mpirun(environ: Mapping[str, str], names: list[str]) -> ProcessEnvironment:
    rank, world_size, local_rank, local_world_size = (_required_integer(environ, name) for name in names)
    address, port = _text(environ, "MASTER_ADDR"), _master_port(environ)
    if address is None:
        if local_world_size != world_size:
            raise UserError(
                "mpirun started ranks on several nodes and MASTER_ADDR is not set; export the first node's name to all "
                "of them: mpirun -x MASTER_ADDR=<node> (Open MPI) or -genv MASTER_ADDR <node> (MPICH)"
            )
        address = _LOOPBACK
    if port is None:
        job = _text(environ, "PMIX_NAMESPACE")  # Open MPI's number of the run; Hydra has no like
        port = _DEFAULT_PORT if job is None else _port_of(job)
    return ProcessEnvironment(rank, world_size, local_rank, local_world_size, address, port, "mpirun")


def _is_srun_task(environ: Mapping[str, str]) -> bool:
    """True in a task of srun, false in the shell of sbatch or salloc, which has some of the same variables."""
    step = _integer(environ, "SLURM_STEP_ID")
    return step is not None and step < _FIRST_SPECIAL_STEP and _text(environ, "SLURM_PROCID") is not None


def _from_srun(environ: Mapping[str, str]) -> ProcessEnvironment:
    # The step's own numbers first: a step may be smaller than its job, whose options stay in the environment.
    world_name = "SLURM_STEP_NUM_TASKS" if _text(environ, "SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    world_size = _required_integer(environ, world_name, minimum=1)
    local_world_size = _srun_local_world_size(environ, world_size)
    port = _master_port(environ)
    if port is None:
        port = _port_of(f"{_text(environ, 'SLURM_JOB_ID')}.{_text(environ, 'SLURM_STEP_ID')}")
    return ProcessEnvironment(
        _required_integer(environ, "SLURM_PROCID"),
        world_size,
        _required_integer(environ, "SLURM_LOCALID"),
        local_world_size,
        _text(environ, "MASTER_ADDR") or _srun_master_addr(environ, is_one_node=local_world_size == world_size),
        port,
        "srun",
    )


def _srun_local_world_size(environ: Mapping[str, str], world_size: int) -> int:
    """Give the tasks of this step on this node, from '2(x3),1' and the node's number, or from --ntasks-per-node."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        text = _text(environ, name)
        if text is None:
            continue
        counts = _expand_tasks_per_node(name, text)
        node = _integer(environ, "SLURM_NODEID") or 0
        if node >= len(counts):
            raise UserError(f"SLURM_NODEID is {node}, but {name} is {text!r}, which has {len(counts)} nodes")
        return counts[node]
    return _integer(environ, "SLURM_NTASKS_PER_NODE", minimum=1) or (
        1 if world_size == 1 else _required_integer(environ, "SLURM_TASKS_PER_NODE")
    )


def _expand_tasks_per_node(name: str, text: str) -> list[int]:
    """'2(x3),1' -> [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)(?:\(x([1-9]\d*)\))?", part)
        if match is None:
            raise UserError(f"{name} is {text!r}; it must be numbers of tasks like '2(x3),1'")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _srun_master_addr(environ: Mapping[str, str], *, is_one_node: bool) -> str:
    """Give the step's first node by name; the loopback address where there is one node whose name means nothing."""
    nodes = _text(environ, "SLURM_STEP_NODELIST") or _text(environ, "SLURM_JOB_NODELIST") or ""
    first = first_node(nodes) if nodes else None
    if first is not None:
        try:
            socket.getaddrinfo(first, None)
            return first
        except OSError:
            pass
    if is_one_node:
        return _LOOPBACK
    raise UserError(
        f"the first node of SLURM_STEP_NODELIST {nodes!r} has no address here; "
        "export MASTER_ADDR with an address that all nodes reach"
    )


def first_node(nodes: str) -> str:
    """First name of Slurm's compact list of nodes: 'gpu[003-007,9],login' -> 'gpu003'."""
    match = re.fullmatch(r"((?:[^,\[\]]|\[[^\[\]]+\])+)(?:,.*)?", nodes)
    if match is None:
        raise UserError(f"the list of nodes is {nodes!r}; it must be like 'node[01-04,7],other'")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", match[1])


def _launcher_cpus(env: ProcessEnvironment, environ: Mapping[str, str], own_cpus: int) -> int:
    """Logical CPUs this rank's launcher may use on this node."""
    if env.launcher == "srun":
        return _integer(environ, "SLURM_CPUS_ON_NODE", minimum=1) or own_cpus
    try:
        return max(len(os.sched_getaffinity(os.getppid())), own_cpus)
    except OSError:  # the parent is gone or out of sight
        return own_cpus


def _count_cores(cpus: set[int]) -> int:
    """Physical cores behind logical CPUs, each CPU one where the kernel does not say."""
    cores = set()
    for cpu in cpus:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def _port_of(job: str) -> int:
    """Give a port that all ranks of a job derive alike, below those the kernel hands out (from 32768)."""
    return 10000 + zlib.crc32(job.encode()) % 20000


def _master_port(environ: Mapping[str, str]) -> int | None:
    port = _integer(environ, "MASTER_PORT", minimum=1)
    if port is not None and port > 65535:
        raise UserError(f"MASTER_PORT is {port}; it must be at most 65535")
    return port


def _text(environ: Mapping[str, str], name: str) -> str | None:
    """Give a variable's value; None where it is not set or empty."""
    return environ.get(name) or None


def _integer(environ: Mapping[str, str], name: str, minimum: int = 0) -> int | None:
    text = _text(environ, name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]+", text) or int(text) < minimum:
        raise UserError(f"the environment variable {name} is {text!r}; it must be a whole number of at least {minimum}")
    return int(text)


def _required_integer(environ: Mapping[str, str], name: str, minimum: int = 0) -> int:
    value = _integer(environ, name, minimum)
    if value is None:
        raise _not_set(name, "it, as torchrun, deepspeed, srun and mpirun do")
    return value


def _not_set(name: str, what: str) -> UserError:
    return UserError(f"the environment variable {name} is not set, but others say that this is a rank; export {what}")
