"""The trainer's command in processes that may be killed or end by themselves, started in milliseconds.

They are forks of the process that has imported everything (`rank_pool.py`), and nobody launches them: a test that is
about the launcher starts a real one (`runs.pretrain`).
"""

import contextlib
import os
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from rank_pool import become_rank, fork_server, free_port
from runs import PROJECT, SMALL


class ForkedRanks:
    """Ranks that train as flags say; what they print and complain of goes to one file per rank in `folder`.

    From a `checkout` other than the project they import the package anew, and run one of its scripts with just the
    flags that are given.
    """

    def __init__(
        self, flags: Sequence[object], num_ranks: int, folder: Path, *, checkout: Path = PROJECT, script: str = ""
    ) -> None:
        words = [str(flag) for flag in flags]
        command = [script, *words] if script else ["peer_scale/pretrain.py", *SMALL, *words]
        port, start = free_port(), time.monotonic_ns()
        self._logs = [folder / f"rank{rank}-{start}.log" for rank in range(num_ranks)]
        self.processes = [
            fork_server().Process(target=_run, args=(rank, num_ranks, port, str(log), str(checkout), command))
            for rank, log in enumerate(self._logs)
        ]
        for process in self.processes:
            process.start()

    @property
    def said(self) -> list[str]:
        """What each rank has said so far."""
        return [log.read_text() if log.exists() else "" for log in self._logs]

    def wait_until(self, condition: Callable[[], bool], pause: float = 0.02) -> None:
        """Wait for something that the ranks do; fail with what they have said where one ends or it takes too long."""
        deadline = time.monotonic() + 120
        while not condition():
            assert all(process.is_alive() for process in self.processes), self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(pause)

    def signal(self, number: int) -> None:
        """Send a signal to each rank, as a launcher does that ends."""
        for process in self.processes:
            os.kill(process.pid, number)

    def kill(self) -> None:
        """Kill all ranks and their data workers."""
        for process in self.processes:
            for victim in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
        self.end()

    def end(self, timeout: float = 120) -> list[int]:
        """Wait until all ranks have ended; gives their exit codes."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
            if process.exitcode is None:
                for other in self.processes:
                    other.kill()
                raise AssertionError(self.said)
        return [process.exitcode for process in self.processes]


def _run(rank: int, num_ranks: int, port: int, log: str, checkout: str, command: list[str]) -> None:
    become_rank(rank, num_ranks, port, log)
    if checkout != str(PROJECT):
        for name in [name for name in sys.modules if name.partition(".")[0] == "peer_scale"]:
            del sys.modules[name]
    sys.path.insert(0, checkout)
    os.chdir(checkout)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
