"""Programs that an experiment runs: each a process of its own, which ends with the experiment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

CLI = f"{__name__.partition('.')[0]}.cli"
"""The module of the command peer-scale, which is above this one: it is started, never imported."""

_LAST_BYTES = 4000
_CHECKOUT = Path(__file__).resolve().parents[2]


class ProgramError(Exception):
    """A program failed; the message is the last thing that it said."""


class Programs:
    """Starts programs, from several threads, and stops all of them at once."""

    def __init__(self, *, one_thread: bool) -> None:
        """Give each program one computing thread, where several run side by side."""
        self._environ = {**os.environ, "PYTHONPATH": os.pathsep.join(_python_path())}
        if one_thread:
            self._environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self.stopping = False

    def run(self, command: Sequence[str | Path], log: Path) -> int:
        """Run a program to its end with its output behind `log`'s; give its exit code.

        The program gets SIGTERM when this process dies, by whatever signal.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        bound = [sys.executable, "-m", "peer_scale.experiments.bound", str(os.getpid()), *map(str, command)]
        with log.open("ab") as output:
            with self._lock:
                if self.stopping:
                    return -signal.SIGTERM
                process = subprocess.Popen(
                    bound, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self._environ
                )
                self._running.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)

    def check(self, command: Sequence[str | Path], log: Path) -> None:
        """Run a program to its end; ProgramError with its last line where it fails."""
        code = self.run(command, log)
        if code:
            raise ProgramError(f"exit code {code}: {last_line(log)} (all of it: {log})")

    def stop(self) -> None:
        """Ask all running programs to save and end, and start no more."""
        with self._lock:
            self.stopping = True
            for process in self._running:
                process.terminate()


def last_line(log: Path) -> str:
    """Give the last line that a program wrote."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


def command(*arguments: str | Path) -> list[str]:
    """Give the command line of `peer-scale ...`, whether it is installed or run from a checkout."""
    return [sys.executable, "-m", CLI, *map(str, arguments)]


def _python_path() -> list[str]:
    before = os.environ.get("PYTHONPATH")
    return [str(_CHECKOUT), *([before] if before else [])]
