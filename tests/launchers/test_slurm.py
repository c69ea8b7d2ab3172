import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from runs import PROJECT
from slurm_cluster import SlurmCluster, missing_requirement, slurm_cluster

REASON = missing_requirement()

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(REASON is not None, reason=REASON or "")]

# Stands in for the trainer: says where it runs, then does what the flags ask for.
TRAINER = """
import dataclasses, json, os, sys, time
from pathlib import Path
sys.path[0] = str(Path(__file__).resolve().parents[1])
from peer_scale.parallel.environment import detect_environment
found = detect_environment(os.environ)
answer = dataclasses.asdict(found) | {
    "arguments": sys.argv[1:], "node": os.environ["SLURMD_NODENAME"], "prefix": sys.prefix, "folder": os.getcwd()}
if "--all-reduce" in sys.argv:
    import torch
    store = torch.distributed.TCPStore(found.master_addr, found.master_port, found.world_size, found.rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=found.rank, world_size=found.world_size)
    total = torch.tensor(found.rank + 1)
    torch.distributed.all_reduce(total)
    answer["sum"] = total.item()
    torch.distributed.destroy_process_group()
print("RANK " + json.dumps(answer), flush=True)
if "--fail-rank" in sys.argv:
    if str(found.rank) == sys.argv[sys.argv.index("--fail-rank") + 1]:
        time.sleep(1)  # the others have started
        sys.exit("--signal" in sys.argv and os.kill(os.getpid(), 9) or 2)
    time.sleep(60)
"""


@dataclass(frozen=True)
class Job:
    """A finished job: Slurm's exit code ("code:signal"), its output and what its ranks said, by rank."""

    exit_code: str
    output: str
    ranks: list[dict]


@dataclass(frozen=True)
class Submitter:
    """Submits a checkout's `slurm/base.sh` to a cluster."""

    cluster: SlurmCluster
    checkout: Path
    folder: Path  # where sbatch is called

    def submit(self, options: list[str], flags: list[str], script: Path | None = None, **variables: str) -> Job:
        command = ["sbatch", "--parsable", *options, str(script or self.checkout / "slurm" / "base.sh"), *flags]
        submitted = self.cluster.run(*command, cwd=self.folder, env=self.cluster.environ | variables)
        assert submitted.returncode == 0, submitted.stderr
        number = submitted.stdout.strip()
        exit_code = self.wait(number)
        return self.job(self.folder / f"peer-{number}.out", exit_code)

    def wait(self, number: str) -> str:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            text = self.cluster.run("scontrol", "show", "job", number).stdout
            if re.search(r"JobState=(COMPLETED|FAILED|CANCELLED|NODE_FAIL)", text):
                return re.search(r" ExitCode=(\S+)", text)[1]
            time.sleep(0.1)
        raise TimeoutError(f"job {number} goes on\n{self.cluster.logs()}")

    @staticmethod
    def job(output_file: Path, exit_code: str) -> Job:
        output = output_file.read_text()
        ranks = [json.loads(line[len("RANK ") :]) for line in output.splitlines() if line.startswith("RANK ")]
        return Job(exit_code, output, sorted(ranks, key=lambda answer: answer["rank"]))


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster(num_nodes=2, gpus_per_node=2) as running:
        path = os.pathsep.join([str(Path(sys.executable).parent), running.environ["PATH"]])
        variables = without(running.environ, "PEER_HOME", "PEER_VENV", "MASTER_ADDR", "MASTER_PORT")
        yield SlurmCluster(running.folder, running.nodes, variables | {"PATH": path})


def without(environ: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


@pytest.fixture
def submitter(cluster: SlurmCluster, tmp_path: Path) -> Submitter:
    checkout = tmp_path / "a checkout"
    for name in ("slurm/base.sh", "peer_scale/errors.py", "peer_scale/parallel/environment.py"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, checkout / name)
    for folder in ("peer_scale", "peer_scale/parallel"):
        (checkout / folder / "__init__.py").touch()
    (checkout / "peer_scale" / "pretrain.py").write_text(TRAINER)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return Submitter(cluster, checkout, folder)


def test_two_nodes_meet_and_trainer_flags_follow_the_templates(submitter: Submitter) -> None:
    flags = ["--all-reduce", "--data-path", "two words", "--deepspeed_config", "own.json"]
    job = submitter.submit(["-N", "2", "--ntasks-per-node", "1"], flags)
    assert job.exit_code == "0:0", job.output
    assert [(rank["rank"], rank["node"]) for rank in job.ranks] == [(0, "n0"), (1, "n1")]
    for rank in job.ranks:
        assert (rank["world_size"], rank["local_rank"], rank["local_world_size"]) == (2, 0, 1)
        assert (rank["launcher"], rank["sum"]) == ("srun", 3)
        assert rank["master_addr"] == "127.0.0.1"  # the nodes' NodeAddr: their names do not resolve
        assert rank["arguments"] == ["--deepspeed_config", f"{submitter.checkout}/ds_configs/zero2.json", *flags]
        assert rank["folder"] == str(submitter.folder)  # relative paths mean what they mean to sbatch
    assert job.ranks[0]["master_port"] == job.ranks[1]["master_port"]


def test_master_variables_win_and_the_virtual_environment_is_used(submitter: Submitter, tmp_path: Path) -> None:
    venv.create(tmp_path / "own environment")
    variables = {"MASTER_ADDR": "some-host", "MASTER_PORT": "4321", "PEER_VENV": str(tmp_path / "own environment")}
    job = submitter.submit(["-N", "2"], [], **variables)
    assert job.exit_code == "0:0", job.output
    for rank in job.ranks:
        assert (rank["master_addr"], rank["master_port"]) == ("some-host", 4321)
        assert rank["prefix"] == str(tmp_path / "own environment")
    assert len(job.ranks) == 2  # one task a node where there is no GPU


def test_one_task_a_gpu_unless_sbatch_says_otherwise(submitter: Submitter) -> None:
    by_default = submitter.submit(["-N", "2", "--gpus-per-node", "2", "--cpus-per-gpu", "1"], [])
    assert [(rank["local_rank"], rank["node"]) for rank in by_default.ranks] == [
        (0, "n0"),
        (1, "n0"),
        (0, "n1"),
        (1, "n1"),
    ]
    assert "share" not in by_default.output
    few_cpus = submitter.submit(["-N", "1", "--gpus-per-node", "2"], [])
    assert [rank["world_size"] for rank in few_cpus.ranks] == [2, 2]
    assert "2 ranks share 1 CPU" in few_cpus.output
    told = submitter.submit(["-N", "2", "--gpus-per-node", "2", "--ntasks-per-node", "1"], [])
    assert [rank["world_size"] for rank in told.ranks] == [2, 2]
    uneven = submitter.submit(["-N", "2", "--ntasks", "3"], [])
    assert [(rank["node"], rank["local_world_size"]) for rank in uneven.ranks] == [("n0", 2), ("n0", 2), ("n1", 1)]


@pytest.mark.parametrize("failing_rank", ["0", "1"])
def test_one_failing_rank_ends_the_job_with_its_exit_code(submitter: Submitter, failing_rank: str) -> None:
    start = time.monotonic()
    job = submitter.submit(["-N", "2"], ["--fail-rank", failing_rank])
    assert len(job.ranks) == 2
    assert job.exit_code == "2:0", job.output
    assert time.monotonic() - start < 30  # the other rank would have slept for 60 s


def test_a_killed_rank_ends_the_job_with_its_signal(submitter: Submitter) -> None:
    job = submitter.submit(["-N", "2"], ["--fail-rank", "1", "--signal"])
    assert job.exit_code in ("137:0", "143:0"), job.output


def test_sbatch_wait_returns_the_trainers_exit_code(submitter: Submitter) -> None:
    command = ["sbatch", "--wait", "-N", "2", str(submitter.checkout / "slurm" / "base.sh"), "--fail-rank", "0"]
    assert submitter.cluster.run(*command, cwd=submitter.folder).returncode == 2


def test_the_checkout_is_named_where_the_script_lies_elsewhere(submitter: Submitter, tmp_path: Path) -> None:
    copy = tmp_path / "copied" / "base.sh"
    copy.parent.mkdir()
    shutil.copy(submitter.checkout / "slurm" / "base.sh", copy)
    lost = submitter.submit([], [], script=copy)
    assert lost.exit_code == "2:0"
    assert lost.output.startswith("error: found no checkout")
    assert "PEER_HOME" in lost.output
    named = submitter.submit([], ["a", "b"], script=copy, PEER_HOME=str(submitter.checkout))
    assert named.ranks[0]["arguments"][-2:] == ["a", "b"]
    assert submitter.submit([], [], PEER_HOME="/nowhere").output == (
        "error: PEER_HOME is '/nowhere'; it has no peer_scale/pretrain.py\n"
    )
    assert "PEER_VENV is '/nowhere'" in submitter.submit([], [], PEER_VENV="/nowhere").output


def small_training(text_file: Path, tmp_path: Path, steps: int) -> list[str]:
    sizes = "--num-layers 2 --generator-num-layers 1 --hidden-size 64 --ffn-hidden-size 128"
    data = f"--vocab-size 400 --seq-length 32 --train-iters {steps} --micro-batch-size 4 --fp32"
    where = ["--data-path", str(text_file), "--cache-dir", str(tmp_path / "cache")]
    return ["--model", "peer-tiny", *sizes.split(), *data.split(), *where]


def train_here(flags: list[str], log_dir: Path) -> list[float]:
    """Train with torchrun on this machine; gives the losses."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(PROJECT / "peer_scale" / "pretrain.py"), *flags, "--log-dir", str(log_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return losses_of(log_dir)


def test_the_trainer_learns_the_same_on_two_nodes_as_on_one_machine(
    submitter: Submitter, text_file: Path, tmp_path: Path
) -> None:
    flags = small_training(text_file, tmp_path, 20)
    here = train_here(flags, tmp_path / "here")
    real = Submitter(submitter.cluster, PROJECT, submitter.folder)
    job = real.submit(["-N", "2", "--ntasks-per-node", "1"], [*flags, "--log-dir", str(tmp_path / "there")])
    assert job.exit_code == "0:0", job.output
    assert len(here) == 20
    assert losses_of(tmp_path / "there") == pytest.approx(here, rel=1e-6)
    refused = real.submit(["-N", "2"], ["--model", "peer-tinny"])
    assert refused.exit_code == "2:0"
    assert re.search("^error: .*peer-tinny.*peer-tiny", refused.output, re.MULTILINE), refused.output


def test_a_warned_job_saves_requeues_itself_and_ends_as_if_nothing_had_been(
    submitter: Submitter, text_file: Path, tmp_path: Path
) -> None:
    flags = [*small_training(text_file, tmp_path, 200), "--num-workers", "1"]
    real, there = Submitter(submitter.cluster, PROJECT, submitter.folder), tmp_path / "there"
    flags_there = [*flags, "--log-dir", str(there), "--save", str(tmp_path / "save")]
    script = str(PROJECT / "slurm" / "base.sh")
    command = ["sbatch", "--parsable", "-N", "2", "--ntasks-per-node", "1", script, *flags_there]
    number = real.cluster.run(*command, cwd=real.folder).stdout.strip()
    deadline = time.monotonic() + 90
    while not (there / "metrics.jsonl").exists() or len(losses_of(there)) < 20:
        assert time.monotonic() < deadline, real.cluster.logs()
        time.sleep(0.05)
    real.cluster.run("scancel", "--signal=USR1", "--batch", number)  # what --signal=B:USR1@300 sends
    job = real.job(real.folder / f"peer-{number}.out", real.wait(number))
    assert job.exit_code == "0:0", job.output
    assert job.output.count("requeued, restart 1") == 1, job.output
    steps = [json.loads(line)["step"] for line in (there / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 201))
    assert losses_of(there) == train_here(flags, tmp_path / "here")


def losses_of(log_dir: Path) -> list[float]:
    lines = (log_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]  # the last one may be half written


def test_outside_a_job_it_says_how_to_run_it() -> None:
    environ = without(os.environ, "SLURM_JOB_ID")
    done = subprocess.run(
        ["bash", str(PROJECT / "slurm" / "base.sh")], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: this script runs inside a Slurm job: sbatch")


def test_two_clusters_side_by_side_leave_nothing_behind(cluster: SlurmCluster) -> None:
    with slurm_cluster(num_nodes=1) as other:
        done = other.run("sbatch", "--wrap", "sleep 300", "--output", "/dev/null")
        assert done.returncode == 0, done.stderr
        other.run("srun", "true")
        assert processes_of(other)
    assert not other.folder.exists()
    assert not processes_of(other)
    assert cluster.run("srun", "hostname").returncode == 0


def processes_of(cluster: SlurmCluster) -> list[str]:
    """Processes whose environment or command line names the cluster's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(cluster.folder).encode() in text:
                found.append(entry.name)
    return found


def test_the_examples_jobs_run_one_after_the_other(submitter: Submitter) -> None:
    (submitter.checkout / "examples").mkdir()
    script = shutil.copy(PROJECT / "examples" / "slurm_job.sh", submitter.checkout / "examples")
    slurm, options = submitter.cluster, {"cwd": submitter.folder}
    before = slurm.run(
        "sbatch", "--parsable", "--job-name", "runs/base", "--output", "/dev/null", "--wrap", "sleep 60", **options
    )
    sizes = {"NODES": "2", "GPUS": "1", "CPUS": "1", "JOBS": "2", "TIME": "5"}
    done = slurm.run("bash", script, "runs/base", "--lr", "1e-4", env=slurm.environ | sizes, **options)
    assert done.returncode == 0, done.stderr
    numbers = re.findall(r"Submitted batch job (\d+)", done.stdout)
    assert len(numbers) == 2
    for number in numbers:  # they wait, though there is room beside the one of their name that runs
        assert "Reason=Dependency" in slurm.run("scontrol", "show", "job", number).stdout
    slurm.run("scancel", before.stdout.strip())
    for number in numbers:
        job = submitter.job(submitter.folder / f"runs/base/{number}.out", submitter.wait(number))
        assert job.exit_code == "0:0", job.output
        assert len(job.ranks) == 2
        assert job.ranks[0]["arguments"][-2:] == ["--lr", "1e-4"]
