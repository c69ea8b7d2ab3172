"""Jobs of `slurm/base.sh` on a real cluster go on after whatever a cluster does to them, as if it had not been.

All begin with imported weights (`--init-from` of what `from-hf` wrote), which may be read once only. They run at the
same time, each is held after its seventh step at the earliest until the fault has come, and their metrics must be those
of a run that nothing has happened to, bit for bit.
"""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from peer_scale.commands import convert
from rank_pool import RankPools
from runs import PROJECT, TIMES, corpus, read_metrics, train_in_pool
from slurm_cluster import Partition, SlurmCluster, missing_requirement
from slurm_jobs import Job, Submitter, python_cluster
from tiny_encoders import write_encoder, write_task

T = TypeVar("T")
REASON = missing_requirement()

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(REASON is not None, reason=REASON or "")]

STEPS, FIRST_HELD = 60, 7
SIZES = [
    *("--num-layers", "2", "--generator-num-layers", "1", "--hidden-size", "64"),
    *("--ffn-hidden-size", "128", "--vocab-size", "400"),
]
NUM_TERMS = int(os.environ.get("PEER_TEST_SLURM_TERMS", "1"))
PARTITIONS = (
    Partition("two", 0, 2),
    Partition("fragile", 2, 5),  # one more than a job has
    Partition("low", 5, 7, "PriorityTier=1 PreemptMode=REQUEUE"),
    Partition("high", 5, 7, "PriorityTier=9 PreemptMode=OFF"),
)


@dataclass
class Running:
    """A job on two nodes, and what can be done to it."""

    submitter: Submitter
    number: str
    folder: Path  # with its checkpoints and logs

    def steps(self) -> int:
        file = self.folder / "logs" / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def hold(self, first_step: int = FIRST_HELD) -> list[int]:
        """Stop both ranks as soon as so many steps are done and a checkpoint is there; gives their process ids."""
        self.wait_until(lambda: self.steps() >= first_step and (self.folder / "save" / "latest").exists())
        ranks = self.ranks()
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        assert self.steps() < STEPS, "held too late"
        return ranks

    def ranks(self) -> list[int]:
        """Process ids, by rank; data workers have the same environment and are left out."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                _, script, *_ = [*(entry / "cmdline").read_bytes().split(b"\0"), b""]
                variables = dict(one.partition(b"=")[::2] for one in (entry / "environ").read_bytes().split(b"\0"))
                parent = int(re.search(r"PPid:\s(\d+)", (entry / "status").read_text())[1])
            except OSError:
                continue
            mine = variables.get(b"SLURM_CONF", b"").decode() == self.submitter.cluster.environ["SLURM_CONF"]
            if mine and variables.get(b"SLURM_JOB_ID") == self.number.encode() and script.endswith(b"/pretrain.py"):
                found[int(entry.name)] = (parent, int(variables[b"SLURM_PROCID"]))
        ranks = {rank: process for process, (parent, rank) in found.items() if parent not in found}
        return [ranks[rank] for rank in sorted(ranks)]

    def wait_until(self, condition: Callable[[], T], seconds: float = 200) -> T:
        """Wait until a condition holds; gives what it gave."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            told = self.submitter.told(self.number) if time.monotonic() > deadline else ""
            assert not told, f"{told}\n{self.output()}"
            time.sleep(0.01)
        return found

    def output(self) -> str:
        return self.submitter.output_of(self.number).read_text()

    def slurm(self, *command: str) -> None:
        done = self.submitter.cluster.run(*command)
        assert done.returncode == 0, done.stderr

    def end(self) -> Job:
        return self.submitter.end(self.number, seconds=200)

    def shorten(self) -> None:
        """Set the time limit to the next full minutes."""
        elapsed = self.submitter.cluster.run("squeue", "--noheader", "--job", self.number, "--format=%M").stdout
        minutes = int(elapsed.strip().split(":")[-2])
        self.slurm("scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes + 1}")

    def lengthen(self) -> None:
        """Give the job time enough for the rest, once it has been put back into the queue."""
        self.wait_for_restart()
        self.slurm("scontrol", "update", f"JobId={self.number}", "TimeLimit=9")

    def wait_for_restart(self) -> None:
        self.wait_until(lambda: "Restarts=0" not in self.submitter.told(self.number))


def let_go(ranks: list[int]) -> None:
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)


def term(job: Running) -> None:
    first = FIRST_HELD
    for _ in range(NUM_TERMS):
        ranks = job.hold(first)
        first = job.steps() + 2
        job.slurm("scancel", "--signal=TERM", job.number)
        let_go(ranks)
        before = job.output().count("; requeued, restart")
        job.wait_until(lambda before=before: job.output().count("; requeued, restart") > before)


def warning(job: Running) -> None:
    ranks = job.hold()
    job.shorten()
    job.wait_until(lambda: all(is_pending(rank, signal.SIGUSR1) for rank in ranks))
    let_go(ranks)
    job.lengthen()


def is_pending(process: int, number: signal.Signals) -> bool:
    """Whether a signal waits for a stopped process to go on."""
    masks = re.findall(r"(?:ShdPnd|SigPnd):\s([0-9a-f]+)", Path(f"/proc/{process}/status").read_text())
    return any(int(mask, 16) & 1 << (number - 1) for mask in masks)


def time_limit(job: Running) -> None:
    job.hold()
    job.shorten()  # Slurm lets them go on
    job.lengthen()


def preemption(job: Running) -> None:
    job.hold()
    job.slurm("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    job.wait_for_restart()


def cancel(job: Running) -> None:
    job.hold()
    job.slurm("scancel", job.number)


def kill_rank(job: Running) -> None:
    ranks = job.hold()
    os.kill(ranks[1], signal.SIGKILL)
    let_go(ranks[:1])


def kill_daemon(job: Running) -> None:
    ranks = job.hold()
    nodes = re.search(r" NodeList=n\[(\d)[-,](\d)\]", job.submitter.told(job.number))
    job.submitter.cluster.daemons[f"n{nodes[2]}"].kill()
    job.wait_for_restart()
    let_go(ranks[1:])  # nobody has ended this one


@dataclass(frozen=True)
class Case:
    """What happens to a job, the options of sbatch, its data workers and the restarts that it needs."""

    fault: Callable[[Running], None]
    num_workers: int
    options: tuple[str, ...] = ()
    restarts: int = 1


# sorted by how long they take, the first ones first
CASES = {
    "time limit": Case(time_limit, 4, ("--time=9", "--signal=B:CONT")),
    "warning": Case(warning, 1, ("--time=9", "--signal=B:USR1@5")),
    "slurmd killed": Case(kill_daemon, 0, ("--partition=fragile",)),
    "TERM": Case(term, 1, restarts=NUM_TERMS),
    "rank killed": Case(kill_rank, 4),
    "preemption": Case(preemption, 0, ("--partition=low",)),
    "scancel": Case(cancel, 4, restarts=0),
}
SLOWEST = 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with python_cluster(7, PARTITIONS, gpus_per_node=2, cpus_per_node=8) as running:
        yield running


def flags_for(text_file: Path, *more: object) -> list[str]:
    data = "--seq-length 32 --micro-batch-size 4 --fp32 --num-threads 1 --hidden-dropout 0.1 --log-interval 1000000"
    return [*corpus(text_file), "--model", "peer-tiny", *data.split(), *map(str, more)]


@pytest.fixture(scope="module")
def start(text_file: Path, rank_pools: RankPools, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Flags of a start with the weights, sizes and vocabulary of an import from Hugging Face."""
    folder = tmp_path_factory.mktemp("weights")
    more = (*SIZES, "--train-iters", 1, "--seed", 7, "--save", folder / "save", "--log-dir", folder / "logs")
    rank_pools.of(1).run(train_in_pool, flags_for(text_file, *more))
    hub, imported = {"--discriminator": "ranker", "--generator": "generator"}, folder / "imported"
    for branch in hub.values():
        export = ("--load", folder / "save", "--branch", branch, "--output", folder / branch)
        assert convert.main(["to-hf", *map(str, export)]) == 0
    pair = [word for flag, branch in hub.items() for word in (flag, str(folder / branch))]
    assert convert.main(["from-hf", *pair, "--model", "peer-tiny", "--output", str(imported)]) == 0
    tokenizer = imported / "step_00000000" / "tokenizer"
    return ("--init-from", imported, "--config", imported / "model.yaml", "--tokenizer", tokenizer)


@pytest.fixture(scope="module")
def undisturbed(
    text_file: Path, start: tuple[object, ...], rank_pools: RankPools, tmp_path_factory: pytest.TempPathFactory
) -> list[dict]:
    log_dir = tmp_path_factory.mktemp("undisturbed")
    more = ("--train-iters", STEPS, *start, "--log-dir", log_dir)
    return rank_pools.of(2).run(train_in_pool, flags_for(text_file, *more))[0]


@pytest.fixture(scope="module")
def jobs(
    cluster: SlurmCluster, text_file: Path, start: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[tuple[Running, Job]]]]:
    """All cases at once: those that take longest first, the others when they have come to their fault."""
    submitter = Submitter(cluster, PROJECT, tmp_path_factory.mktemp("jobs"))

    def submit(name: str) -> Running:
        folder = submitter.folder / name.replace(" ", "_")
        case = CASES[name]
        more = ("--train-iters", STEPS, *start, "--num-workers", case.num_workers)
        folders = ("--save", folder / "save", "--save-interval", 5, "--log-dir", folder / "logs")
        options = ["--nodes=2", "--ntasks-per-node=1", *case.options]
        return Running(submitter, submitter.start(options, flags_for(text_file, *more, *folders)), folder)

    def go_through(name: str) -> tuple[Running, Job]:
        job = submit(name)
        CASES[name].fault(job)
        return job, job.end()

    def have_stepped(names: list[str]) -> bool:
        files = [submitter.folder / name.replace(" ", "_") / "logs" / "metrics.jsonl" for name in names]
        return all(file.exists() for file in files)

    slow, quick = list(CASES)[:SLOWEST], list(CASES)[SLOWEST:]
    with ThreadPoolExecutor(len(CASES)) as threads:
        futures = {name: threads.submit(go_through, name) for name in slow}
        deadline = time.monotonic() + 100
        while not have_stepped(slow) and time.monotonic() < deadline:
            time.sleep(0.1)
        futures |= {name: threads.submit(go_through, name) for name in quick}
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.mark.parametrize("name", CASES)
def test_a_job_goes_on_as_if_nothing_had_been(
    name: str, jobs: dict[str, Future[tuple[Running, Job]]], undisturbed: list[dict], start: tuple[object, ...]
) -> None:
    running, job = jobs[name].result()
    metrics = read_metrics(running.folder / "logs")
    assert comparable(metrics) == comparable(undisturbed[: len(metrics)])
    output, case = job.output, CASES[name]
    # on a busy machine Slurm may send the signal that ended a step once more, minutes later, to the step after it
    assert int(re.search(r"Restarts=(\d+)", running.submitter.told(running.number))[1]) >= case.restarts, output
    if name == "scancel":
        assert "JobState=CANCELLED" in running.submitter.told(running.number)
        assert FIRST_HELD <= len(metrics) < STEPS
        assert (running.folder / "save" / "latest").read_text() == f"step_{len(metrics):08}", output
        return
    assert job.exit_code == "0:0", output
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert output.count(f"starting from the weights of {start[1]}") == 1, "it went on at its own checkpoint"
    resumed = [int(step) for step in re.findall(r"resuming from .* after step (\d+)", output)]
    assert resumed, output
    if name in ("rank killed", "slurmd killed"):
        assert resumed[0] >= 5
    else:  # it was warned, and has saved what it had done
        assert resumed[0] >= FIRST_HELD, output
    if name in ("slurmd killed", "preemption"):
        assert not output.count("; requeued, restart 1"), "Slurm does that by itself"


def comparable(metrics: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics]


def test_bad_input_ends_with_its_line_and_is_not_tried_again(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = Submitter(cluster, PROJECT, tmp_path).submit(["-N", "2"], ["--model", "peer-tinny"])
    assert job.exit_code == "2:0"
    assert re.search("^error: .*peer-tinny.*peer-tiny", job.output, re.MULTILINE), job.output
    assert "requeued" not in job.output


def test_an_array_trains_three_seeds(cluster: SlurmCluster, text_file: Path, tmp_path: Path) -> None:
    submitter = Submitter(cluster, PROJECT, tmp_path)
    flags = flags_for(text_file, *SIZES, "--train-iters", 3, "--save", "save", "--log-dir", "logs", "--num-workers", 0)
    array = submitter.start(["--array=1-3", "--output=peer-%A_%a.out"], flags)
    for seed in (1, 2, 3):
        job = submitter.end(f"{array}_{seed}", seconds=150)
        assert job.exit_code == "0:0", job.output
        assert (tmp_path / f"save/seed_{seed}/latest").read_text() == "step_00000003"
        assert f"seed: {seed}\n" in (tmp_path / f"logs/seed_{seed}/run.yaml").read_text()
    assert len({read_metrics(tmp_path / f"logs/seed_{seed}")[-1]["loss"] for seed in (1, 2, 3)}) == 3


def test_fine_tuning_is_warned_and_keeps_the_seeds_that_are_done(cluster: SlurmCluster, tmp_path: Path) -> None:
    model, task = write_encoder(tmp_path / "model"), write_task(tmp_path / "task", train=256)
    recipe = "--seeds 1 2 --epochs 30 --batch-size 16 --lr 0.003"
    flags = ["--model", str(model), "--task", str(task), *recipe.split()]
    submitter = Submitter(cluster, PROJECT, tmp_path)
    options = ["--gpus-per-node=2", "--cpus-per-gpu=1"]  # counted only: there is no device behind them
    number = submitter.start(options, [*flags, "--output-dir", "scores"], "finetune.sh")
    job = Running(submitter, number, tmp_path)
    (first,) = job.wait_until(lambda: list(tmp_path.glob("scores/praise/runs/seed1-*.json")))
    done_at = first.stat().st_mtime_ns
    job.slurm("scancel", "--batch", "--signal=USR1", number)
    job.wait_for_restart()
    ended = job.end()
    assert ended.exit_code == "0:0", ended.output
    assert first.stat().st_mtime_ns == done_at, "this seed was not done again"
    (result,) = json.loads((tmp_path / "scores/results.json").read_text())["tasks"].values()
    assert [run["seed"] for run in result["runs"]] == [1, 2]
    assert result["mean"] > 0.8, "words of praise and blame are told apart"
