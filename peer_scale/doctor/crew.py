"""Starts the ranks of a trial as processes of their own, waits for them, and ends them where they hang."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch.distributed as dist

import peer_scale
from peer_scale.doctor.outcome import Failed
from peer_scale.errors import UserError
from peer_scale.parallel.coordination import RankCoordinator
from peer_scale.parallel.environment import ProcessEnvironment

T = TypeVar("T")
_SECONDS_TO_MEET = 300
_LINES_KEPT = 200  # of a rank's log
_DIED, _RAISED, _ENDED = range(3)  # the order in which ranks' failures are told: others raise because one has died
# what a launcher tells the doctor's own process is not so for the ranks that it starts
_OF_LAUNCHERS = ("TORCHELASTIC_", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_", "CROSS_")


@dataclass(frozen=True)
class Trial:
    """What ranks are to run, in processes that end with it.

    Attributes:
        kind: the function of peer_scale/doctor/trials.py.
        flags: of the trainer, where it trains.
        ranks: how many; None for all that there are.
        on_cpu: whether GPUs are hidden from them.
        options: of the function, in JSON's types.
    """

    kind: str
    flags: tuple[str, ...] = ()
    ranks: Literal[1] | None = None
    on_cpu: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


class Crew:
    """The doctor's processes: one that starts all ranks of this machine or, under a launcher, one per rank.

    All processes call the same methods in the same order.
    """

    def __init__(
        self, environment: ProcessEnvironment, scratch: Path, *, ranks: int, num_gpus: int, timeout: float
    ) -> None:
        """Meet the other processes.

        Args:
            environment: this process's place among those that the launcher started.
            scratch: folder of this process, on its node's own disk.
            ranks: to start on this machine, where no launcher has started any.
            num_gpus: that this process sees.
            timeout: seconds that a trial may take.

        Raises:
            UserError: the other processes cannot be reached.
        """
        self._environment, self._scratch, self._timeout = environment, scratch, timeout
        self._has_launcher = environment.launcher != "none"
        self.num_ranks = environment.world_size if self._has_launcher else ranks
        self.ranks_per_node = environment.local_world_size if self._has_launcher else ranks
        self.num_gpus = num_gpus
        self.is_first = environment.rank == 0
        self._trials = 0
        self._coordinator = self._meet() if self._has_launcher else None

    @property
    def place(self) -> tuple[int, int, int]:
        """Give this process's rank, its rank on the node, and the number of ranks on the node."""
        return self._environment.rank, self._environment.local_rank, self.ranks_per_node

    def _meet(self) -> RankCoordinator:
        place = self._environment
        address = f"{place.master_addr}:{place.master_port}"
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"tcp://{address}",
                rank=place.rank,
                world_size=place.world_size,
                timeout=timedelta(seconds=_SECONDS_TO_MEET),
            )
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"rank {place.rank} of {place.world_size} has not met the others at {address}: {reason}"
            ) from None
        return RankCoordinator()  # which waits as long as a trial takes

    def close(self) -> None:
        """Part from the other processes."""
        if self._coordinator is not None:
            dist.destroy_process_group()

    def exchange(self, value: T) -> list[T]:
        """Give the values of all of the doctor's processes, on all of them."""
        return [value] if self._coordinator is None else self._coordinator.exchange(value)

    def run(self, trial: Trial) -> list[Any]:
        """Run a trial; give its ranks' results, in their order, on all of the doctor's processes.

        Raises:
            Failed: a rank raised, died, or did not end in time; the line is that of the first.
        """
        self._trials += 1
        folder = self._scratch / f"trial-{self._trials}"
        folder.mkdir()
        port = self.exchange(free_port())[0]
        results = self._local_results(trial, folder, port)
        found = [result for of_process in self.exchange(results) for result in of_process]
        failures = [result for result in found if "error" in result]
        if failures:
            first = min(failures, key=lambda result: (result["order"], result["when"]))
            raise Failed(first["error"], {f"log of rank {first['rank']}": first["log"]})
        return [result["value"] for result in sorted(found, key=lambda result: result["rank"])]

    def _local_results(self, trial: Trial, folder: Path, port: int) -> list[dict[str, Any]]:
        ranks = _Ranks(trial, folder)
        try:
            for rank, local_rank in self._places(trial):
                ranks.start(rank, self._variables(trial, rank, local_rank, port))
            return ranks.wait(self._timeout, self._other_has_failed, self._tell_failure)
        except OSError as error:  # no more processes or memory: the others wait for an answer
            self._tell_failure()
            rank = self._environment.rank
            return [{"rank": rank, "error": f"cannot be started: {error}", "order": _DIED, "when": 0.0, "log": []}]
        finally:
            ranks.end()

    def _places(self, trial: Trial) -> list[tuple[int, int]]:
        """Give (rank, local rank) of each rank of a trial that this process starts."""
        if trial.ranks == 1:
            return [(0, 0)] if self.is_first else []
        if self._has_launcher:
            return [(self._environment.rank, self._environment.local_rank)]
        return [(rank, rank) for rank in range(self.num_ranks)]

    def _variables(self, trial: Trial, rank: int, local_rank: int, port: int) -> dict[str, str]:
        """Give a rank's environment."""
        alone = trial.ranks == 1
        address = self._environment.master_addr if self._has_launcher and not alone else "127.0.0.1"
        local = 1 if alone else self.ranks_per_node
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)}
        package = str(Path(peer_scale.__file__).resolve().parent.parent)
        path = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        told: dict[str, object] = {
            "RANK": rank,
            "WORLD_SIZE": 1 if alone else self.num_ranks,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": local,
            "LOCAL_SIZE": local,
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
            "PYTHONPATH": os.pathsep.join(path),
            # the model is tiny; several threads only wait for each other where others work on the machine too
            "OMP_NUM_THREADS": 1,
        }
        if trial.on_cpu:
            told |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        return kept | {name: str(value) for name, value in told.items()}

    def _tell_failure(self) -> None:
        if self._has_launcher:
            _store().set(f"doctor/failed/{self._trials}", "1")

    def _other_has_failed(self) -> bool:
        return self._has_launcher and _store().check([f"doctor/failed/{self._trials}"])


class _Ranks:
    """The processes of one trial that this process has started."""

    def __init__(self, trial: Trial, folder: Path) -> None:
        self._trial, self._folder = trial, folder
        self._processes: dict[int, subprocess.Popen] = {}
        self._task = folder / "trial.json"
        self._task.write_text(
            json.dumps({"kind": trial.kind, "flags": trial.flags, "options": dict(trial.options)}), encoding="utf-8"
        )

    def start(self, rank: int, environment: dict[str, str]) -> None:
        """Start a rank; what it and its libraries say goes into a file."""
        command = [sys.executable, "-m", "peer_scale.doctor.rank", str(self._task), str(self._result(rank))]
        with self._log(rank).open("wb") as log:
            self._processes[rank] = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder,  # nothing to import by mistake
                start_new_session=True,  # with its loader workers it is one group to be ended
            )

    def wait(
        self, timeout: float, other_has_failed: Callable[[], bool], tell_failure: Callable[[], None]
    ) -> list[dict[str, Any]]:
        """Wait until all ranks have ended, or one has failed here or elsewhere; give their results or errors."""
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in self._processes.values()):
            if any(process.poll() for process in self._processes.values()):
                tell_failure()
                time.sleep(1.0)  # a rank that died takes others with it: they may say why
                break
            if other_has_failed():
                break
            if time.monotonic() > deadline:
                tell_failure()
                hanging = [rank for rank, process in self._processes.items() if process.poll() is None]
                return [self._failure(rank, self._hang(rank, timeout), _DIED) for rank in hanging]
            time.sleep(0.05)
        results = [self._outcome(rank) for rank in self._processes]
        if any("error" in result for result in results):
            tell_failure()
        return results

    def end(self) -> None:
        """Kill what still runs, loader workers included."""
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _outcome(self, rank: int) -> dict[str, Any]:
        code = self._processes[rank].poll()
        with contextlib.suppress(OSError, ValueError):
            written = json.loads(self._result(rank).read_text(encoding="utf-8"))
            if "value" in written:
                return {"rank": rank, **written}
            return self._failure(rank, written["error"], _RAISED, written["when"])
        if code is None:
            return self._failure(rank, f"rank {rank} was ended: another one had failed", _ENDED)
        lines = self._said(rank)
        return self._failure(rank, f"rank {rank} died, {_how(code)}{': ' if lines else ''}{''.join(lines[-1:])}", _DIED)

    def _failure(self, rank: int, error: str, order: int, when: float = 0.0) -> dict[str, Any]:
        return {"rank": rank, "error": error, "order": order, "when": when, "log": self._said(rank)}

    def _said(self, rank: int) -> list[str]:
        """Give the last lines of what a rank and its libraries have said."""
        log = self._log(rank).read_text(encoding="utf-8", errors="replace")
        return [line.rstrip()[:300] for line in log.strip().splitlines()[-_LINES_KEPT:]]

    def _hang(self, rank: int, timeout: float) -> str:
        """Let a rank write where it stands, and give that with the time that it had."""
        process = self._processes[rank]
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGUSR2)  # faulthandler's, as rank.py has it
        time.sleep(0.3)
        frames = [line.strip() for line in self._said(rank) if line.strip().startswith("File ")]
        ours = next((frame for frame in frames if "peer_scale" in frame), None)
        where = f", at {ours}" if ours else ""
        return f"rank {rank} did not end in {timeout:g} s{where}"

    def _result(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.log"


def free_port() -> int:
    """Give a port below the range from which outgoing connections take theirs: those could have it by then."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
