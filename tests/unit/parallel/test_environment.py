import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from peer_scale.errors import UserError
from peer_scale.parallel.environment import (
    ProcessEnvironment,
    default_num_threads,
    detect_environment,
    fair_share,
    first_node,
)

ADDRESS = {"MASTER_ADDR": "first", "MASTER_PORT": "1234"}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
    **ADDRESS,
}
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    **ADDRESS,
}
# What a task of `srun` sees in the third node of a step with seven tasks, as printed by Slurm 22.05.
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_JOB_NODELIST": "localhost,n[1-3]",
    "SLURM_STEP_NODELIST": "localhost,n[1-3]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "1219887105",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_FD": "9"}
# The shell of a batch script: Slurm sets the rank of a task there too, but no step.
BATCH_SHELL = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TORCHRUN, ProcessEnvironment(3, 4, 1, 2, "first", 1234, "torchrun")),
        (DEEPSPEED, ProcessEnvironment(3, 4, 1, 2, "first", 1234, "deepspeed")),
        (SRUN | TORCHRUN, ProcessEnvironment(3, 4, 1, 2, "first", 1234, "torchrun")),
        (SRUN | OPEN_MPI | TORCHRUN, ProcessEnvironment(3, 4, 1, 2, "first", 1234, "torchrun")),
        (SRUN | ADDRESS, ProcessEnvironment(5, 7, 1, 2, "first", 1234, "srun")),
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "7"} | ADDRESS, ProcessEnvironment(5, 7, 1, 2, "first", 1234, "srun")),
        (OPEN_MPI | ADDRESS, ProcessEnvironment(1, 2, 1, 2, "first", 1234, "mpirun")),
        (HYDRA, ProcessEnvironment(1, 2, 1, 2, "127.0.0.1", 29500, "mpirun")),
        (SRUN | OPEN_MPI | {"MASTER_PORT": "5"}, ProcessEnvironment(1, 2, 1, 2, "127.0.0.1", 5, "mpirun")),
        (SRUN | HYDRA | ADDRESS, ProcessEnvironment(1, 2, 1, 2, "first", 1234, "mpirun")),
        (BATCH_SHELL | ADDRESS, ProcessEnvironment(0, 1, 0, 1, "first", 1234, "none")),
        (SRUN | {"SLURM_STEP_ID": "4294967290"} | ADDRESS, ProcessEnvironment(0, 1, 0, 1, "first", 1234, "none")),
        ({"RANK": "", "MASTER_PORT": "7"}, ProcessEnvironment(0, 1, 0, 1, "127.0.0.1", 7, "none")),
    ],
)
def test_launchers(environ: Mapping[str, str], expected: ProcessEnvironment) -> None:
    assert detect_environment(environ) == expected


def without(environ: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_local_rank_flag_serves_where_the_variable_is_absent() -> None:
    environ = without(TORCHRUN, "LOCAL_RANK")
    assert detect_environment(environ, local_rank_flag=1).local_rank == 1
    assert detect_environment(TORCHRUN, local_rank_flag=0).local_rank == 1
    with pytest.raises(UserError, match="LOCAL_RANK"):
        detect_environment(environ, local_rank_flag=-1)


def test_one_rank_by_variables_needs_nothing_else() -> None:
    found = detect_environment({"RANK": "0", "WORLD_SIZE": "1"})
    assert (found.local_rank, found.local_world_size, found.master_addr) == (0, 1, "127.0.0.1")


def test_nobody_started_it_gives_one_process_on_any_port() -> None:
    found = detect_environment({})
    assert (found.master_addr, found.master_port) == ("127.0.0.1", 0)
    assert (found.rank, found.world_size, found.launcher) == (0, 1, "none")


@pytest.mark.parametrize(("node", "local_world_size"), [(0, 2), (1, 2), (2, 2), (3, 1)])
def test_srun_tasks_of_this_node(node: int, local_world_size: int) -> None:
    environ = SRUN | {"SLURM_NODEID": str(node), "SLURM_LOCALID": "0"}
    assert detect_environment(environ).local_world_size == local_world_size
    older = without(environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS")
    assert detect_environment(older).local_world_size == local_world_size


def test_srun_tasks_from_the_option_where_slurm_gives_no_list() -> None:
    environ = without(SRUN, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") | {"SLURM_NTASKS_PER_NODE": "4"}
    assert detect_environment(environ).local_world_size == 4


def test_a_step_smaller_than_its_job_counts_its_own_tasks() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "1"}
    environ = SRUN | step | {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "2"}
    found = detect_environment(environ)
    assert (found.rank, found.world_size, found.local_world_size) == (1, 2, 1)


def test_srun_meets_at_the_first_node_and_a_port_of_the_step() -> None:
    first = detect_environment(SRUN)
    other_rank = detect_environment(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    assert (first.master_addr, first.master_port) == (other_rank.master_addr, other_rank.master_port)
    assert first.master_addr == "localhost"
    ports = {detect_environment(SRUN | {"SLURM_JOB_ID": str(job)}).master_port for job in range(50)}
    ports |= {detect_environment(SRUN | {"SLURM_STEP_ID": str(step)}).master_port for step in range(50)}
    assert len(ports) > 90  # jobs and steps side by side rarely meet on one port
    assert min(ports) >= 10000
    assert max(ports) < 32768


def test_srun_node_without_an_address() -> None:
    unknown = {"SLURM_STEP_NODELIST": "no-such-node.invalid,b"}
    with pytest.raises(UserError, match=r"no-such-node\.invalid.*export MASTER_ADDR"):
        detect_environment(SRUN | unknown)
    one_node = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_PROCID": "1"}
    assert detect_environment(SRUN | unknown | one_node).master_addr == "127.0.0.1"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n0", "n0"),
        ("n[0-1]", "n0"),
        ("gpu[003-007,9],login", "gpu003"),
        ("a-1,b-[2-3]", "a-1"),
        ("rack[1-2]node[05,07]", "rack1node05"),
        ("n[4]-ib,n5", "n4-ib"),
    ],
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (TORCHRUN | {"RANK": "x"}, "RANK is 'x'"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is '-1'"),
        (TORCHRUN | {"RANK": "4"}, "rank 4 of 4"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'.*at least 1"),
        (without(TORCHRUN, "WORLD_SIZE"), "WORLD_SIZE is not set"),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE"), "LOCAL_WORLD_SIZE is not set"),
        (without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR is not set"),
        (without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT is not set"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "local rank 2 of 2"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, "8 ranks on this node.*only 4"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        (SRUN | {"SLURM_STEP_ID": "?"}, r"SLURM_STEP_ID is '\?'"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(3)"}, r"SLURM_STEP_TASKS_PER_NODE is '2\(3\)'"),
        (SRUN | {"SLURM_NODEID": "4"}, "SLURM_NODEID is 4.*4 nodes"),
        (SRUN | {"SLURM_STEP_NODELIST": "n[0-1"}, r"list of nodes is 'n\[0-1'"),
        (without(SRUN, "SLURM_LOCALID"), "SLURM_LOCALID is not set"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is not set"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}, "several nodes.*MASTER_ADDR.*mpirun -x"),
    ],
)
def test_bad_variables_are_named(environ: Mapping[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        detect_environment(environ)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("cpus", "cores", "launcher_cpus", "ranks", "threads"),
    [
        (8, 8, 8, 1, 8),  # alone
        (8, 8, 8, 4, 2),  # four ranks share eight CPUs
        (2, 2, 8, 4, 2),  # bound to two of eight CPUs each
        (16, 16, 32, 4, 8),  # bound to a socket, two ranks a socket
        (64, 64, 4, 2, 2),  # Slurm gave four of the CPUs, but confines nobody
        (16, 8, 16, 2, 4),  # two hardware threads a core
        (1, 1, 2, 8, 1),  # more ranks than CPUs
        (2, 2, 2, 3, 1),
    ],
)
def test_fair_share(cpus: int, cores: int, launcher_cpus: int, ranks: int, threads: int) -> None:
    found = fair_share(num_cpus=cpus, num_cores=cores, launcher_cpus=launcher_cpus, local_world_size=ranks)
    assert found == threads


TWO_BY_TORCHRUN = ProcessEnvironment(0, 2, 0, 2, "127.0.0.1", 1, "torchrun")
ONE_BY_TORCHRUN = ProcessEnvironment(0, 1, 0, 1, "127.0.0.1", 1, "torchrun")
TWO_BY_DEEPSPEED = ProcessEnvironment(0, 2, 0, 2, "127.0.0.1", 1, "deepspeed")
TWO_BY_SRUN = ProcessEnvironment(0, 2, 0, 2, "127.0.0.1", 1, "srun")


@pytest.mark.parametrize(
    ("env", "environ", "threads"),
    [
        (TWO_BY_TORCHRUN, {"OMP_NUM_THREADS": "3"}, None),
        (ONE_BY_TORCHRUN, {"OMP_NUM_THREADS": "1"}, None),  # torchrun leaves it alone for one rank: a user's wish
        (TWO_BY_DEEPSPEED, {"OMP_NUM_THREADS": "1"}, None),  # --bind_cores_to_rank sets it to the rank's cores
        (TWO_BY_SRUN, {"SLURM_CPUS_PER_TASK": "5"}, 5),
        (TWO_BY_SRUN, {"SLURM_CPUS_PER_TASK": "5", "OMP_NUM_THREADS": "3"}, None),
        (TWO_BY_SRUN, {"SLURM_CPUS_ON_NODE": "2"}, 1),
    ],
)
def test_threads_of_a_rank(env: ProcessEnvironment, environ: Mapping[str, str], threads: int | None) -> None:
    assert default_num_threads(env, environ) == threads


@pytest.mark.skipif(
    not Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list").exists(), reason="no CPU topology"
)
def test_threads_share_this_machines_cores() -> None:
    mask = os.sched_getaffinity(0)
    siblings = {Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/core_id").read_text() for cpu in mask}
    alone = default_num_threads(ProcessEnvironment(0, 1, 0, 1, "127.0.0.1", 1, "none"), {})
    assert alone is not None
    assert len(siblings) <= alone <= len(mask)
    assert default_num_threads(TWO_BY_TORCHRUN, {"OMP_NUM_THREADS": "1"}) == max(1, alone // 2)
    assert default_num_threads(TWO_BY_DEEPSPEED, {"SLURM_CPUS_PER_TASK": "9"}) == max(1, alone // 2)


def test_malformed_cpus_per_task() -> None:
    with pytest.raises(UserError, match="SLURM_CPUS_PER_TASK is 'all'"):
        default_num_threads(TWO_BY_SRUN, {"SLURM_CPUS_PER_TASK": "all"})
