"""Runs in which something breaks at a random moment, and which are started again until they are done."""

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from long_runs import flags_of_long_run
from peer_scale.checkpoints.folder import committed
from peer_scale.samples.loader import end_workers
from rank_pool import become_rank, fork_server, free_port
from runs import PROJECT, read_metrics, without_times

RANKS = 2
DONE, REFUSED, STOPPED = 0, 2, 75
MORE_SEEDS = int(os.environ.get("PEER_TEST_CHAOS_SEEDS", "0"))


def term_to_all(run, rng):
    for process in run.processes():
        process.terminate()


def kill_of_a_rank(run, rng):
    rng.choice(run.ranks()).kill()


def kill_of_the_launcher(run, rng):
    os.kill(run.launcher.pid, signal.SIGKILL)


def stop_of_a_rank(run, rng):
    rng.choice(run.ranks()).suspend()


def kill_of_a_data_worker(run, rng):
    rng.choice([worker for rank in run.ranks() for worker in rank.children()]).kill()


def full_disk(run, rng):
    """Take all room on the disk for five seconds: of checkpoints and of logs."""
    filler = run.folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    time.sleep(5)
    filler.unlink()


def flipped_byte_in_the_newest_checkpoint(run, rng):
    """Which shows at the next start, so that has to come."""
    rng.choice(run.ranks()).suspend()  # for as long as it takes: no newer one may come
    saved = committed(run.folder / "save")
    if saved:
        path = rng.choice([path for path in sorted(saved[-1].rglob("*")) if path.is_file()])
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    for rank in run.ranks():
        rank.kill()


def second_starter(run, rng):
    other = Run(run.folder, run.flags)
    assert other.end() == REFUSED, other.said()
    assert "another run is at work there" in other.said()


FAULTS = [
    kill_of_the_launcher,
    flipped_byte_in_the_newest_checkpoint,
    term_to_all,
    kill_of_a_data_worker,
    second_starter,
    stop_of_a_rank,
    full_disk,
    kill_of_a_rank,
]


class Fault(NamedTuple):
    """What happens to a run, and after which step."""

    happen: Callable[["Run", random.Random], None]
    after: int
    rng: random.Random


class Run:
    """A launcher and its ranks, in a session of their own; what they say goes to files in `folder`."""

    starts = 0

    def __init__(self, folder: Path, flags: list[str]) -> None:
        Run.starts += 1
        self.folder, self.flags = folder, flags
        self._log = folder.parent / f"start-{Run.starts}"
        self.launcher = fork_server().Process(target=_launch, args=(flags, str(self._log)))
        self.launcher.start()

    def processes(self) -> list[psutil.Process]:
        """List all that are alive, whoever is their parent now."""
        found = []
        for process in psutil.process_iter(["status"]):
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(process.pid) == self.launcher.pid and process.info["status"] != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        return psutil.Process(self.launcher.pid).children()

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self._log.parent.glob(f"{self._log.name}.*")))

    def end(self) -> int:
        """Wait for the launcher, and for those that it has left behind; give its exit code."""
        deadline = time.monotonic() + 120
        self.launcher.join(120)
        while self.launcher.exitcode is None or self.processes():
            if time.monotonic() > deadline:
                for process in self.processes():
                    process.kill()
                raise AssertionError(f"it does not end: {self.said()}")
            time.sleep(0.02)
        return self.launcher.exitcode


def _launch(flags: list[str], log: str) -> None:
    """Do as torchrun: start the ranks, pass SIGTERM on, and end all of them where one of them ends by a fault."""
    os.setsid()
    os.environ["TORCHELASTIC_RUN_ID"] = "chaos"
    port, context = free_port(), multiprocessing.get_context("fork")
    ranks = [context.Process(target=_train, args=(rank, port, f"{log}.{rank}", flags)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    while not told and all(rank.exitcode in (None, DONE) for rank in ranks) and any(rank.is_alive() for rank in ranks):
        time.sleep(0.02)
    codes = [rank.exitcode for rank in ranks]
    deadline = time.monotonic() + 10
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for rank in ranks:
            if rank.is_alive():
                end(psutil.Process(rank.pid))
        for rank in ranks:
            rank.join(max(0, deadline - time.monotonic()))
    for rank in ranks:
        rank.join()
    first = next((code for code in codes if code), None) or next((rank.exitcode for rank in ranks if rank.exitcode), 0)
    os._exit(first if first >= 0 else 1)


def _train(rank: int, port: int, log: str, flags: list[str]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    become_rank(rank, RANKS, port, log)
    os.chdir(PROJECT)
    from peer_scale.pretrain import main

    try:
        code = main(flags)
    finally:
        end_workers()  # as the interpreter does at its end, but not in a fork of multiprocessing's
    sys.exit(code)


def start_again_until_done(folder: Path, flags: list[str], faults: Sequence[Fault] = ()) -> list[int]:
    """Run until it is done, with a fault in each of the first starts; give the exit codes of all."""
    codes: list[int] = []
    left = list(faults)
    while not codes or codes[-1] not in (DONE, REFUSED):
        assert len(codes) < 8, codes
        began, run = time.time(), Run(folder, flags)
        if left:
            fault = left.pop(0)
            while not _has_done(folder, fault.after, began) and run.launcher.is_alive():
                time.sleep(0.002)
            assert run.launcher.is_alive(), run.said()
            time.sleep(fault.rng.uniform(0, 0.05))
            fault.happen(run, fault.rng)
        codes.append(run.end())
    assert codes[-1] == DONE, run.said()
    return codes


def _has_done(folder: Path, step: int, since: float) -> bool:
    file = folder / "log" / "metrics.jsonl"
    return file.exists() and file.stat().st_mtime > since and file.read_bytes().count(b"\n") >= step


def flags_of(folder: Path, text_file: Path, steps: int, stall_minutes: float = 5) -> list[str]:
    every = max(5, steps // 10)
    return flags_of_long_run(
        *(folder, text_file, steps, "--save-interval", every, "--keep-last", 3, "--num-workers", 1),
        *("--eval-interval", every, "--eval-iters", 1, "--stall-minutes", stall_minutes),
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, text_file):
    """Give the metrics of a run of so many steps in which nothing happens."""
    made = {}

    def metrics(steps):
        if steps not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            folder.mkdir()
            assert start_again_until_done(folder, flags_of(folder, text_file, steps)) == [DONE]
            made[steps] = without_times(read_metrics(folder / "log"))
            assert [line["step"] for line in made[steps]] == list(range(1, steps + 1))
        return made[steps]

    return metrics


def faults_of(seeds: Sequence[int], steps: int) -> list[Fault]:
    """Give each seed's fault, one after the other in equal parts of a run."""
    part = steps * 8 // 10 // len(seeds)
    rngs = [random.Random(seed) for seed in seeds]
    begins = [steps // 10 + number * part for number in range(len(seeds))]
    return [
        Fault(FAULTS[seed % len(FAULTS)], begin + rng.randrange(part), rng)
        for seed, begin, rng in zip(seeds, begins, rngs, strict=True)
    ]


CASES = [
    ((0, 1, 2), 40),
    pytest.param((3, 4, 5, 6, 7), 200, marks=pytest.mark.slow),
    *(pytest.param((seed,), 200, marks=pytest.mark.slow) for seed in range(MORE_SEEDS)),
]


@pytest.mark.parametrize(("seeds", "steps"), CASES)
def test_whatever_breaks_the_run_ends_as_if_nothing_had(seeds, steps, undisturbed, text_file, tmp_path, request):
    faults = faults_of(seeds, steps)
    happening = [fault.happen for fault in faults]
    if full_disk in happening:
        folder = request.getfixturevalue("mount_disk")("8m")
    else:
        folder = tmp_path / "run"
        folder.mkdir()
    flags = flags_of(folder, text_file, steps, stall_minutes=0.1 if stop_of_a_rank in happening else 5)
    codes = start_again_until_done(folder, flags, faults)
    print(*(f"{fault.happen.__name__} after step {fault.after};" for fault in faults), f"exit codes {codes}")
    assert without_times(read_metrics(folder / "log")) == undisturbed(steps)
