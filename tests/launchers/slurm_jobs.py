"""Jobs of the scripts in slurm/ on a test's cluster."""

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slurm_cluster import Partition, SlurmCluster, slurm_cluster


@contextmanager
def python_cluster(num_nodes: int = 2, partitions: Sequence[Partition] = (), **sizes: int) -> Iterator[SlurmCluster]:
    """A cluster whose jobs find this Python, and nothing that would choose a checkout or an address for them."""
    with slurm_cluster(num_nodes, partitions=partitions, **sizes) as running:
        path = os.pathsep.join([str(Path(sys.executable).parent), running.environ["PATH"]])
        variables = without(running.environ, "PEER_HOME", "PEER_VENV", "MASTER_ADDR", "MASTER_PORT")
        yield SlurmCluster(running.folder, running.nodes, variables | {"PATH": path}, running.daemons)


def without(environ: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


@dataclass(frozen=True)
class Job:
    """A finished job: Slurm's exit code ("code:signal"), its output and what its ranks said, by rank."""

    exit_code: str
    output: str
    ranks: list[dict]


@dataclass(frozen=True)
class Submitter:
    """Submits a checkout's scripts to a cluster."""

    cluster: SlurmCluster
    checkout: Path
    folder: Path  # where sbatch is called

    def start(
        self, options: Sequence[str], flags: Sequence[str], script: str | Path = "base.sh", **variables: str
    ) -> str:
        """Give the number of a new job."""
        command = ["sbatch", "--parsable", *options, str(self.checkout / "slurm" / script), *flags]
        submitted = self.cluster.run(*command, cwd=self.folder, env=self.cluster.environ | variables)
        assert submitted.returncode == 0, submitted.stderr
        return submitted.stdout.strip()

    def submit(self, options: list[str], flags: list[str], script: str | Path = "base.sh", **variables: str) -> Job:
        return self.end(self.start(options, flags, script, **variables))

    def end(self, number: str, seconds: float = 90) -> Job:
        """Wait until a job has ended for good."""
        deadline = time.monotonic() + seconds
        while not re.search("JobState=(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)", text := self.told(number)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {number} goes on\n{text}\n{self.cluster.logs()}")
            time.sleep(0.1)
        return self.job(self.output_of(number), re.search(r" ExitCode=(\S+)", text)[1])

    def told(self, number: str) -> str:
        return self.cluster.run("scontrol", "show", "job", number).stdout

    def output_of(self, number: str) -> Path:
        return Path(re.search("StdOut=(.*)", self.told(number))[1])

    @staticmethod
    def job(output_file: Path, exit_code: str) -> Job:
        output = output_file.read_text()
        of_ranks = [log.read_text() for log in sorted(output_file.with_suffix(".ranks").glob("*.log"))]
        lines = "".join([output, *of_ranks]).splitlines()
        told = [json.loads(line[len("RANK ") :]) for line in lines if line.startswith("RANK ")]
        ranks = {answer["rank"]: answer for answer in told}  # what a failed one says stands in the job's output, too
        return Job(exit_code, output, [ranks[rank] for rank in sorted(ranks)])
