import json
import os
import re
import shutil
import subprocess
import time
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from runs import PROJECT
from slurm_cluster import SlurmCluster, missing_requirement, slurm_cluster
from slurm_jobs import Submitter, python_cluster, without

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
        if "--say" in sys.argv:
            print(sys.argv[-1], flush=True)
        sys.exit("--signal" in sys.argv and os.kill(os.getpid(), 9) or 2)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with python_cluster(num_nodes=2, gpus_per_node=2) as running:
        yield running


@pytest.fixture
def submitter(cluster: SlurmCluster, tmp_path: Path) -> Submitter:
    checkout = tmp_path / "a checkout"
    shutil.copytree(PROJECT / "slurm", checkout / "slurm")
    for name in ("peer_scale/errors.py", "peer_scale/parallel/environment.py"):
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
    own = tmp_path / "own environment"
    venv.create(own)
    lacking = submitter.submit([], [], PEER_VENV=str(own))
    assert lacking.exit_code == "2:0"
    assert re.fullmatch("error: .*/own environment/bin/python has no torch; .* PEER_VENV.*\\n", lacking.output)
    (site_packages,) = own.glob("lib/python*/site-packages")
    (site_packages / "torch.py").touch()
    variables = {"MASTER_ADDR": "some-host", "MASTER_PORT": "4321", "PEER_VENV": str(own)}
    job = submitter.submit(["-N", "2"], [], **variables)
    assert job.exit_code == "0:0", job.output
    for rank in job.ranks:
        assert (rank["master_addr"], rank["master_port"]) == ("some-host", 4321)
        assert rank["prefix"] == str(own)
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
    variables = {"PEER_HOME": str(submitter.checkout), "PEER_SRUN_OPTIONS": "--chdir=/ --quiet"}
    named = submitter.submit([], ["a", "b"], script=copy, **variables)
    assert (named.ranks[0]["arguments"][-2:], named.ranks[0]["folder"]) == (["a", "b"], "/")
    assert submitter.submit([], [], PEER_HOME="/nowhere").output == (
        "error: PEER_HOME is '/nowhere'; it has no peer_scale/pretrain.py\n"
    )
    assert "PEER_VENV is '/nowhere'" in submitter.submit([], [], PEER_VENV="/nowhere").output


def test_the_other_ranks_say_what_they_say_in_files_of_their_own(submitter: Submitter) -> None:
    number = submitter.start(["-N", "2"], ["--fail-rank", "1", "--say", "all is lost"])
    job = submitter.end(number)
    assert job.output.startswith('RANK {"rank": 0')
    (log,) = submitter.output_of(number).with_suffix(".ranks").iterdir()
    assert log.name == "rank_1.n1.log"
    assert f"note: rank 1 failed first; the end of {log}:\n" in job.output
    assert job.output.endswith("all is lost\n"), job.output


def test_the_tasks_of_an_array_are_seeds_with_folders_of_their_own(submitter: Submitter) -> None:
    flags = ["--save", "runs/a", "--log-dir=runs/a/logs"]
    array = submitter.start(["--array", "2-3", "--output", "peer-%A_%a.out"], flags)
    for seed in ("2", "3"):
        job = submitter.end(f"{array}_{seed}")
        own = ["--seed", seed, "--save", f"runs/a/seed_{seed}", "--log-dir", f"runs/a/logs/seed_{seed}"]
        assert job.ranks[0]["arguments"][2:] == [*flags, *own]
    refused = submitter.start(["--array", "1", "--output", "peer-%A_%a.out"], ["--seed", "5"])
    assert submitter.end(f"{refused}_1").output.startswith(
        "error: --seed 5: the tasks of a job array take their numbers"
    )


def test_scripts_say_what_is_missing(submitter: Submitter) -> None:
    needs = {"small": ["--save", "runs/a"], "finetune": ["--model", "runs/a", "--output-dir", "glue"]}
    jobs = {name: submitter.start(["--cpus-per-gpu", "1"], flags, f"{name}.sh") for name, flags in needs.items()}
    told = {name: submitter.end(number) for name, number in jobs.items()}
    assert {job.exit_code for job in told.values()} == {"2:0"}
    assert told["small"].output.startswith("error: give --data-path after the script's name")
    assert told["finetune"].output.startswith("error: give --task NAME, or --train-file FILE")


def test_large_keeps_the_layout_that_a_run_has_begun_with(submitter: Submitter, tmp_path: Path) -> None:
    nodes = ["--nodes", "2", "--gpus-per-node", "2", "--cpus-per-gpu", "1"]
    flags = ["--data-path", "text", "--save", str(tmp_path / "save")]
    (tmp_path / "save").mkdir()
    (tmp_path / "save" / "layout_2x2").write_text("--deepspeed_config zero1 --micro-batch-size 8\n")
    kept = submitter.submit(nodes, flags, "large.sh")
    assert len(kept.ranks) == 4
    own = ["--model", "peer-large", "--save-interval", "1000", *flags]
    assert kept.ranks[3]["arguments"][2:] == ["--deepspeed_config", "zero1", "--micro-batch-size", "8", *own]
    told = submitter.submit(nodes, [*flags, "--micro-batch-size", "4"], "large.sh")
    assert told.ranks[0]["arguments"][2:] == [*own, "--micro-batch-size", "4"]


def test_a_run_is_summed_up_at_its_end(submitter: Submitter, tmp_path: Path) -> None:
    parts = {
        "start": 90.0,
        "load": 10.0,
        "train": 3000.0,
        "validation": 0.0,
        "save": 190.0,
        "lost": 210.0,
        "down": 100.0,
    }
    figures = {"steps": 1000, "tokens": 4096000, "train_flops": 3.4e15, "wall_s": 3600.0, "parts_s": parts}
    speed = {"goodput": 3000 / 3600, "restarts": 2, "tokens_per_second": 1365.3, "tflops_per_device": 1.1, "mfu": None}
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "summary.json").write_text(json.dumps(figures | speed))
    (tmp_path / "run.yaml").write_text(f"output: {{log_dir: '{tmp_path}/logs'}}\n")
    job = submitter.submit([], ["--config", str(tmp_path / "run.yaml")])
    assert job.output.splitlines()[-4:] == [
        "run         1,000 steps, 4,096,000 tokens, 3.4e+15 FLOPs in 1.00 h",
        "starts      2 restarts",
        "throughput  1,365 tokens/s, 1.1 TFLOP/s per device",
        "goodput     83.3% of the time; lost 5.8%, save 5.3%, down 2.8%, start 2.5%, load 0.3%",
    ]


def test_deepspeeds_own_launcher_starts_ranks_by_srun(submitter: Submitter) -> None:
    (submitter.folder / "hostfile").write_text("n0 slots=1\nn1 slots=1\n")
    trainer = submitter.checkout / "peer_scale" / "pretrain.py"
    launcher = "deepspeed --hostfile hostfile --no_ssh_check --launcher slurm --master_addr 127.0.0.1"
    command = f"MASTER_ADDR=127.0.0.1 {launcher} '{trainer}' --all-reduce"
    options = ["--nodes=2", "--ntasks-per-node=1", "--output=peer-%j.out", f"--wrap={command}"]
    slurm = submitter.cluster
    number = slurm.run("sbatch", "--parsable", *options, cwd=submitter.folder).stdout.strip()
    job = submitter.end(number)
    assert [(rank["rank"], rank["node"], rank["launcher"]) for rank in job.ranks] == [
        (0, "n0", "srun"),
        (1, "n1", "srun"),
    ]
    assert {rank["sum"] for rank in job.ranks} == {3}


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
        job = submitter.end(number)
        assert job.exit_code == "0:0", job.output
        assert len(job.ranks) == 2
        assert job.ranks[0]["arguments"][-2:] == ["--lr", "1e-4"]
